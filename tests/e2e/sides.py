"""The parts that only vLLM can be asked about, without an engine: policies, metadata, the manager, what is refused."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvkernels.connectors.books import HostBooks
from kvkernels.connectors.vllm_manager import FAILED_LOADS, FAILED_STORES, HostManager
from kvkernels.connectors.vllm_sides import HostWorkerMetadata
from kvkernels.memory.eviction.make import POLICIES

MODULE = "kvkernels.connectors.vllm_policies"


def keys_of(numbers: Any) -> list[bytes]:
    return [make_offload_key(b"%032d" % number, 0) for number in numbers]


def policies(broken: bool) -> Iterator[str]:
    """vLLM's manager with each of our policies: nothing protected, being stored or being loaded is evicted."""
    # vLLM has policies of its own under two of the names.
    for name in [*(POLICIES.keys() - {"lru", "arc"}), *(policy.__name__ for policy in POLICIES.values())]:
        manager = CPUOffloadingManager(8, name, MODULE)
        if broken:
            manager._policy.mark_non_evictable = lambda key: None
            manager._policy._policy.victims = lambda n, protected=(), p=manager._policy: list(p._chunks)[:n]
        draw, stored, loading = random.Random(1), set(), []
        for step in range(400):
            context = ReqContext(req_id=str(step))
            manager.on_new_request(context)
            keys = keys_of(draw.sample(range(24), draw.randrange(1, 4)))
            before = {key for key in stored if manager.lookup(key, context) == LookupResult.HIT}
            prepared = manager.prepare_store(keys, context)
            busy = {key for keys in loading for key in keys}
            if prepared is not None:
                wrong = set(prepared.evicted_keys) & (set(keys) | busy)
                if wrong:
                    yield f"policies: {name} evicted what was protected or in use"
                    return
                stored = stored - set(prepared.evicted_keys) | set(prepared.keys_to_store)
                manager.complete_store(prepared.keys_to_store, context)
            elif any(manager.lookup(key, context) != LookupResult.HIT for key in before):
                yield f"policies: {name} changed something though it evicted nothing"
            hits = [key for key in keys if manager.lookup(key, context) == LookupResult.HIT]
            if hits and draw.random() < 0.5 and len(loading) < 3:
                manager.prepare_load(hits, context)
                loading.append(hits)
            elif loading:
                manager.complete_load(loading.pop(0), context)
            manager.on_request_finished(context)
        if len(stored) > 8:
            yield f"policies: {name} holds {len(stored)} of 8 chunks"


def metadata(broken: bool) -> Iterator[str]:
    """Of two ranks: a job that failed on one has failed; counts are added."""
    one, two = HostWorkerMetadata(), HostWorkerMetadata()
    for rank in (one, two):
        rank.mark_completed(3)
    two.mark_completed(4)
    two.failed_jobs.add(3)
    merged = OffloadingWorkerMetadata.aggregate(one, two) if broken else one.aggregate(two)
    if getattr(merged, "failed_jobs", None) != {3} or merged.completed_jobs != {3: 2, 4: 1}:
        yield f"metadata: {merged}"


def manager(broken: bool) -> Iterator[str]:
    """A chunk leaves before what it stands behind, found by the places that vLLM notes in a request."""
    manager = HostManager(HostBooks(4), {} if broken else {0: 32}, enable_events=True)
    context = ReqContext(req_id="a")
    *keys, other = keys_of(range(5))
    for number, key in enumerate(keys):
        context.set_offload_key_position(key, 32 * (number + 1))
    for part in (keys[:2], keys[2:]):
        prepared = manager.prepare_store(part, context)
        if manager.lookup(part[0], context) != LookupResult.HIT_PENDING:
            yield "manager: what is being stored is not pending"
        manager.complete_store(set(prepared.keys_to_store), context)
    for key in keys:
        manager.prepare_load([key], context)
        manager.complete_load([key], context)
    evicted = manager.prepare_store([other], context).evicted_keys
    manager.complete_store([other], context, success=False)
    # The first is the one that was used least recently.
    if evicted != keys[3:]:
        yield f"manager: {[keys.index(key) for key in evicted]} left first"
        return
    manager.prepare_load(keys[:1], context)
    manager.fail(keys[:1], is_store=False)
    if any(manager.lookup(key, context) != LookupResult.MISS for key in (*keys[:3], other)):
        yield "manager: what stands behind a failed chunk is still there"
    manager.complete_load(keys[:1], context)
    counts = manager.get_stats().data["data"]
    if (counts.get(FAILED_LOADS), counts.get(FAILED_STORES)) != ({(): 1}, {(): 1}):
        yield f"manager: failures were counted as {counts}"
    removed = {key for event in manager.take_events() if event.removed for key in event.keys}
    if removed != set(keys):
        yield "manager: no event tells of all that was removed"


def versions(broken: bool) -> Iterator[str]:
    """A version that is not supported is one sentence at import."""
    for version in ("0.31.0", "0.34.1")[: 1 if broken else 2]:
        program = (
            "import sys, types\n"
            "sys.modules['vllm'] = types.ModuleType('vllm')\n"
            f"sys.modules['vllm'].__version__ = {'0.32.0' if broken else version!r}\n"
            "try:\n    import kvkernels.connectors.vllm\n"
            "except ImportError as error:\n    sys.exit(0 if str(error) == sys.argv[1] else str(error))\n"
            "sys.exit('it was taken')\n"
        )
        wanted = f"kvkernels.connectors.vllm supports vLLM 0.32 and 0.33, got {version}"
        done = subprocess.run([sys.executable, "-c", program, wanted], capture_output=True, text=True)
        if done.returncode:
            yield f"versions: {version}: {done.stderr.splitlines()[-1:]}"


def refusals(broken: bool) -> Iterator[str]:
    """What makes no sense in the extra config."""
    spec_class = importlib.import_module("kvkernels.connectors.vllm").KVKernelsOffloadingSpec
    good = {"cpu_bytes_to_use": 1 << 20}
    for change, text in (
        ({"cpu_bytes_to_use": None}, "must have cpu_bytes_to_use"),
        ({"cpu_bytes_to_use": 100}, "must hold a chunk of 8192 bytes, got 100"),
        ({"verify": "yes"}, "verify must be true or false, got 'yes'"),
        ({"eviction_policy": "mru"}, "got 'mru'"),
    ):
        extra = {key: value for key, value in {**good, **({} if broken else change)}.items() if value is not None}
        config = SimpleNamespace(
            extra_config=extra, enable_kv_cache_events=False, groups=(), worker_kv_bytes_per_block=4096,
            replicated_layout=False, cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=2),
            parallel=SimpleNamespace(rank=0, world_size=1), engine_id="x",
        )  # fmt: skip
        try:
            spec_class(config).get_manager()
        except ValueError as error:
            if text not in str(error):
                yield f"refusals: {change}: {error}"
        else:
            yield f"refusals: {change} was taken"


PARTS: tuple[Callable[[bool], Iterator[str]], ...] = (policies, metadata, manager, versions, refusals)


def run() -> dict[str, Any]:
    findings = [finding for part in PARTS for finding in part(False)]
    # Each part must be able to fail.
    findings += [f"{part.__name__}: its seeded defect was not found" for part in PARTS if not list(part(True))]
    return {"findings": findings}
