"""A copy between bound pools of which all but the mapping is checked and made."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from kvkernels import ops
from kvkernels.common.arguments import has_values, integer
from kvkernels.explain import Explanation, explain_call
from kvkernels.layout.blocks import whole_page_runs
from kvkernels.layout.plan import Plan
from kvkernels.prepared.pools import BoundPools

_private = torch.ops.kvkernels
_run = _private._run_prepared.default


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
            pools.add_user(self)

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

    def sides(self) -> tuple[tuple[BoundPools, int], tuple[BoundPools, int]]:
        """The sources and the destinations, and the sub-blocks of a block of each."""
        return (self._src, self._rest[0]), (self._dst, self._rest[1])

    def written(self) -> tuple[Tensor, ...]:
        """The tensors that a run writes to; none where they were unbound."""
        return self._dst.tensors

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
