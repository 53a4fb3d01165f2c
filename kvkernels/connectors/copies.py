"""The prepared copies between an engine's pages and a host pool's, for all groups and both directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvkernels.layout.canonical import CanonicalKVCacheRef
from kvkernels.prepared import PreparedCopy, PreparedGroups, bind, prepare
from kvkernels.transfer import GroupsJob, Mover, PreparedJob, Transfer

#: For each group its (device block, host row) pairs, int64 ``[n, 2]``; None where it has none.
Mappings = list[npt.NDArray[np.int64] | None]


def pages_of(refs: Sequence[CanonicalKVCacheRef]) -> dict[int, int]:
    """Of each tensor that a group's layers are in, the bytes of a row that are theirs."""
    pages: dict[int, int] = {}
    for ref in refs:
        pages[ref.tensor_idx] = max(ref.page_size_bytes, pages.get(ref.tensor_idx, 0))
    return pages


class Copies:
    """What is prepared once: a copy for each group and direction, on pools that are bound.

    A load of a model with states is two transfers: attention's pages follow the states'.
    """

    def __init__(
        self, device: Sequence[Tensor], host: Sequence[Tensor], groups: Sequence[Sequence[CanonicalKVCacheRef]],
        states: Sequence[int] = (),
    ) -> None:  # fmt: skip
        # A stage of a pipeline may have no layer of a group.
        self._sides: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for group, refs in enumerate(groups):
            pages = pages_of(refs)
            if pages:
                self._sides[group] = _pages(device, pages), _pages(host, pages)
        self._bound = {group: (bind(engine), bind(pool)) for group, (engine, pool) in self._sides.items()}
        self._store = [_Part({group: _prepared(engine, pool) for group, (engine, pool) in self._bound.items()})]
        loads = {group: _prepared(pool, engine) for group, (engine, pool) in self._bound.items()}
        first = {group: copy for group, copy in loads.items() if group in states}
        rest = {group: copy for group, copy in loads.items() if group not in states}
        self._load = [_Part(part) for part in (first, rest) if part]

    def submit(
        self, mover: Mover, mappings: Mappings, is_store: bool, expedited: bool, transfers: list[Transfer]
    ) -> None:
        """Have a job carried out; its transfers are added to a list, also those of before an error."""
        priority = "store" if is_store else "expedited" if expedited else "load"
        for part in self._store if is_store else self._load:
            job = part.job(mappings, is_store)
            if job is not None:
                transfers.append(mover.submit(job, priority=priority, after=tuple(transfers)))

    def load_by_reference(self, mappings: Mappings) -> None:
        """Carry out a load here and now, by the executor that is plain torch; raises what it raises."""
        for part in self._load:
            for group in part.copies:
                mapping = mappings[group]
                if mapping is not None:
                    engine, pool = self._sides[group]
                    prepare(pool, engine, executor="reference").run(_reversed(mapping))

    def release(self) -> None:
        """Let go of the engine's pools."""
        for engine, pool in self._bound.values():
            engine.unbind()
            pool.unbind()
        self._sides = {}


class _Part:
    """Groups that one transfer copies."""

    def __init__(self, copies: dict[int, PreparedCopy]) -> None:
        self.copies = copies
        self._together = PreparedGroups(list(copies.values())) if len(copies) > 1 else None

    def job(self, mappings: Mappings, is_store: bool) -> PreparedJob | GroupsJob | None:
        used = {group: mapping for group in self.copies if (mapping := mappings[group]) is not None}
        own = {group: torch.from_numpy(mapping) if is_store else _reversed(mapping) for group, mapping in used.items()}
        if len(own) > 1 and self._together is not None:
            return GroupsJob(self._together, [own.get(group) for group in self.copies])
        return next((PreparedJob(self.copies[group], pairs) for group, pairs in own.items()), None)


def _pages(tensors: Sequence[Tensor], pages: dict[int, int]) -> list[Tensor]:
    return [tensors[index][:, :page_bytes] for index, page_bytes in pages.items()]


def _prepared(src: object, dst: object) -> PreparedCopy:
    copy = prepare(src, dst)  # type: ignore[arg-type]
    assert isinstance(copy, PreparedCopy)
    return copy


def _reversed(mapping: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(mapping[:, ::-1]))
