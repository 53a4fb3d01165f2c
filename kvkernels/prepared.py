"""Copies that are prepared once and run for many mappings, which is what a server's transfers are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvkernels import ops
from kvkernels.common.arguments import has_values, integer
from kvkernels.explain import Explanation, explain_call
from kvkernels.layout.blocks import whole_page_runs
from kvkernels.layout.plan import Plan

_private = torch.ops.kvkernels
_run = _private._run_prepared.default

#: Bound pools, or pools that ``prepare`` binds.
Pools: TypeAlias = "BoundPools | Sequence[Tensor]"


class BoundPools:
    """Pools that prepared copies keep using, from ``bind`` until ``unbind()``.

    The tensors are kept alive. ``tensors`` are the pools, in order.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        self._users: weakref.WeakSet[PreparedCopy] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"BoundPools({len(self.tensors)} pools)" if self.is_bound else "BoundPools(unbound)"

    def __reduce__(self) -> str:
        raise TypeError("BoundPools cannot be pickled or copied: it stands for this process's memory; bind anew")

    @property
    def is_bound(self) -> bool:
        """Whether ``unbind()`` has not been called."""
        return bool(self.tensors)

    def unbind(self) -> None:
        """Let go of the tensors, and of all that was prepared with them, which raises when it is run after that.

        For an engine that sleeps: memory that is unmapped and mapped again under the same addresses cannot be told from
        memory that stayed. Also before memory is unregistered with CUDA. The caller sees to it that the streams have
        passed the copies.
        """
        self.tensors = ()
        for user in list(self._users):
            user.release()


def bind(pools: Sequence[Tensor]) -> BoundPools:
    """Keep pools for prepared copies.

    Parameters
    ----------
    pools : sequence of Tensor
        At least one; dimension 0 is the block, as in ``copy_pages``.

    Returns
    -------
    BoundPools

    Raises
    ------
    ValueError
        No pools, or something that is no tensor with memory.

    Examples
    --------
    >>> import torch, kvkernels
    >>> kvkernels.bind([torch.zeros(4, 16), torch.zeros(4, 16)])
    BoundPools(2 pools)
    """
    tensors = list(pools) if isinstance(pools, Sequence) and not isinstance(pools, Tensor) else []
    if not tensors or not all(isinstance(pool, Tensor) for pool in tensors):
        raise ValueError(f"bind: pools must be a list of at least one Tensor, got {pools!r}")
    if not all(map(has_values, tensors)):
        raise ValueError("bind: pools must be tensors with memory, got one that a tracer stands behind")
    return BoundPools(tensors)


class PreparedCopy:
    """A copy between bound pools of which all but the mapping is checked and made; ``prepare`` makes one."""

    def __init__(
        self, src: BoundPools, dst: BoundPools, runs: Tensor | Plan | None, subblocks: tuple[int, int],
        skip_negative: bool, executor: str, sm_budget: int,
    ) -> None:  # fmt: skip
        self._src, self._dst = src, dst
        self._runs = runs
        self._rest = (*subblocks, skip_negative, executor, sm_budget)
        self._handles: dict[int | None, int] = {}
        self._is_released = False
        self._finalizer = weakref.finalize(self, _release_all, self._handles)
        self._prepare(None)
        for pools in (src, dst):
            pools._users.add(self)

    def __reduce__(self) -> str:
        raise TypeError("PreparedCopy cannot be pickled or copied: it stands for this process's memory; prepare anew")

    def run(self, mapping: Tensor, *, layer: int | None = None) -> None:
        """Copy what a mapping names.

        Parameters
        ----------
        mapping : Tensor
            int64 or int32 ``[n, 2]``, on the CPU or the pools' CUDA device: (source id, destination id).
        layer : int, optional
            Copy this layer alone: of a plan its layer, of whole pages the pool of that number.

        Raises
        ------
        IndexError
            An id on the CPU, or ``layer``, is out of range.
        ValueError
            The pools were unbound, resized, freed or moved; a destination requires a gradient where gradients are
            recorded; or what ``copy_pages`` refuses.
        RuntimeError
            CUDA failed; the message has CUDA's name for it, and the destination is undefined.

        Notes
        -----
        Everything that depends on the mapping is checked before anything moves. Streams, graph capture and ids on the
        device are as in ``copy_pages``. Safe to call from several threads. In a graph that is compiled it is a call of
        ``copy_pages``.
        """
        if layer is not None:
            layer = integer("PreparedCopy.run: layer", layer, "an integer from 0", least=0)
        if torch.compiler.is_compiling() or not has_values(mapping):
            self._check_is_bound()
            ops.copy_pages(self._src.tensors, self._dst.tensors, mapping, self._runs_of(layer), *self._rest)
            return
        handle = self._handles.get(layer)
        _run(self._prepare(layer) if handle is None else handle, mapping)

    def explain(self, mapping: Tensor, *, layer: int | None = None) -> Explanation:
        """What ``run`` would come to with these arguments: checked and lowered, and nothing moves."""
        return explain_call("PreparedCopy.run", lambda: self.run(mapping, layer=layer))

    def release(self) -> None:
        """Free what was prepared; running it is an error after that. Also called when it is no longer referenced."""
        self._is_released = True
        self._finalizer()

    def _check_is_bound(self) -> None:
        if not (self._src.is_bound and self._dst.is_bound and not self._is_released):
            raise ValueError("PreparedCopy.run: the pools must be bound, got ones that were unbound or released")

    def _prepare(self, layer: int | None) -> int:
        self._check_is_bound()
        handle = _private._prepare(self._src.tensors, self._dst.tensors, self._runs_of(layer), *self._rest)
        self._handles[layer] = handle
        return int(handle)

    def _runs_of(self, layer: int | None) -> Tensor:
        if isinstance(self._runs, Plan):
            return self._runs.runs.of(layer)
        if self._runs is None:
            rows = whole_page_runs(self._src.tensors)
            if layer is None:
                return rows
            if layer >= len(rows):
                raise IndexError(f"PreparedCopy.run: layer must be below {len(rows)}, got {layer}")
            return rows[layer : layer + 1]
        if layer is not None:
            raise ValueError("PreparedCopy.run: layer must be None where runs were given row by row, got a layer")
        return self._runs


def _release_all(handles: dict[int | None, int]) -> None:
    while handles:
        _private._release_prepared(handles.popitem()[1])


def prepare(
    src: Pools, dst: Pools, runs: Tensor | Plan | None = None, src_subblocks_per_block: int | None = None,
    dst_subblocks_per_block: int | None = None, *, skip_negative: bool = False, executor: str = "auto",
    sm_budget: int = 0,
) -> PreparedCopy:  # fmt: skip
    """Check and bind everything of a copy but its mapping.

    Parameters
    ----------
    src, dst : BoundPools or sequence of Tensor
        The pools of each side, as in ``copy_pages``; a sequence is bound here.
    runs : Tensor or Plan, optional
        Runs as ``copy_pages`` takes them, or a plan of ``kvkernels.layout.compile_plan``, whose pools these are. By
        default the whole page of each source pool goes to the destination pool of the same number.
    src_subblocks_per_block, dst_subblocks_per_block : int, optional
        As in ``copy_pages``; 1 by default, and the plan's own where ``runs`` is one.
    skip_negative, executor, sm_budget
        As in ``copy_pages``.

    Returns
    -------
    PreparedCopy
        Its ``run(mapping)`` is ``copy_pages`` at the cost of the mapping alone.

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
    return PreparedCopy(sides[0], sides[1], runs, (subblocks[0], subblocks[1]), skip_negative, executor, sm_budget)
