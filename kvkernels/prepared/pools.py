"""Pools that prepared copies keep using."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvkernels.common.arguments import has_values


class _User(Protocol):
    def release(self) -> None: ...


class BoundPools:
    """Pools that prepared copies keep using, from ``bind`` until ``unbind()``.

    The tensors are kept alive. ``slabs[s][p]`` is tensor ``s`` of pool ``p``: the only one, but where a pool's blocks
    are in several::

        pool 0   | slab 0: blocks 0 to 999 |   | slab 1: blocks 1000 to 1499 |
        pool 1   | slab 0                  |   | slab 1                      |
    """

    def __init__(self, slabs: Sequence[Sequence[Tensor]]) -> None:
        self.slabs: tuple[tuple[Tensor, ...], ...] = tuple(map(tuple, slabs))
        self._users: weakref.WeakSet[_User] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.slabs[0]) if self.slabs else 0

    def __repr__(self) -> str:
        if not self.is_bound:
            return "BoundPools(unbound)"
        slabs = f" of {len(self.slabs)} slabs" if len(self.slabs) > 1 else ""
        return f"BoundPools({len(self)} pools{slabs})"

    def __reduce__(self) -> str:
        raise TypeError("BoundPools cannot be pickled or copied: it stands for this process's memory; bind anew")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: the pools in order, slab after slab."""
        return tuple(itertools.chain(*self.slabs))

    @property
    def is_bound(self) -> bool:
        """Whether ``unbind()`` has not been called."""
        return bool(self.slabs)

    def unbind(self) -> None:
        """Let go of the tensors, and of all that was prepared with them, which raises when it is run after that.

        For an engine that sleeps: memory that is unmapped and mapped again under the same addresses cannot be told from
        memory that stayed. Also before memory is unregistered with CUDA. The caller sees to it that the streams have
        passed the copies.
        """
        self.slabs = ()
        for user in list(self._users):
            user.release()

    def add_user(self, user: _User) -> None:
        """Have ``unbind()`` release what was prepared, which is not kept alive."""
        self._users.add(user)


def bind(pools: Sequence[Tensor | Sequence[Tensor]]) -> BoundPools:
    """Keep pools for prepared copies.

    Parameters
    ----------
    pools : sequence of Tensor, or of sequences of Tensor
        At least one; dimension 0 is the block, as in ``copy_pages``. A pool whose blocks are in several tensors, such
        as buffers that were registered one by one, is a sequence of them: the second's first block follows the
        first's last. Then all pools are, and have as many blocks in each.

    Returns
    -------
    BoundPools

    Raises
    ------
    ValueError
        No pools, something that is no tensor with memory, or pools that are cut into other slabs.

    Examples
    --------
    >>> import torch, kvkernels
    >>> kvkernels.bind([torch.zeros(4, 16), torch.zeros(4, 16)])
    BoundPools(2 pools)
    >>> kvkernels.bind([[torch.zeros(4, 16), torch.zeros(9, 16)]])
    BoundPools(1 pools of 2 slabs)
    """
    given = list(pools) if isinstance(pools, Sequence) and not isinstance(pools, Tensor) else []
    lists = [[pool] if isinstance(pool, Tensor) else pool for pool in given]
    if not lists or not all(isinstance(one, Sequence) and one and _are_tensors(one) for one in lists):
        raise ValueError(f"bind: pools must be a list of at least one Tensor or list of Tensors, got {pools!r}")
    if not all(map(has_values, itertools.chain(*lists))):
        raise ValueError("bind: pools must be tensors with memory, got one that a tracer stands behind")
    if any(len(one) > 1 for one in lists):
        cuts = [[len(tensor) if tensor.dim() else 0 for tensor in one] for one in lists]
        if any(cut != cuts[0] for cut in cuts):
            raise ValueError(f"bind: pools must have as many blocks in each slab as the first, got {cuts}")
    return BoundPools(list(zip(*lists, strict=True)))


def _are_tensors(tensors: Sequence[Tensor]) -> bool:
    return all(isinstance(tensor, Tensor) for tensor in tensors)
