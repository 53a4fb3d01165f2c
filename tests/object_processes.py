"""What test_objects.py runs in another process, which finds it by this module's name."""

from __future__ import annotations

from multiprocessing.queues import Queue
from typing import Any

import torch

from kvkernels import KVCache, convert_blocks


def fill(inbox: Queue[Any], outbox: Queue[Any]) -> None:
    """Writes to a cache that came by the one queue, and sends the size of a plan by the other."""
    cache, plan = inbox.get()
    src = KVCache(cache.layout, [torch.full_like(tensor, 3.0) for tensor in cache.tensors])
    convert_blocks(src, cache, torch.tensor([[1, 1]]))
    outbox.put(plan.bytes)
    inbox.get()  # its tensors are in shared memory that lives as long as it does
