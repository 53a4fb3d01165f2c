"""The stretches of memory of a GPU run, and the check of every byte of them.

``truth`` holds random bytes and never changes. What is read from is filled from it, so that the check knows what every
source held, and what a copy should have written is built beside it, out of truth alone, in ``expected``. Both are where
torch can index: on the device, or on the CPU where torch's own kernels do not run. The functions are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import fill_random

POISON = 0xA5
CHUNK_BYTES = 128 << 20

Fill = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass
class Case:
    """A copy to be checked and timed: each of ``calls`` moves ``bytes`` of payload from ``src`` to ``dst``.

    Attributes
    ----------
    src, dst : torch.Tensor
        The stretches of memory, uint8, 1-D. The calls read and write their first ``span_bytes`` bytes, in which every
        byte of ``dst`` that no call names must stay as it was.
    expect : callable
        Of (truth, expected): writes into ``expected`` what all calls together write into ``dst``.
    where : callable
        What the byte at an offset of ``dst`` belongs to.
    explain : callable
        ``kvkernels.explain`` of the first call, or None for what is no op of this library.
    waits : bool
        Whether a call waits for the device by itself.
    """

    src: torch.Tensor
    dst: torch.Tensor
    span_bytes: int
    calls: Sequence[Callable[[], Any]]
    bytes: int
    expect: Fill
    where: Callable[[int], str] = lambda offset: f"byte {offset}"
    explain: Callable[[], Any] | None = None
    waits: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Checker:
    """Compares all bytes of a case's two sides with what must be there."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.truth = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.expected = torch.empty_like(self.truth)
        self._chunk = torch.empty(min(nbytes, CHUNK_BYTES), dtype=torch.uint8, device=device)
        self._poison = torch.full_like(self._chunk, POISON)
        fill_random(self.truth, seed=1)
        self._true: set[int] = set()

    def prepare_source(self, flat: torch.Tensor) -> None:
        """Makes ``flat`` hold truth, unless it still does."""
        if flat.data_ptr() not in self._true:
            flat[: len(self.truth)].copy_(self.truth[: len(flat)])
            self._true.add(flat.data_ptr())

    def forget(self, flat: torch.Tensor) -> None:
        """``flat`` no longer holds truth: it is written, or freed."""
        self._true.discard(flat.data_ptr())

    def check(self, case: Case) -> str:
        """Runs each call once on a poisoned destination. What is wrong, or ""."""
        self.prepare_source(case.src)
        self.forget(case.dst)
        target = case.dst[: case.span_bytes]
        self._fill_with_poison(target)
        _wait_for(target, case.src)
        for call in case.calls:
            call()
        _wait_for(target, case.src)
        expected = self.expected[: case.span_bytes]
        self._fill_with_poison(expected)
        case.expect(self.truth, expected)
        return self._difference(target, expected, "wrote", case.where) or self._source_difference(case)

    def _source_difference(self, case: Case) -> str:
        source = case.src[: case.span_bytes]
        difference = self._difference(
            source, self.truth[: case.span_bytes], "changed its source, which has", lambda offset: f"byte {offset}"
        )
        if difference:
            self.forget(case.src)
        return difference

    def _fill_with_poison(self, flat: torch.Tensor) -> None:
        for start in range(0, len(flat), len(self._poison)):
            part = flat[start : start + len(self._poison)]
            part.copy_(self._poison[: len(part)])

    def _difference(self, flat: torch.Tensor, wanted: torch.Tensor, what: str, where: Callable[[int], str]) -> str:
        """The first byte of ``flat`` that is not ``wanted``, or ""."""
        for start in range(0, len(flat), len(self._chunk)):
            want = wanted[start : start + len(self._chunk)]
            got = self._chunk[: len(want)]
            got.copy_(flat[start : start + len(want)])
            if torch.equal(got, want):
                continue
            at = int((got != want).nonzero()[0])
            return f"{what} {int(got[at]):#04x} where {int(want[at]):#04x} belongs: {where(start + at)}"
        return ""


def _wait_for(*tensors: torch.Tensor) -> None:
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
