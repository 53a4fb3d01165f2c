"""Several prepared copies, a mapping each, as one transfer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvkernels.common.arguments import has_values
from kvkernels.explain import Explanation
from kvkernels.layout.together import all_or_none
from kvkernels.prepared.copy import PreparedCopy

#: A side of a group: its number, and 0 for its sources or 1 for its destinations.
Side: TypeAlias = tuple[int, int]


class PreparedGroups:
    """The prepared copies of several groups, which one transfer runs together.

    Parameters
    ----------
    copies : sequence of PreparedCopy
        A group each. Groups may share pools, as the layers of a hybrid model do: then whole pools, with as many
        sub-blocks.

    Raises
    ------
    ValueError
        No copies, or pools of two groups that are not the same and share bytes which one of the groups writes.

    Examples
    --------
    Two groups keep their layers in one pool, in other blocks:

    >>> import torch, kvkernels
    >>> pool, host = torch.arange(8).reshape(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    >>> groups = kvkernels.PreparedGroups([kvkernels.prepare([pool], [host]) for _ in range(2)])
    >>> groups.run([torch.tensor([[3, 0]]), torch.tensor([[1, 2]])])
    >>> host.tolist()
    [[6, 7], [0, 0], [2, 3], [0, 0]]
    """

    def __init__(self, copies: Sequence[PreparedCopy]) -> None:
        if not copies or not all(isinstance(one, PreparedCopy) for one in copies):
            raise ValueError(f"PreparedGroups: copies must be a list of at least one PreparedCopy, got {copies!r}")
        self._copies = tuple(copies)
        self._shared = shared_sides(self._copies, "PreparedGroups: pools of two groups")

    def __len__(self) -> int:
        return len(self._copies)

    def run(self, mappings: Sequence[Tensor | None]) -> None:
        """Copy what the mappings name.

        Parameters
        ----------
        mappings : sequence of Tensor or None
            One for each group, as ``PreparedCopy.run`` takes it; None copies nothing of the group.

        Raises
        ------
        IndexError, ValueError, RuntimeError
            As ``PreparedCopy.run``. Also a ValueError where groups that share a pool name one block of it of which one
            of them writes, or have their ids on a device.

        Notes
        -----
        All mappings on the CPU are checked before the first group is copied. Streams and graph capture are as in
        ``PreparedCopy.run``.
        """
        calls = self._calls(mappings)
        self._check_apart(mappings)
        all_or_none(calls, has_values=all(one is None or has_values(one) for one in mappings))

    def explain(self, mappings: Sequence[Tensor | None]) -> list[Explanation]:
        """What ``run`` would come to, group by group, of those with a mapping."""
        self._calls(mappings)
        self._check_apart(mappings)
        used = zip(self._copies, mappings, strict=True)
        return [copy.explain(mapping) for copy, mapping in used if mapping is not None]

    def written(self) -> tuple[Tensor, ...]:
        """The tensors that a run may write to."""
        return tuple(tensor for copy in self._copies for tensor in copy.written())

    def release(self) -> None:
        """Free what was prepared for every group."""
        for copy in self._copies:
            copy.release()

    def _calls(self, mappings: Sequence[Tensor | None]) -> list[Callable[[], None]]:
        if len(mappings) != len(self._copies):
            raise ValueError(f"PreparedGroups.run: mappings must be {len(self._copies)}, got {len(mappings)}")
        used = zip(self._copies, mappings, strict=True)
        return [partial(copy.run, mapping) for copy, mapping in used if mapping is not None]

    def _check_apart(self, mappings: Sequence[Tensor | None]) -> None:
        for group, _ in itertools.chain(*self._shared):
            one = mappings[group]
            if isinstance(one, Tensor) and (one.device.type != "cpu" or not has_values(one)):
                raise ValueError(
                    "PreparedGroups.run: mappings of groups that share a pool must be on the cpu, with values, got "
                    f"another in group {group}"
                )
        met = first_met(self._shared, mappings)
        if met is not None:
            block, a, b = met
            raise ValueError(
                "PreparedGroups.run: mappings of groups that share a pool must name other blocks of it where one "
                f"writes, got {block} in group {a[0]} and in group {b[0]}"
            )


def first_met(shared: Sequence[tuple[Side, Side]], mappings: Sequence[Tensor | None]) -> tuple[int, Side, Side] | None:
    """An id that both of two sides name which share a pool, and the two."""
    ids = {side: _ids_of(mappings, side) for side in set(itertools.chain(*shared))}
    for a, b in shared:
        both = np.intersect1d(ids[a], ids[b])
        both = both[both >= 0]  # a copy skips or refuses the others by itself
        if len(both):
            return int(both[0]), a, b
    return None


def _ids_of(mappings: Sequence[Tensor | None], side: Side) -> npt.NDArray[np.int64]:
    mapping = mappings[side[0]]
    if mapping is None or mapping.dim() != 2 or mapping.shape[1] != 2:  # the copy refuses it
        return np.empty(0, np.int64)
    return mapping[:, side[1]].numpy().astype(np.int64, copy=False)


class _Rows(NamedTuple):
    """A pool: rows of ``page_bytes``, ``stride`` bytes apart."""

    begin: int
    end: int
    stride: int
    page_bytes: int
    subblocks: int
    side: Side

    @classmethod
    def of(cls, pool: Tensor, subblocks: int, side: Side) -> _Rows:
        page_bytes = pool[0].numel() * pool.element_size()
        stride = pool.stride(0) * pool.element_size() if len(pool) > 1 else page_bytes
        begin = pool.data_ptr()
        return cls(begin, begin + (len(pool) - 1) * stride + page_bytes, stride, page_bytes, subblocks, side)

    def is_same(self, other: _Rows) -> bool:
        """Whether equal ids are the same bytes, and other ids are other bytes."""
        return (self.begin, self.stride, self.subblocks) == (other.begin, other.stride, other.subblocks)

    def shares_bytes(self, other: _Rows) -> bool:
        """Of two whose spans meet, exact where their rows are equally far apart."""
        if self.stride != other.stride:
            return True
        after = (other.begin - self.begin) % self.stride
        return after < self.page_bytes or self.stride - after < other.page_bytes


def shared_sides(copies: Sequence[PreparedCopy], what: str) -> list[tuple[Side, Side]]:
    """Sides of two copies that have a pool in common which one of them writes; ValueError about ``what`` for others."""
    rows = [
        _Rows.of(pool, subblocks, (group, side))
        for group, copy in enumerate(copies)
        for side, (bound, subblocks) in enumerate(copy.sides())
        for pool in bound.tensors if pool.numel()
    ]  # fmt: skip
    rows.sort()
    shared: set[tuple[Side, Side]] = set()
    open_rows: list[_Rows] = []
    for here in rows:
        open_rows = [one for one in open_rows if one.end > here.begin]
        for one in open_rows:
            if one.side[0] == here.side[0] or not (one.side[1] or here.side[1]) or not one.shares_bytes(here):
                continue
            if not one.is_same(here):
                raise ValueError(f"{what} must be the same or share no bytes, got some that share a part")
            shared.add((min(one.side, here.side), max(one.side, here.side)))
        open_rows.append(here)
    return sorted(shared)
