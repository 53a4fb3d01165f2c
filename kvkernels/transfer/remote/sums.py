"""XXH3 sums of pages that lie one after another. They find bytes that changed by accident; a forger can match them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

try:
    import xxhash
except ImportError as error:
    raise ImportError("kvkernels.transfer.remote: xxhash must be installed: pip install kvkernels[remote]") from error

from kvkernels.transfer.remote.messages import SUM_BYTES


def sums_of(pages: Tensor) -> bytes:
    """XXH3-64 of each row of contiguous uint8 ``[n, page_bytes]``, big-endian, one after another."""
    memory = np.ascontiguousarray(pages.numpy()).data.cast("B")
    digest, width = xxhash.xxh3_64_digest, pages.shape[1]
    return b"".join([digest(memory[at : at + width]) for at in range(0, len(memory), width)])


def first_difference(ours: bytes, theirs: bytes) -> int | None:
    """Which page's sums differ first; None where all are the same."""
    if ours == theirs:
        return None
    kind = np.dtype(f"S{SUM_BYTES}")
    pairs = zip(range(len(ours) // SUM_BYTES), np.frombuffer(ours, kind), np.frombuffer(theirs, kind), strict=False)
    return next((i for i, one, other in pairs if one != other), 0)
