"""Copies that are prepared once and run for many mappings, which is what a server's transfers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from kvkernels.layout.plan import Plan
from kvkernels.prepared.copy import PreparedCopy
from kvkernels.prepared.groups import PreparedGroups
from kvkernels.prepared.pools import BoundPools, bind
from kvkernels.prepared.slabs import SlabbedCopy

__all__ = ["BoundPools", "PreparedCopy", "PreparedGroups", "SlabbedCopy", "bind", "prepare"]

#: Bound pools, or pools that ``prepare`` binds.
Pools: TypeAlias = "BoundPools | Sequence[Tensor | Sequence[Tensor]]"


def prepare(
    src: Pools, dst: Pools, runs: Tensor | Plan | None = None, src_subblocks_per_block: int | None = None,
    dst_subblocks_per_block: int | None = None, *, skip_negative: bool = False, executor: str = "auto",
    sm_budget: int = 0,
) -> PreparedCopy | SlabbedCopy:  # fmt: skip
    """Check and bind everything of a copy but its mapping.

    Parameters
    ----------
    src, dst : BoundPools or sequence of Tensor
        The pools of each side, as in ``copy_pages``; a sequence is bound here, as ``bind`` takes it.
    runs : Tensor or Plan, optional
        Runs as ``copy_pages`` takes them, or a plan of ``kvkernels.layout.compile_plan``, whose pools these are. By
        default the whole page of each source pool goes to the destination pool of the same number.
    src_subblocks_per_block, dst_subblocks_per_block : int, optional
        As in ``copy_pages``; 1 by default, and the plan's own where ``runs`` is one.
    skip_negative, executor, sm_budget
        As in ``copy_pages``.

    Returns
    -------
    PreparedCopy or SlabbedCopy
        Its ``run(mapping)`` is ``copy_pages`` at the cost of the mapping alone. A SlabbedCopy where a side has slabs.

    Raises
    ------
    ValueError
        What ``copy_pages`` refuses whatever the mapping is, or pools that were unbound.

    Notes
    -----
    Host memory is looked up with CUDA at the first run that needs it and taken to stay as it is: ``unbind()`` the pools
    before it is unregistered, or unmapped.

    Examples
    --------
    >>> import torch, kvkernels
    >>> device, host = torch.arange(6).reshape(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    >>> offload = kvkernels.prepare([device], [host])
    >>> offload.run(torch.tensor([[2, 0], [0, 1]]))
    >>> host.tolist()
    [[4, 5], [0, 1], [0, 0]]
    """
    sides = [pools if isinstance(pools, BoundPools) else bind(pools) for pools in (src, dst)]
    if not all(side.is_bound for side in sides):
        raise ValueError("prepare: pools must be bound, got ones that were unbound")
    own = (runs.src_subblocks, runs.dst_subblocks) if isinstance(runs, Plan) else (1, 1)
    given = (src_subblocks_per_block, dst_subblocks_per_block)
    subblocks = tuple(of_plan if value is None else value for value, of_plan in zip(given, own, strict=True))
    kind = SlabbedCopy if any(len(side.slabs) > 1 for side in sides) else PreparedCopy
    return kind(sides[0], sides[1], runs, (subblocks[0], subblocks[1]), skip_negative, executor, sm_budget)
