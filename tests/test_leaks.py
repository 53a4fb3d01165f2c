"""No op leaves memory behind: a server calls them millions of times a day."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvkernels.registration import LIBRARY, schemas

MOST_BYTES_A_CALL = 2
# Some allocators take memory once in a while that they then keep using.
WARM_UP = 10_000

EXPLAINED = [f"explain {op}" for op in schemas.PUBLIC]
OTHERS = [
    "gather_blocks, refused",
    "gather_blocks, reference",
    "split_tp_shards, reference",
    "copy_pages, triton refused",
    "info and counters",
]
PREPARED = ["PreparedCopy.run", "PreparedCopy.run of a layer", "PreparedCopy.run, refused"]
TOGETHER = ["PreparedGroups.run", "PreparedGroups.run, refused", "SlabbedCopy.run"]
MEMORY = ["KVPool.alloc and free", "PrefixCache, full", "PrefixCache, reserved", "SchedulerBridge"]
TRANSFERS = ["Mover.submit and wait", "Mover.submit and poll", "Mover.submit, refused", "Mover.submit and cancel"]
PREPARING = ["prepare and release", "copy_pages of new pools"]
CONVERSIONS = ["convert_blocks", "copy_slots of two chunks", "copy_groups of two groups"]


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def calls():
    """What is measured, by name."""
    import contextlib

    import torch
    from test_info import small_calls

    import kvkernels

    ops = torch.ops.kvkernels
    small = {op: args for op, (args, _) in small_calls().items()}
    found = {op: lambda op=op: getattr(ops, op)(*small[op]) for op in schemas.PUBLIC}
    found |= {f"explain {op}": lambda op=op: kvkernels.explain(op, *small[op]) for op in schemas.PUBLIC}
    pools, ids, out = small["gather_blocks"]
    wrong = torch.tensor([1, 99])

    def refused() -> None:
        with contextlib.suppress(IndexError):
            ops.gather_blocks(pools, wrong, out)

    def triton_refused() -> None:
        with contextlib.suppress(ValueError):
            ops.copy_pages(*small["copy_pages"], executor="triton")

    def info_and_counters() -> None:
        ops._build_info()
        ops._counters()
        ops._check_device(0)
        ops._reset_counters()

    found |= conversions()
    found |= prepared_copies()
    found |= copies_together()
    found |= host_memory()
    found |= transfers()
    found["gather_blocks, refused"] = refused
    found["gather_blocks, reference"] = lambda: ops.gather_blocks(pools, ids, out, executor="reference")
    found["split_tp_shards, reference"] = lambda: ops.split_tp_shards(*small["split_tp_shards"], executor="reference")
    found["copy_pages, triton refused"] = triton_refused
    found["info and counters"] = info_and_counters
    return found, small


def prepared_copies():
    """With pools enough for what is bound to be kept between calls."""
    import contextlib

    import torch

    from kvkernels import copy_pages, prepare, whole_page_runs

    src, dst = ([torch.zeros(4, 16, dtype=torch.uint8) for _ in range(8)] for _ in range(2))
    prepared, pair, wrong = prepare(src, dst), torch.tensor([[0, 1]]), torch.tensor([[0, 9]])
    runs = whole_page_runs(src)

    def refused() -> None:
        with contextlib.suppress(IndexError):
            prepared.run(wrong)

    def prepare_and_release() -> None:
        prepare(src, dst).run(pair, layer=1)

    def new_pools() -> None:
        copy_pages([pool.clone() for pool in src], dst, pair, runs)

    return {
        "PreparedCopy.run": lambda: prepared.run(pair),
        "PreparedCopy.run of a layer": lambda: prepared.run(pair, layer=3),
        "PreparedCopy.run, refused": refused,
        "prepare and release": prepare_and_release,
        "copy_pages of new pools": new_pools,
    }


def copies_together():
    """Groups that share pools, and pools of two slabs."""
    import contextlib

    import torch

    from kvkernels import PreparedGroups, prepare

    src, dst = ([torch.zeros(4, 16, dtype=torch.uint8) for _ in range(8)] for _ in range(2))
    groups = PreparedGroups([prepare(src, dst) for _ in range(2)])
    slabbed = prepare([list(pool.split(2)) for pool in src], dst)
    one, other = torch.tensor([[0, 1]]), torch.tensor([[0, 1], [3, 2]])

    def refused() -> None:
        with contextlib.suppress(ValueError):
            groups.run([one, other])

    return {
        "PreparedGroups.run": lambda: groups.run([one, other[1:]]),
        "PreparedGroups.run, refused": refused,
        "SlabbedCopy.run": lambda: slabbed.run(other),
    }


def host_memory():
    """Caches that are full, so that each block that comes has another leave; every call brings hashes of its own."""
    import itertools

    from kvkernels.memory import KVPool, PrefixCache, SchedulerBridge

    pool, numbers = KVPool(1024), itertools.count()
    caches = {policy: PrefixCache(16, 64, policy=policy) for policy in ("lru", "arc", "s3fifo", "chain")}
    reserved = PrefixCache(16, 64)
    bridge = SchedulerBridge(KVPool(1024), PrefixCache(16))

    def fill() -> None:
        number = next(numbers)
        for cache in caches.values():
            key = number.to_bytes(16, "little")
            cache.insert([key], [number])
            cache.lookup([key], hold=True)
            cache.release([key])

    def reserve() -> None:
        number = next(numbers)
        reserved.reserve([number.to_bytes(16, "little")]).commit([number])
        reserved.reserve([b"never"]).abort()

    def schedule() -> None:
        number = next(numbers)
        hashes = [number.to_bytes(16, "little"), (number + 1).to_bytes(17, "little")]
        bridge.allocate(bridge.plan("request", 40, hashes))
        bridge.free("request")

    return {
        "KVPool.alloc and free": lambda: pool.free(pool.alloc(40)),
        "PrefixCache, full": fill,
        "PrefixCache, reserved": reserve,
        "SchedulerBridge": schedule,
    }


def transfers():
    """By a mover, which lives as long as the process."""
    import contextlib

    import torch

    if not LIBRARY.compiled:
        return {}
    from kvkernels import prepare
    from kvkernels.transfer import Mover, PreparedJob, SwapJob

    src, dst = ([torch.zeros(4, 16, dtype=torch.uint8) for _ in range(8)] for _ in range(2))
    mover, pair = Mover(lanes=1, chunk_bytes=16), torch.tensor([[0, 1]])
    pages = torch.zeros(2, 1 << 15, 16, dtype=torch.uint8)
    every = torch.arange(1 << 15).repeat(2, 1).T
    mover.submit(SwapJob(pages[0], pages[1], 16, every)).wait()  # the trace has then all that it keeps
    job, other = PreparedJob(prepare(src, dst), pair), SwapJob(src[0], dst[0], 16, pair)
    wrong = SwapJob(src[0], dst[0], 16, torch.tensor([[0, 9]]))

    def submit_and_poll() -> None:
        mover.submit(other, priority="store")
        while not mover.poll():
            pass

    def refused() -> None:
        with contextlib.suppress(IndexError):
            mover.submit(wrong)

    def cancel() -> None:
        one = mover.submit(job)
        one.cancel()
        one.wait()

    return {
        "Mover.submit and wait": lambda: mover.submit(job).wait(),
        "Mover.submit and poll": submit_and_poll,
        "Mover.submit, refused": refused,
        "Mover.submit and cancel": cancel,
    }


def conversions():
    """What is built on the ops; several chunks or groups are checked before the first is copied."""
    import torch

    from kvkernels import KVCache, KVLayout, convert_blocks, copy_slots
    from kvkernels.layout import canonicalize, copy_groups, empty_host_caches
    from kvkernels.layout.specs import MLA, KVCacheGroup

    sizes = {"L": 1, "B": 4, "N": 2, "H": 2, "D": 8, "dtype": torch.uint8}
    src = KVCache(KVLayout("L | B N H D", **sizes), [torch.zeros(128, dtype=torch.uint8)])
    dst = KVCache(KVLayout("B L H N D", **sizes), torch.zeros(128, dtype=torch.uint8))
    chunks, slots = [torch.zeros(1, 2, 16, dtype=torch.uint8) for _ in range(2)], torch.tensor([7, 1, 0, 4])
    groups = [KVCacheGroup([name], MLA(block_size=1, head_size=8, dtype=torch.uint8)) for name in "ab"]
    engine = canonicalize({name: torch.zeros(4, 1, 8, dtype=torch.uint8) for name in "ab"}, groups)
    host, pair, ids = empty_host_caches(engine, 4), torch.tensor([[0, 1]]), torch.tensor([1, 2])
    return {
        "convert_blocks": lambda: convert_blocks(src, dst, pair),
        "copy_slots of two chunks": lambda: copy_slots(src, slots, chunks, direction="to_buffer"),
        "copy_groups of two groups": lambda: copy_groups(engine, host, ids, ids, [1, 1]),
    }


def report(names: list[str], count: int) -> None:
    """Prints how many resident bytes each call leaves, by name."""
    found, _kept = calls()
    grown = {}
    for name in names:
        for _ in range(WARM_UP):
            found[name]()
        before = resident_bytes()
        for _ in range(count):
            found[name]()
        grown[name] = (resident_bytes() - before) / count
    print(json.dumps(grown))


@pytest.mark.skipif(not LIBRARY.compiled, reason="what leaks is the boundary to compiled code")
@pytest.mark.parametrize(
    ("names", "count"),
    [
        (list(schemas.PUBLIC), 100_000),
        (EXPLAINED, 20_000),
        (OTHERS, 20_000),
        (CONVERSIONS, 20_000),
        (PREPARED, 100_000),
        (PREPARING, 20_000),
        (TOGETHER, 20_000),
        (MEMORY, 20_000),
        (TRANSFERS, 20_000),
    ],
    ids=["ops", "explained", "others", "conversions", "prepared", "preparing", "together", "memory", "transfers"],
)
def test_calls_leave_nothing_behind(names, count):
    # In a process of its own, whose heap nothing else has used.
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_leaks; "
    script += f"test_leaks.report({names!r}, {count})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert list(grown) == names
    assert {name: bytes for name, bytes in grown.items() if bytes >= MOST_BYTES_A_CALL} == {}
