"""Copies between pools of which some are several tensors: a mapping is cut where theirs begin."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvkernels.common.arguments import has_values
from kvkernels.explain import Explanation
from kvkernels.layout.plan import Plan
from kvkernels.layout.together import all_or_none
from kvkernels.prepared.copy import PreparedCopy
from kvkernels.prepared.groups import first_met, shared_sides
from kvkernels.prepared.pools import BoundPools
from kvkernels.reference.checks import Pool, check_ids
from kvkernels.reference.pairs import pairs_of_mapping

_OP = "PreparedCopy.run"


class SlabbedCopy:
    """A prepared copy of which a side has slabs: a run is checked as one, and is a call for each pair of slabs in it::

        mapping   | 0 -> 7 | 950 -> 8 | 1100 -> 2 |
        slabs     | src 0, dst 0      | src 1, dst 0: 100 -> 2 |

    ``run`` and ``release`` are as in ``PreparedCopy``, but mappings are on the CPU, with values. ``explain`` has one
    explanation a call.
    """

    def __init__(
        self, src: BoundPools, dst: BoundPools, runs: Tensor | Plan | None, subblocks: tuple[int, int],
        skip_negative: bool, executor: str, sm_budget: int,
    ) -> None:  # fmt: skip
        self._parts = [
            PreparedCopy(
                BoundPools([one]), BoundPools([other]), runs, subblocks, skip_negative, executor, sm_budget
            )
            for one in src.slabs for other in dst.slabs
        ]  # fmt: skip
        shared = shared_sides(self._parts, "prepare: slabs")
        self._shared = [(a, b) for a, b in shared if a[1] != b[1]]  # a destination is named once
        self._subblocks, self._skip_negative = subblocks, skip_negative
        self._src, self._dst = _whole("src", src), _whole("dst", dst)
        self._starts = (_starts(src, subblocks[0]), _starts(dst, subblocks[1]))
        self._limits = (self._src.blocks * subblocks[0], self._dst.blocks * subblocks[1])
        self._written = dst
        for pools in (src, dst):
            pools.add_user(self)

    def __reduce__(self) -> str:
        raise TypeError("SlabbedCopy cannot be pickled or copied: it stands for this process's memory; prepare anew")

    def run(self, mapping: Tensor, *, layer: int | None = None) -> None:
        """Copy what a mapping on the CPU names, as ``PreparedCopy.run`` does."""
        calls = [partial(copy.run, pairs, layer=layer) for copy, pairs in self._cut(mapping)]
        all_or_none(calls, has_values=True)

    def explain(self, mapping: Tensor, *, layer: int | None = None) -> list[Explanation]:
        """What ``run`` would come to with these arguments, call by call."""
        return [copy.explain(pairs, layer=layer) for copy, pairs in self._cut(mapping)]

    def written(self) -> tuple[Tensor, ...]:
        """The tensors that a run may write to."""
        return self._written.tensors

    def release(self) -> None:
        """Free what was prepared; running it is an error after that."""
        for copy in self._parts:
            copy.release()

    def _cut(self, mapping: Tensor) -> list[tuple[PreparedCopy, Tensor]]:
        """The parts that a mapping needs, each with its pairs, counted from the slabs' own starts."""
        ids = self._checked(mapping)
        slabs = [np.searchsorted(starts[1:], ids[:, i], side="right") for i, starts in enumerate(self._starts)]
        part_of = slabs[0] * len(self._starts[1]) + slabs[1]
        for i, starts in enumerate(self._starts):
            ids[:, i] -= starts[slabs[i]]
        mappings = [torch.from_numpy(ids[part_of == part]) for part in range(len(self._parts))]
        met = first_met(self._shared, mappings)
        if met is not None:
            raise ValueError(f"{_OP}: mapping must not write what it reads, got block {met[0]} of a slab both ways")
        return [(copy, pairs) for copy, pairs in zip(self._parts, mappings, strict=True) if len(pairs)]

    def _checked(self, mapping: Tensor) -> npt.NDArray[np.int64]:
        """The pairs to copy, each once."""
        check_ids(_OP, "mapping", mapping, 2, None)
        if not has_values(mapping):
            raise ValueError(f"{_OP}: mapping must have values where pools have slabs, got one that a tracer traces")
        ids = mapping.numpy().astype(np.int64)
        if self._skip_negative:
            ids = ids[(ids >= 0).all(axis=1)]
        is_inside = len(ids) == 0 or bool(ids.min() >= 0 and (ids < self._limits).all())
        if is_inside and len(np.unique(ids[:, 1])) == len(ids):
            return ids
        # Says what is wrong, or leaves pairs out that came before.
        return pairs_of_mapping(
            _OP, "mapping", mapping, [self._src], [self._dst], *self._subblocks, skip_negative=self._skip_negative
        ).numpy()


def _blocks(pools: BoundPools) -> list[int]:
    return [min(len(tensor) for tensor in slab) for slab in pools.slabs]


def _starts(pools: BoundPools, subblocks: int) -> npt.NDArray[np.int64]:
    """The first id of each slab."""
    return np.array([0, *accumulate(_blocks(pools))][:-1], dtype=np.int64) * subblocks


def _whole(name: str, pools: BoundPools) -> Pool:
    """A side's pools as one, for the checks of ids."""
    return Pool(f"{name}'s {len(pools.slabs)} slabs", pools.slabs[0][0], sum(_blocks(pools)), 0, 0)
