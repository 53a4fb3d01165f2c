"""Which lines of the compiled kernels a test's calls leave out."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .sim import Sim


class Coverage:
    """Runs calls on the simulator, and keeps the lines that none of them executed."""

    def __init__(self, sim: Sim, architecture: str, seed: Sequence[int]) -> None:
        self.sim, self.architecture = sim, architecture
        self.rng = np.random.default_rng(seed)
        self.unexecuted: dict[str, dict[int, str]] = {}

    def run(self, call, *arguments, copies_early: bool = False) -> None:
        device = self.sim.use_ptx(self.architecture)
        device.copies_early = copies_early
        call(self.sim, self.rng, *arguments)
        for kernel, lines in device.unexecuted.items():
            known = self.unexecuted.get(kernel, lines)
            self.unexecuted[kernel] = {line: text for line, text in lines.items() if line in known}
        self.sim.reset()

    def check(self, most_never_taken: dict[str, int]) -> None:
        """Each kernel of a kind has run, whole but for so many branches that nothing takes."""
        tables = ("small", "large", "table")
        kernels = {f"kvkernels_copy_{kind}_{t}" for kind in most_never_taken for t in tables}
        assert set(self.unexecuted) >= kernels, self.unexecuted.keys()
        for kernel, lines in self.unexecuted.items():
            if kernel not in kernels:
                continue
            left_out = [line for line, text in lines.items() if not re.match(r"@!?%p\d+ +bra ", text)]
            assert not left_out, f"{kernel}: {len(left_out)} lines: {[lines[line] for line in left_out[:12]]}"
            assert len(lines) <= most_never_taken[kernel.split("_")[2]], (kernel, lines)
