"""Hashes of blocks, each of which stands for all tokens up to its end."""

from __future__ import annotations

import hashlib
import importlib
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvkernels.common.arguments import integer

#: Token ids from 0 to 2^32 - 1.
Tokens: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor"

_TOKEN_BYTES = 4
_MOST = (1 << 32) - 1


def _xxh3_128() -> Callable[[bytes], bytes]:
    digest: Callable[[bytes], bytes] = _imported("xxhash").xxh3_128_digest
    return digest


def _blake3() -> Callable[[bytes], bytes]:
    blake3 = _imported("blake3").blake3
    return lambda data: blake3(data).digest()


def _sha256() -> Callable[[bytes], bytes]:
    sha256 = hashlib.sha256
    return lambda data: sha256(data).digest()


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"BlockHasher: {module} is not installed: pip install kvkernels[memory]") from error


ALGORITHMS = {"xxh3_128": _xxh3_128, "blake3": _blake3, "sha256": _sha256}


class BlockHasher:
    """Hashes the whole blocks of a prompt, one after another::

        root ─▶ H(root, tokens 0..15) ─▶ H(hash 0, tokens 16..31) ─▶ …     a tail shorter than a block has none
          ▲
         H(salt, block size)

    so that equal hashes mean equal prefixes, and another salt means other hashes.

    Parameters
    ----------
    block_size : int
        Tokens of a block.
    salt : bytes
        Keeps tenants, models or weights apart.
    algorithm : str
        ``xxh3_128``, which is fast and which whoever chooses the tokens can make collide; ``blake3`` or ``sha256``
        where tenants do not trust one another. The first two come with ``kvkernels[memory]``.

    Raises
    ------
    ValueError
        A size that is not positive, a salt that is no bytes, an unknown algorithm.

    Notes
    -----
    Hashes are the same in every process and on every little-endian machine. Safe to use from several threads.

    Examples
    --------
    >>> from kvkernels.memory import BlockHasher
    >>> hasher = BlockHasher(block_size=4, algorithm="sha256")
    >>> whole = hasher.hashes([1, 2, 3, 4, 5, 6, 7, 8, 9])
    >>> len(whole)
    2
    >>> whole == hasher.hashes([1, 2, 3, 4]) + hasher.hashes([5, 6, 7, 8], parent=whole[0])
    True
    """

    def __init__(self, block_size: int = 16, *, salt: bytes = b"", algorithm: str = "xxh3_128") -> None:
        self.block_size = integer("BlockHasher: block_size", block_size, "a positive integer", least=1)
        if not isinstance(salt, bytes):
            raise ValueError(f"BlockHasher: salt must be bytes, got {salt!r}")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"BlockHasher: algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        self.salt = salt
        self.algorithm = algorithm
        self._chunks = struct.Struct(f"{self.block_size * _TOKEN_BYTES}s")

    @cached_property
    def _digest(self) -> Callable[[bytes], bytes]:
        return ALGORITHMS[self.algorithm]()

    @cached_property
    def _root(self) -> bytes:
        return self._digest(struct.pack("<8sQ", b"kv block", self.block_size) + self.salt)

    def hashes(
        self, tokens: Tokens, *, parent: bytes | None = None, extra: Iterable[bytes | str | int] = ()
    ) -> list[bytes]:
        """Of each whole block.

        Parameters
        ----------
        tokens : sequence of int, numpy array or Tensor
            Token ids from 0 to 2^32 - 1; arrays have one dimension, tensors are on the CPU.
        parent : bytes, optional
            The hash of the block before the first, of this hasher; by default the tokens begin the prompt.
        extra : sequence of bytes, str and int
            What else these blocks depend on: a LoRA's id, an image's hash, a tenant. It goes into each block of the
            call, and through the chain into all that follow.

        Returns
        -------
        list of bytes
            16 bytes each (``xxh3_128``) or 32.

        Raises
        ------
        ValueError
            Tokens that are no such ids, a parent of another length, an extra of another type.
        ImportError
            The algorithm's package is not installed.
        """
        if parent is None:
            parent = self._root
        elif not isinstance(parent, bytes) or len(parent) != len(self._root):
            raise ValueError(f"BlockHasher.hashes: parent must be {len(self._root)} bytes, got {parent!r}")
        digest = self._digest
        data = _packed(tokens, len(tokens) // self.block_size * self.block_size)
        chunks = self._chunks.iter_unpack(data)
        suffix = b"".join(map(_encoded, _items(extra)))
        if suffix:
            return [parent := digest(parent + chunk + suffix) for (chunk,) in chunks]
        return [parent := digest(parent + chunk) for (chunk,) in chunks]


def _packed(tokens: Tokens, count: int) -> bytes:
    """The first ``count`` tokens, four bytes each."""
    if isinstance(tokens, Tensor):
        if tokens.device.type != "cpu":
            raise ValueError(f"BlockHasher.hashes: tokens must be on the CPU, got a tensor on {tokens.device}")
        tokens = tokens.numpy()
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"BlockHasher.hashes: tokens must be integers in one dimension, got {tokens.dtype} {list(tokens.shape)}"
            )
        tokens = tokens[:count]
        if tokens.dtype != np.uint32:
            if count and not 0 <= int(tokens.min()) <= int(tokens.max()) <= _MOST:
                raise ValueError(f"BlockHasher.hashes: tokens must be from 0 to {_MOST}, got {tokens!r}")
            tokens = tokens.astype(np.uint32)
        return tokens.tobytes()
    if isinstance(tokens, (str, bytes, bytearray, memoryview)):
        raise ValueError(f"BlockHasher.hashes: tokens must be integers, got {type(tokens).__name__}")
    try:
        return array("I", tokens[:count]).tobytes()
    except (OverflowError, TypeError) as error:
        raise ValueError(f"BlockHasher.hashes: tokens must be integers from 0 to {_MOST}, got {error}") from error


def _items(extra: Iterable[bytes | str | int]) -> Iterable[bytes | str | int]:
    if isinstance(extra, (str, bytes)):
        raise ValueError(f"BlockHasher.hashes: extra must be a sequence of items, got {extra!r} alone")
    return extra


def _encoded(item: bytes | str | int) -> bytes:
    """An item with its type and length, so that no two lists of items have the same bytes."""
    if isinstance(item, str):
        kind, data = b"s", item.encode()
    elif isinstance(item, bytes):
        kind, data = b"b", item
    elif isinstance(item, int) and not isinstance(item, bool):
        kind, data = b"i", str(item).encode()
    else:
        raise ValueError(f"BlockHasher.hashes: extra must be bytes, str and int, got {item!r}")
    return kind + struct.pack("<Q", len(data)) + data
