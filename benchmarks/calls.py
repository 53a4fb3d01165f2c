"""What a call costs before a byte moves: the table of benchmarks/results/calls.md.

Each case is run in a process of its own package, in short bursts that take turns with the other package's, on the
thread's own clock; the figure is the lower quartile of all bursts, which another program beside it moves least.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
POOLS = 160  # K and V of 80 layers
BLOCKS = 2048
PAGE_BYTES = 64
BURST_CALLS = 20
# Goals on the clock of an idle core of the processors that they were set on; None where there was none.
GOALS_US = {
    "swap_blocks, 1 block of 16 KiB, copied": 3.8,
    f"copy_pages, {POOLS} + {POOLS} pools, nothing to copy": 60.0,
    f"PreparedCopy.run, {POOLS} + {POOLS} pools, 64 blocks": 12.0,
    f"PreparedCopy.run, {POOLS} + {POOLS} pools, 1000 blocks": 16.0,
    f"PreparedCopy.run, {POOLS} + {POOLS} pools, to a GPU by the kernel but for its launch, 64 blocks": 25.0,
    f"PreparedCopy.run, {POOLS} + {POOLS} pools, to a GPU by the kernel but for its launch, 1000 blocks": 40.0,
}


def cases() -> dict[str, tuple[Callable[[], Any], bool]]:
    """The calls by name, and whether they are only explained."""
    import torch

    import kvkernels

    torch.set_num_threads(1)
    ops = torch.ops.kvkernels
    generator = torch.Generator().manual_seed(0)

    def mapping(pairs: int) -> torch.Tensor:
        return torch.stack([torch.randperm(BLOCKS, generator=generator)[:pairs] for _ in range(2)], dim=1)

    src, dst = ([torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8) for _ in range(POOLS)] for _ in range(2))
    big = [torch.zeros(64, 16 << 10, dtype=torch.uint8) for _ in range(2)]
    runs = kvkernels.whole_page_runs(src)
    nothing, some, many, one = mapping(0), mapping(64), mapping(1000), torch.tensor([[3, 5]])
    out = torch.empty(64, POOLS * PAGE_BYTES, dtype=torch.uint8)
    ids = some[:, 0].contiguous()
    pools = f"{POOLS} + {POOLS} pools"

    def refused(*lists: list[torch.Tensor]) -> None:
        with contextlib.suppress(ValueError):
            ops.copy_pages(*lists, nothing, runs, executor="nobody")

    found: dict[str, tuple[Callable[[], Any], bool]] = {
        "swap_blocks, 1 block of 16 KiB, copied": (lambda: ops.swap_blocks(*big, 16 << 10, one), False),
        f"copy_pages, {pools}, nothing to copy": (lambda: ops.copy_pages(src, dst, nothing, runs), False),
        f"copy_pages, {pools}, refused by its first check": (lambda: refused(src, dst), False),
        "copy_pages, 1 + 1 pools, refused by its first check": (lambda: refused(src[:1], dst[:1]), False),
        f"copy_pages, {pools}, 64 blocks": (lambda: ops.copy_pages(src, dst, some, runs), True),
        f"copy_pages, {pools}, 1000 blocks": (lambda: ops.copy_pages(src, dst, many, runs), True),
        f"gather_blocks, {POOLS} pools, 64 blocks": (lambda: ops.gather_blocks(src, ids, out), True),
    }
    if hasattr(kvkernels, "prepare"):
        prepared = kvkernels.prepare(src, dst)
        found |= {
            f"PreparedCopy.run, {pools}, nothing to copy": (lambda: prepared.run(nothing), False),
            f"PreparedCopy.run, {pools}, 64 blocks": (lambda: prepared.run(some), True),
            f"PreparedCopy.run, {pools}, 1000 blocks": (lambda: prepared.run(many), True),
            f"PreparedCopy.run(layer=), {pools}, 64 blocks": (lambda: prepared.run(some, layer=7), True),
        }
        if torch.cuda.is_available():
            found |= to_a_device(src, some, many)
    return found


def to_a_device(src: Sequence[Any], some: Any, many: Any) -> dict[str, tuple[Callable[[], Any], bool]]:
    """What a launch of a kernel needs before it, on a GPU or on the stand-in for one."""
    import torch

    import kvkernels

    pinned = [pool.pin_memory() for pool in src]
    pools = [torch.empty(pool.shape, dtype=pool.dtype, device="cuda") for pool in src]
    prepared = kvkernels.prepare(pinned, pools, executor="kernel")
    name = f"PreparedCopy.run, {POOLS} + {POOLS} pools, to a GPU by the kernel but for its launch"
    return {
        f"{name}, 64 blocks": (lambda: prepared.run(some), True),
        f"{name}, 1000 blocks": (lambda: prepared.run(many), True),
    }


def work() -> None:
    """A process of one package: a burst of every case for each line that comes in."""
    import torch

    found = cases()
    for _ in sys.stdin:
        burst = {}
        for name, (call, is_explained) in found.items():
            # Until the end of the scope, ops check and lower, and move nothing.
            if is_explained:
                torch.ops.kvkernels._explain_begin()
            call()
            begin = time.thread_time()
            for _ in range(BURST_CALLS):
                call()
            burst[name] = (time.thread_time() - begin) / BURST_CALLS * 1e6
            if is_explained:
                torch.ops.kvkernels._explain_end()
        print(json.dumps(burst), flush=True)


class Package:
    """A package's process."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.bursts: list[dict[str, float]] = []

    def burst(self) -> None:
        assert self._process.stdin and self._process.stdout
        print("go", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process of the benchmark ended early; its error is above")
        self.bursts.append(json.loads(line))

    def close(self) -> dict[str, float]:
        """Lower quartiles by case, in microseconds."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        names = self.bursts[0]
        # Inclusive: the other method goes below all that was measured where there are two bursts.
        return {
            name: statistics.quantiles([burst[name] for burst in self.bursts], n=4, method="inclusive")[0]
            for name in names
        }


def measure(packages: Sequence[Path], rounds: int) -> list[dict[str, float]]:
    running = [Package(folder) for folder in packages]
    for _ in range(rounds):
        for package in running:
            package.burst()
    return [package.close() for package in running]


def markdown(result: dict[str, Any]) -> str:
    before = result["before_us"]
    lines = [
        "# What a call costs before a byte moves",
        "",
        f"Measured by `python benchmarks/calls.py` on {result['machine']}, load {result['load_1_minute']:.1f}.",
        f"Microseconds of the thread's own clock, called from Python: the lower quartile of {result['rounds']} bursts "
        f"of {BURST_CALLS} calls, packages taking turns. Pools have {BLOCKS} blocks of {PAGE_BYTES} bytes; ids are "
        'random. Where a case says neither "copied" nor "nothing to copy", the call is explained: it checks, lowers '
        "and chooses, moves nothing, and pays about 2 us for the explanation's text instead. Nearly all of a call that "
        "is refused by its first check is torch handing over its tensors: what 320 of them take more than 2 do, only "
        "passing fewer can save, which is what a prepared copy is for.",
        "",
        f"| call | {'before | ' if before else ''}us | goal |",
        f"| --- | ---: | {'---: | ' if before else ''}---: |",
    ]
    for name, after in result["after_us"].items():
        goal = GOALS_US.get(name)
        missed = " (missed)" if goal is not None and after > goal else ""
        was = f"{before[name]:.1f} | " if name in before else "- | " if before else ""
        lines.append(f"| {name} | {was}{after:.1f} | {'' if goal is None else f'{goal:g}{missed}'} |")
    if before:
        lines += ["", f"*before* is {result['before']}."]
    if result["device"]:
        lines += ["", f"The GPU is {result['device']}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="bursts of each package (%(default)s)")
    parser.add_argument("--before", type=Path, help="a folder with another version's built package, to compare with")
    parser.add_argument("--before-name", default="an earlier version", help="what the table calls it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work()
    import torch

    import machine
    from publish import publish

    described = machine.describe(torch.device("cpu"), None)
    import kvkernels

    here = Path(kvkernels.__file__).resolve().parents[1]
    measured = measure([here, *([options.before] if options.before else [])], options.rounds)
    result = {
        "machine": machine.in_words(described),
        "load_1_minute": os.getloadavg()[0],
        "rounds": options.rounds,
        "after_us": measured[0],
        "before_us": measured[1] if options.before else {},
        "before": options.before_name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    publish(options.out, "calls", result, markdown(result))


if __name__ == "__main__":
    main()
