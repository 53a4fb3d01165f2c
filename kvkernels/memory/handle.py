"""What a pool gives for tokens: the ids of blocks, and who uses them."""

from __future__ import annotations

import time
from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvkernels.common.arguments import dtype_text
from kvkernels.layout import KVLayout
from kvkernels.memory.errors import FreedHandleError


class Place(NamedTuple):
    """Where a pool's blocks lie, which all of its handles have in common."""

    block_size: int  #: tokens of a block
    layout: KVLayout | None
    device: str
    rank: int


class KVHandle:
    """Blocks of a pool; ``KVPool.alloc`` makes one.

    Attributes
    ----------
    handle_id : int
        Unique in its pool.
    request_id : str or None
        For whom it is.
    num_tokens : int
        As many as were asked for; the last block may have room for more.
    place : Place
        Tokens of a block, layout, device and rank.
    pin_count, ref_count : int
        How often it is pinned, and how many users it has; ``KVPool`` changes them. 0 users: it was freed.
    created_s, last_access_s : float
        Seconds since the epoch.
    prefix_hash : bytes or None
        Of its last whole block, if somebody has noted it.

    Notes
    -----
    A handle knows nothing of memory. Its ``block_ids`` are integers, valid in each process that has the pages.

    Examples
    --------
    >>> from kvkernels.memory import KVHandle, KVPool
    >>> handle = KVPool(max_tokens=1024).alloc(40, request_id="a")
    >>> handle.block_ids
    tensor([0, 1, 2])
    >>> copy = KVHandle.from_dict(handle.to_dict())
    >>> copy == handle, copy.num_tokens
    (True, 40)
    """

    __slots__ = (
        "_blocks",
        "_owner",
        "created_s",
        "handle_id",
        "last_access_s",
        "num_tokens",
        "pin_count",
        "place",
        "prefix_hash",
        "ref_count",
        "request_id",
    )

    def __init__(
        self, handle_id: int, request_id: str | None, num_tokens: int, place: Place, blocks: array[int], owner: object,
    ) -> None:  # fmt: skip
        self.handle_id = handle_id
        self.request_id = request_id
        self.num_tokens = num_tokens
        self.place = place
        self.pin_count = 0
        self.ref_count = 1
        self.created_s = self.last_access_s = time.time()
        self.prefix_hash: bytes | None = None
        self._blocks = blocks
        self._owner = owner

    @property
    def block_ids(self) -> Tensor:
        """int64 ids of the blocks on the CPU, a copy, as the ops take them; FreedHandleError once it was freed."""
        return torch.from_numpy(self.block_array)

    @property
    def block_array(self) -> npt.NDArray[np.int64]:
        """The same as a numpy array."""
        if self.is_freed:
            raise FreedHandleError(f"KVHandle.block_ids: the handle must not be freed, got {self!r}")
        return np.array(self._blocks, dtype=np.int64)

    @property
    def num_blocks(self) -> int:
        """How many it holds."""
        return len(self._blocks)

    @property
    def held_tokens(self) -> int:
        """Tokens that its blocks have room for."""
        return len(self._blocks) * self.place.block_size

    @property
    def state(self) -> str:
        """``allocated``, ``pinned`` or ``freed``."""
        return "freed" if self.is_freed else "pinned" if self.pin_count else "allocated"

    @property
    def is_freed(self) -> bool:
        """Whether its blocks are the pool's again."""
        return self.ref_count == 0

    @property
    def layout(self) -> KVLayout | None:
        """That of the pages, where the pool has one."""
        return self.place.layout

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the layout's elements."""
        return self.place.layout.dtype if self.place.layout else None

    @property
    def device(self) -> str:
        """Where the pages are."""
        return self.place.device

    @property
    def tier(self) -> str:
        """``host`` or ``device``."""
        return "host" if self.place.device == "cpu" else "device"

    @property
    def rank(self) -> int:
        """Whose pages they are."""
        return self.place.rank

    def touch(self) -> None:
        """Note that it was used now."""
        self.last_access_s = time.time()

    def to_dict(self) -> dict[str, Any]:
        """All of it in words that JSON and msgpack know, but for ``prefix_hash``, which is text in hex."""
        return {
            "handle_id": self.handle_id,
            "request_id": self.request_id,
            "num_tokens": self.num_tokens,
            "block_size": self.place.block_size,
            "block_ids": self._blocks.tolist(),
            "dtype": dtype_text(self.dtype) if self.dtype else None,
            "layout": self.place.layout.text if self.place.layout else None,
            "device": self.place.device,
            "tier": self.tier,
            "rank": self.place.rank,
            "state": self.state,
            "pin_count": self.pin_count,
            "ref_count": self.ref_count,
            "created_s": self.created_s,
            "last_access_s": self.last_access_s,
            "prefix_hash": self.prefix_hash.hex() if self.prefix_hash is not None else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KVHandle:
        """The handle that ``to_dict`` told of, equal to it; of no pool, so that none frees it."""
        layout = KVLayout.from_text(values["layout"]) if values["layout"] is not None else None
        place = Place(values["block_size"], layout, values["device"], values["rank"])
        blocks = array("q", values["block_ids"])
        handle = cls(values["handle_id"], values["request_id"], values["num_tokens"], place, blocks, None)
        for name in ("pin_count", "ref_count", "created_s", "last_access_s"):
            setattr(handle, name, values[name])
        handle.prefix_hash = bytes.fromhex(values["prefix_hash"]) if values["prefix_hash"] is not None else None
        return handle

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, KVHandle) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # its counts change

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is pickled, is of no pool: two that free the same blocks must not be."""
        return KVHandle.from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"KVHandle({self.handle_id}, {self.num_tokens} tokens in {self.num_blocks} blocks, {self.state})"
