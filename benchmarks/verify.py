"""Checks a side's bytes before its time counts: each byte moved, guard bytes, blocks not named, and the source."""

from collections.abc import Callable

import numpy as np
import torch

from geometry import Geometry, Moves

POISON = 0xA5


class WrongBytes(AssertionError):
    """A side wrote something else than it was asked to."""


class Verifier:
    """Compares with NumPy's indexing of the same bytes, on the host, over the whole of the destination's memory.

    Parameters
    ----------
    src, dst : torch.Tensor
        The two stretches of memory, uint8, 1-D, of ``geometry.flat_bytes`` bytes. ``dst`` is overwritten.
    """

    def __init__(self, geometry: Geometry, moves: Moves, src: torch.Tensor, dst: torch.Tensor) -> None:
        self._geometry, self._moves = geometry, moves
        self._src, self._dst = src, dst
        self._source_before = src.cpu().clone()
        self._expected: dict[tuple[str, str], torch.Tensor] = {}

    def check(self, name: str, run: Callable[[], object], src_form: str, dst_form: str) -> None:
        """Runs a side once on a poisoned destination; raises WrongBytes at the first byte that is wrong."""
        self._dst.fill_(POISON)
        run()
        if self._dst.is_cuda or self._src.is_cuda:
            torch.cuda.synchronize()
        expected = self._expect(src_form, dst_form)
        self._compare(name, "wrote", self._dst.cpu(), expected, dst_form)
        self._compare(name, "changed its source, which has", self._src.cpu(), self._source_before, "pools")

    def _expect(self, src_form: str, dst_form: str) -> torch.Tensor:
        # One is kept: they are as large as the destination, and sides of one form come together.
        if (src_form, dst_form) not in self._expected:
            self._expected.clear()
            expected = torch.full_like(self._source_before, POISON)
            src_ids = self._moves.ids(src_form, "src").numpy()
            dst_ids = self._moves.ids(dst_form, "dst").numpy()
            sources = self._geometry.form(self._source_before, src_form)
            for source, target in zip(sources, self._geometry.form(expected, dst_form), strict=True):
                target.numpy()[dst_ids] = source.numpy()[src_ids]
            self._expected[src_form, dst_form] = expected
        return self._expected[src_form, dst_form]

    def _compare(self, name: str, what: str, got: torch.Tensor, expected: torch.Tensor, form: str) -> None:
        if torch.equal(got, expected):
            return
        offset = int(np.flatnonzero(got.numpy() != expected.numpy())[0])
        place = self._geometry.where(offset) if form == "pools" else f"byte {offset} of the {form}"
        raise WrongBytes(f"{name} {what} {int(got[offset]):#04x} where {int(expected[offset]):#04x} belongs: {place}")
