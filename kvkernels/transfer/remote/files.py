"""Pages in files, by the same plans and sums as between machines: whole, checked, or a miss.

::

    | magic | bytes of the header u32 | header | its XXH3 | sums of all pages | their XXH3 | pages of part 0 | of 1 | …
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
import xxhash
from torch import Tensor

from kvkernels.layout.cache import KVCache
from kvkernels.transfer.remote.claims import checked_blocks
from kvkernels.transfer.remote.errors import ChecksumError, LengthError, PlanError, ProtocolError
from kvkernels.transfer.remote.messages import SUM_BYTES
from kvkernels.transfer.remote.wire import Conversion, Part, as_cache, check_sums, layout_of_text, pack, parts_of

_MAGIC = b"kvpages\n"
_LENGTH = struct.Struct(">I")
_VERSION = 1
_PART_BYTES = 1 << 26
_LEFTOVER_S = 3600.0


class _Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    layout: str
    pages: int
    part_bytes: int


class FileTier:
    """Keeps blocks of a cache in files, one a key, and reads them into a cache of the same or of another layout.

    Parameters
    ----------
    folder : path
        Is made where it is not there.
    pools : KVCache or sequence of Tensor
        As `RemotePool` takes them.

    Raises
    ------
    ValueError
        As `RemotePool` does for its pools.
    OSError
        The folder cannot be made.

    Notes
    -----
    A file is written under another name, synced, and renamed: readers see all of it or none, also after a crash of the
    machine, which may leave an unnamed rest that is removed an hour later. Sums find what decays, not what is forged.
    Safe to use from several threads and processes.

    Examples
    --------
    >>> import tempfile, torch
    >>> from kvkernels.transfer.remote import FileTier
    >>> pool = torch.arange(8, dtype=torch.uint8).view(4, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tier = FileTier(folder, [pool])
    ...     tier.store(b"hash of a prefix", [1, 3])
    ...     tier.load(b"hash of a prefix", [0, 2]), tier.load(b"another", [0, 2])
    (True, False)
    >>> pool.tolist()
    [[2, 3], [2, 3], [6, 7], [6, 7]]
    """

    def __init__(self, folder: str | os.PathLike[str], pools: KVCache | Sequence[Tensor]) -> None:
        self._cache = as_cache(pools)
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        for rest in self._folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - rest.stat().st_mtime > _LEFTOVER_S:
                    rest.unlink()

    def store(self, key: bytes, block_ids: Tensor | Sequence[int]) -> None:
        """Write blocks, in place of what the key had.

        Raises
        ------
        ValueError
            The key is not 1 to 64 bytes, or the ids are none.
        IndexError
            A block id is out of range.
        OSError
            The file cannot be written; what the key had is there.
        """
        path, blocks = self._path("store", key), self._blocks("store", block_ids)
        layout, pools = self._cache.layout, self._cache.pools
        parts = parts_of(layout, _PART_BYTES)
        packed = [torch.empty(len(blocks), part.page_bytes, dtype=torch.uint8) for part in parts]
        sums = b"".join(pack(pools, part, blocks, pages) for part, pages in zip(parts, packed, strict=True))
        header = msgspec.msgpack.encode(_Header(_VERSION, layout.text, len(blocks), _PART_BYTES))
        head = _MAGIC + _LENGTH.pack(len(header)) + header
        temporary = self._folder / f"{secrets.token_hex(16)}.tmp"
        try:
            with temporary.open("xb") as file:
                for said in (head, sums):
                    file.write(said + xxhash.xxh3_64_digest(said))
                for pages in packed:
                    file.write(pages.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._count("stored")

    def load(self, key: bytes, block_ids: Tensor | Sequence[int]) -> bool:
        """Read a key's pages into blocks, all or none of them.

        Returns
        -------
        bool
            False where there is no such key, or where its file is damaged, of another version, of as many pages or of
            a cache that this one's cannot be made of: nothing was written then, and ``stats()`` counts which.

        Raises
        ------
        ValueError, IndexError
            As `store` does, and for a block that is named twice.
        """
        path, blocks = self._path("load", key), self._blocks("load", block_ids)
        if len(blocks.unique()) != len(blocks):
            raise ValueError("FileTier.load: block_ids must be different ones, got one of them twice")
        try:
            with path.open("rb") as file:
                conversion, packed = self._read(file, len(blocks))
        except FileNotFoundError:
            self._count("missed")
            return False
        except (ChecksumError, LengthError, PlanError, ProtocolError) as error:
            self._count(f"refused_{error.cause}")
            return False
        for part, pages in enumerate(packed):
            conversion.unpack(part, pages, blocks, self._cache.pools)
        self._count("loaded")
        return True

    def remove(self, key: bytes) -> bool:
        """Forget a key; whether it was there."""
        try:
            self._path("remove", key).unlink()
        except FileNotFoundError:
            return False
        return True

    def stats(self) -> dict[str, int]:
        """Files ``stored`` and ``loaded``, keys ``missed``, and files that were refused, by cause."""
        with self._lock:
            return dict(self._counts)

    def _read(self, file: BinaryIO, count: int) -> tuple[Conversion, list[Tensor]]:
        """Everything is checked before anything is returned."""
        start = file.read(len(_MAGIC) + _LENGTH.size)
        if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
            raise ProtocolError("FileTier: a file must begin as one does")
        body = file.read(min(_LENGTH.unpack(start[len(_MAGIC) :])[0], 1 << 20))
        _check_sum(file, start + body)
        try:
            header = msgspec.msgpack.decode(body, type=_Header)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ProtocolError(f"FileTier: a file must have a header, got {error}") from None
        if header.version != _VERSION:
            raise ProtocolError(f"FileTier: a file must be of version {_VERSION}, got {header.version}")
        if header.pages != count:
            raise LengthError(f"FileTier: a file must have {count} pages, got {header.pages}")
        conversion = Conversion(layout_of_text(header.layout), self._cache.layout, header.part_bytes)
        sums = file.read(len(conversion.parts) * count * SUM_BYTES)
        _check_sum(file, sums)
        packed = [self._read_part(file, part, count) for part in conversion.parts]
        if file.read(1):
            raise LengthError("FileTier: a file must end with its pages")
        for index, pages in enumerate(packed):
            check_sums(pages, sums[index * count * SUM_BYTES : (index + 1) * count * SUM_BYTES])
        return conversion, packed

    def _read_part(self, file: BinaryIO, part: Part, count: int) -> Tensor:
        pages = torch.empty(count, part.page_bytes, dtype=torch.uint8)
        if file.readinto(pages.numpy().data) != pages.numel():  # type: ignore[attr-defined]
            raise LengthError("FileTier: a file must have all its pages")
        return pages

    def _path(self, op: str, key: bytes) -> Path:
        if not isinstance(key, bytes) or not 1 <= len(key) <= 64:
            raise ValueError(f"FileTier.{op}: key must be 1 to 64 bytes, got {key!r}")
        return self._folder / f"{key.hex()}.kv"

    def _blocks(self, op: str, block_ids: Tensor | Sequence[int]) -> Tensor:
        return checked_blocks(f"FileTier.{op}", block_ids, self._cache.num_blocks)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def _check_sum(file: BinaryIO, said: bytes) -> None:
    if file.read(SUM_BYTES) != xxhash.xxh3_64_digest(said):
        raise ChecksumError("FileTier: what comes before a file's pages must have its sum")
