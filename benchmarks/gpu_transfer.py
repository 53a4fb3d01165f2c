"""The copies of whole pages that the parts of a GPU run time: pools on one side, pools or long rows on the other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import kvkernels
from contest import whole_page_runs, words
from geometry import Geometry, Moves, random_moves
from gpu_memory import Case

# Distinct pages that the calls of one case go round, so that small calls do not find theirs in a cache.
SPREAD_BYTES = 256 << 20
MOST_SETS = 8


def pools_of(fragments: int) -> int:
    """As many pools as a model has layers, where there are fragments enough: pools are what a call costs its caller."""
    return next(pools for pools in (40, 8, 2, 1) if fragments >= 8 * pools or pools == 1)


@dataclass(frozen=True)
class Transfer:
    """``fragments`` pages of ``fragment_bytes`` a call, in several calls that share no page.

    Attributes
    ----------
    direction : str
        ``h2d``, ``d2h`` or ``d2d``.
    host_form : str
        ``pools``, or ``rows``: then the host's side is a buffer with all pools' pages of a block in one long row.
    ids : str
        ``random``, or ``contiguous``: block i goes to block i.
    spread_bytes : int
        What the pages of either side are spread over, at least.
    most_sets : int
        How many calls there are at most.
    """

    direction: str
    fragment_bytes: int
    fragments: int
    pools: int
    host_form: str = "pools"
    ids: str = "random"
    spread_bytes: int = SPREAD_BYTES
    most_sets: int = MOST_SETS

    @property
    def pairs(self) -> int:
        return max(1, self.fragments // self.pools)

    @property
    def payload_bytes(self) -> int:
        return self.pairs * self.pools * self.fragment_bytes

    @property
    def sets(self) -> int:
        return max(1, min(self.most_sets, self.spread_bytes // self.payload_bytes))

    @cached_property
    def geometry(self) -> Geometry:
        moved = self.sets * self.pairs
        # A sixteenth of the blocks is named by no pair, so that the check sees a write to a wrong block.
        spread = self.spread_bytes // (self.pools * self.fragment_bytes)
        return Geometry(self.pools, max(moved + moved // 16 + 1, spread), self.fragment_bytes, moved)

    @cached_property
    def moves(self) -> Moves:
        if self.ids == "contiguous":
            return Moves(torch.arange(self.geometry.moved), torch.arange(self.geometry.moved))
        return random_moves(self.geometry)

    @property
    def forms(self) -> tuple[str, str]:
        """The form of the source and that of the destination."""
        if self.host_form == "pools":
            return "pools", "pools"
        return ("rows", "pools") if self.direction == "h2d" else ("pools", "rows")

    @property
    def op(self) -> str:
        return {"pools,pools": "copy_pages", "rows,pools": "scatter_blocks", "pools,rows": "gather_blocks"}[
            ",".join(self.forms)
        ]

    def key(self) -> dict[str, Any]:
        return {
            "direction": self.direction,
            "fragment_bytes": self.fragment_bytes,
            "host_form": self.host_form,
            "ids": self.ids,
        }

    def set_of(self, number: int) -> Moves:
        part = slice(number * self.pairs, (number + 1) * self.pairs)
        return Moves(self.moves.src[part], self.moves.dst[part])

    def case(self, src: torch.Tensor, dst: torch.Tensor, executor: str, sm_budget: int = 0) -> Case:
        """The op's call for each set."""
        function = getattr(kvkernels, self.op)
        chosen = {"executor": executor, "sm_budget": sm_budget}
        arguments = [self._arguments(number, src, dst) for number in range(self.sets)]

        def bind(given: tuple[Any, ...]) -> Callable[[], Any]:
            return lambda: function(*given, **chosen)

        return self.other_case(
            src,
            dst,
            [bind(given) for given in arguments],
            explain=lambda: kvkernels.explain(self.op, *arguments[0], **chosen),
        )

    def other_case(self, src: torch.Tensor, dst: torch.Tensor, calls: list[Callable[[], Any]], **more: Any) -> Case:
        """The same pages moved by other calls, one a set."""
        where = self.geometry.where if self.forms[1] == "pools" else lambda offset: f"byte {offset} of the rows"
        return Case(src, dst, self.geometry.flat_bytes, calls, self.payload_bytes, self._expect, where, **more)

    def _arguments(self, number: int, src: torch.Tensor, dst: torch.Tensor) -> tuple[Any, ...]:
        moves, geometry = self.set_of(number), self.geometry
        rows = slice(number * self.pairs, (number + 1) * self.pairs)
        if self.op == "gather_blocks":
            return geometry.form(src, "pools"), moves.src, geometry.buffer(dst)[rows]
        if self.op == "scatter_blocks":
            return geometry.buffer(src)[rows], moves.dst, geometry.form(dst, "pools")
        return geometry.form(src, "pools"), geometry.form(dst, "pools"), moves.mapping, whole_page_runs(geometry)

    def _expect(self, truth: torch.Tensor, expected: torch.Tensor) -> None:
        src_form, dst_form = self.forms
        src_ids, dst_ids = (
            self.moves.ids(form, side).to(truth.device) for form, side in ((src_form, "src"), (dst_form, "dst"))
        )
        sources, targets = self.geometry.form(truth, src_form), self.geometry.form(expected, dst_form)
        for source, target in zip(words(sources), words(targets), strict=True):
            target[dst_ids] = source[src_ids]
