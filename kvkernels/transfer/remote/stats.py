"""What a pool has sent and received, and what came to nothing and why."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

FIELDS = (
    "sent_transfers", "sent_pages", "sent_bytes", "received_transfers", "received_pages", "received_bytes", "retried",
    "dropped_pages", "refused_segments",
)  # fmt: skip


class Stats:
    """Integers that one thread adds up and any reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(FIELDS, 0)
        self._failed: Counter[str] = Counter()
        self._links: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """To the fields of these names."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def failed(self, cause: str) -> None:
        """A transfer came to nothing."""
        with self._lock:
            self._failed[cause] += 1

    def link_failed(self, cause: str) -> None:
        """A connection was not made, or ended because of what the peer said."""
        with self._lock:
            self._links[cause] += 1

    def read(self) -> dict[str, Any]:
        """A copy."""
        with self._lock:
            return {**self._counts, "failed": dict(self._failed), "failed_links": dict(self._links)}
