"""Statistics of accesses that are made up, for trying the pictures. They say so: ``made_up`` is true."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvkernels_records.access import AccessStatsCollector

_BLOCKS = 2000
_SECONDS = 600.0
_START_S = 1_700_000_000.0


def demo_stats(num_accesses: int, seed: int = 0) -> dict[str, Any]:
    """As ``AccessStatsCollector.export_stats``, of ten minutes in which popular blocks change once.

    Raises
    ------
    ValueError
        ``num_accesses`` is below 1.

    Examples
    --------
    >>> demo_stats(500)["total_accesses"], demo_stats(500)["made_up"]
    (500, True)
    """
    if num_accesses < 1:
        raise ValueError(f"kv-stats demo: --num-accesses must be at least 1, got {num_accesses}")
    draw = np.random.default_rng(seed)
    times = np.sort(draw.uniform(0.0, _SECONDS, num_accesses)) + _START_S
    weights = 1.0 / np.arange(1, _BLOCKS + 1) ** 1.1
    popular = draw.choice(_BLOCKS, num_accesses, p=weights / weights.sum())
    later = times > _START_S + _SECONDS / 2
    blocks = np.where(later, (popular + _BLOCKS // 3) % _BLOCKS, popular)
    now = iter(times.tolist())
    last = _START_S + _SECONDS
    stats = AccessStatsCollector(clock=lambda: next(now, last))
    seen: set[int] = set()
    for block in blocks.tolist():
        stats.record_access(block, is_hit=block in seen)
        seen.add(block)
    return {**stats.export_stats(), "made_up": True}
