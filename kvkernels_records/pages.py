"""Digests of a pool's pages, to say later which of them were written in between."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvkernels_records.dtypes import Array
from kvkernels_records.errors import CaptureFileError
from kvkernels_records.files import save_arrays
from kvkernels_records.sources import Source

KIND = "page_digests"
DIGEST_BYTES = 16


def page_digests(pages: Array) -> Array:
    """A digest of each page.

    Parameters
    ----------
    pages : array
        ``(num_pages, page_bytes)`` uint8, rows perhaps apart.

    Returns
    -------
    array
        ``(num_pages, 16)`` uint8: BLAKE2b.

    Raises
    ------
    ValueError
        It is no such array.

    Examples
    --------
    >>> import numpy as np
    >>> pages = np.zeros((3, 64), np.uint8)
    >>> before = page_digests(pages)
    >>> pages[1, 5] = 7
    >>> (page_digests(pages) != before).any(axis=1).tolist()
    [False, True, False]
    """
    if pages.dtype != np.uint8 or pages.ndim != 2:
        raise ValueError(f"page_digests: pages must be (pages, bytes) of uint8, got {pages.dtype} {pages.shape}")
    found = np.empty((len(pages), DIGEST_BYTES), np.uint8)
    for page, digest in zip(pages, found, strict=True):
        digest[:] = np.frombuffer(
            hashlib.blake2b(np.ascontiguousarray(page).data, digest_size=DIGEST_BYTES).digest(), np.uint8
        )
    return found


def save_page_digests(pools: Mapping[str, Array], path: str | os.PathLike[str], **metadata: Any) -> Path:
    """Write the digests of several pools' pages as a file that ``check-kv`` compares.

    Parameters
    ----------
    pools : mapping of str to array
        As ``page_digests`` takes them.
    path : path-like
        ``.npz`` or ``.safetensors``.
    **metadata
        What JSON can say.
    """
    return save_arrays({name: page_digests(pages) for name, pages in pools.items()}, {**metadata, "kind": KIND}, path)


def is_digests(source: Source) -> bool:
    """Whether a source holds digests of pages."""
    return source.metadata.get("kind") == KIND


def written_pages(before: Source, after: Source) -> dict[str, list[int]]:
    """Which pages of each pool differ.

    Raises
    ------
    CaptureFileError
        The two are not of the same pools.
    """
    if sorted(before.names) != sorted(after.names) or not before.names:
        raise CaptureFileError(f"{before.label}, {after.label}: digests must be of the same pools")
    found = {}
    for name in before.names:
        a, b = np.asarray(before.rows(name)), np.asarray(after.rows(name))
        if a.shape != b.shape or a.ndim != 2:
            raise CaptureFileError(f"{before.label}, {after.label}: {name} must have as many pages in both")
        found[name] = np.flatnonzero((a != b).any(axis=1)).tolist()
    return found
