"""Prepared copies where no library was built: the same handles, over the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from kvkernels.reference.ops import PreparedCopy

_copies: dict[int, PreparedCopy] = {}
_handles = itertools.count(1)


def prepare(
    src: Sequence[Tensor], dst: Sequence[Tensor], runs: Tensor, src_subblocks_per_block: int,
    dst_subblocks_per_block: int, skip_negative: bool, executor: str, sm_budget: int,
) -> int:  # fmt: skip
    copy = PreparedCopy(
        src, dst, runs, src_subblocks_per_block, dst_subblocks_per_block, skip_negative, executor, sm_budget
    )
    handle = next(_handles)
    _copies[handle] = copy
    return handle


def run_prepared(prepared: int, mapping: Tensor) -> None:
    if prepared not in _copies:
        raise ValueError("PreparedCopy.run: the copy must be prepared, got a released handle")
    _copies[prepared].run(mapping)


def release_prepared(prepared: int) -> None:
    _copies.pop(prepared, None)
