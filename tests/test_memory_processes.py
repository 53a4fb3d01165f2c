"""A scheduler keeps the books in one process, and a worker has the pages in another; only integers cross."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvkernels.memory import KVHandle, KVPool, PrefixCache, SchedulerBridge

MAX_TOKENS, BLOCK_SIZE, PAGE_BYTES = 1000, 16, 64

WORKER = """
import json, sys
import torch, kvkernels
from kvkernels.memory import KVHandle, PinnedPool, num_blocks

max_tokens, block_size, page_bytes = map(int, sys.argv[1:])
host = PinnedPool(num_blocks(max_tokens, block_size), page_bytes)
device = torch.zeros(8, page_bytes, dtype=torch.uint8)  # stands for the engine's cache
print(json.dumps(len(host.pages)), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    ids = torch.tensor(job["ids"]) if "ids" in job else KVHandle.from_dict(job["handle"]).block_ids
    mine = torch.arange(len(ids))
    if job["do"] == "store":
        device.copy_(torch.tensor(job["fill"], dtype=torch.uint8))
        kvkernels.swap_blocks(device, host.pages, page_bytes, torch.stack([mine, ids], 1))
    else:
        device.zero_()
        kvkernels.swap_blocks(host.pages, device, page_bytes, torch.stack([ids, mine], 1))
    print(json.dumps(device[: len(ids)].to(torch.int64).sum().item()), flush=True)
host.close()
"""


@pytest.fixture
def worker():
    command = [sys.executable, "-c", WORKER, *map(str, (MAX_TOKENS, BLOCK_SIZE, PAGE_BYTES))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(**job):
        if job:
            print(json.dumps(job), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_ids_cross_as_integers(worker):
    pool, cache = KVPool(MAX_TOKENS, BLOCK_SIZE), PrefixCache(BLOCK_SIZE, hash="sha256")
    bridge = SchedulerBridge(pool, cache)
    assert worker() == pool.num_blocks == 62
    assert pool.pools == ()

    hashes = cache.compute_block_hashes(range(48))
    bridge.allocate(bridge.plan("before", 100))  # so that the ids are not the first
    ids = bridge.allocate(bridge.plan("a", 48, hashes)).tolist()
    assert worker(do="store", ids=ids, fill=7) == 3 * PAGE_BYTES * 7
    bridge.free("a")
    other = pool.alloc(32)
    assert worker(do="store", handle=other.to_dict(), fill=1) == 2 * PAGE_BYTES

    plan = bridge.plan("b", 64, hashes)
    assert plan.reused == tuple(ids) and plan.reused_tokens == 48
    bridge.allocate(plan)
    assert worker(do="load", ids=list(plan.reused)) == 3 * PAGE_BYTES * 7
    assert worker(do="load", handle=KVHandle.from_dict(other.to_dict()).to_dict()) == 2 * PAGE_BYTES
