"""What else the connector promises: resets with a fence, sleep, states, capacity. Each with a defect that is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group
from vllm.v1.kv_cache_interface import MambaSpec

from engine import NEW_TOKENS, POISON, Engine
from failures import Log
from roundtrip import random_prompt

Findings = list[str]


def reset(model: Path, defect: str | None) -> Findings:
    """A reset while copies are under way: nothing is readable at once, and no chunk is given out that one writes."""
    engine = Engine(model, "KVKernelsConnector")
    books, host, findings = engine.manager.books, engine.worker.host_worker, []
    if defect == "no_fence":
        books.reset = lambda: (engine.manager.books._free(p.chunk for p in books._pending.values()),
                               books._pending.clear(), books._cache.reset())  # fmt: skip
    prompt, other = random_prompt(engine, 300, 1), random_prompt(engine, 400, 2)
    engine.finish_stores()
    expected = engine.generate([prompt], [NEW_TOKENS])[0].tokens
    engine.finish_stores()
    engine.forget(host_too=True)
    engine.finish_stores()
    with host._mover.held():
        engine.generate([prompt], [NEW_TOKENS])
        engine.finish_stores()
        writing = {int(row) // engine.blocks_per_chunk for job in host._jobs.values() for pairs in job.mappings
                   if pairs is not None for row in pairs[:, 1]}  # fmt: skip
        keys = list(books._pending)
        if not engine.llm.reset_prefix_cache(reset_connector=True):
            findings.append("reset: it was refused")
        given = books.reserve([b"x%d" % i for i in range(books.stats()["free"])], [None] * books.stats()["free"])
        if not writing or any(books.state(key) != "missing" for key in keys):
            findings.append(f"reset: {len(writing)} chunks were being written, and something is readable after it")
        if writing & set(given.chunks):
            findings.append(
                f"fence: chunks {sorted(writing & set(given.chunks))} were given out while they are written"
            )
        books.fail(given.keys)
        books.commit(given.keys)
    for _ in range(3):
        engine.generate([other], [1])
        engine.finish_stores()
    stats = books.stats()
    if books.is_draining or stats["cached"] + stats["free"] != stats["chunks"]:
        findings.append(f"fence: it has not been passed: {stats}")
    for _ in range(2):
        got = engine.generate([prompt], [NEW_TOKENS])[0].tokens
        if got != expected:
            findings.append(f"tokens: {got} after the reset instead of {expected}")
        engine.finish_stores()
    return findings


def sleep(model: Path, defect: str | None) -> Findings:
    """The engine's pools go away and come back, with the hooks of vLLM 0.33 and without them."""
    engine = Engine(model, "KVKernelsConnector")
    findings: Findings = []
    connector, log = get_kv_transfer_group(), Log()
    if defect == "not_bound_again":
        connector.restore_kv_caches = lambda: None
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in engine.device}

    def go_and_come_back(more: int = 0) -> None:
        for storage in storages.values():
            size = storage.nbytes()
            storage.resize_(0)
            storage.resize_(size + more)
        for pages in engine.device:
            pages.fill_(POISON)

    prompt = random_prompt(engine, 300, 1)
    expected = engine.generate([prompt], [NEW_TOKENS])[0]
    engine.finish_stores()
    engine.finish_stores()
    connector.unregister_kv_caches()
    go_and_come_back()
    engine.llm.reset_prefix_cache()
    connector.restore_kv_caches()
    connector.restore_kv_caches()
    warm = engine.generate([prompt], [NEW_TOKENS])[0]
    if warm.tokens != expected.tokens or not warm.cached_tokens:
        findings.append(f"sleep: {warm.cached_tokens} tokens came back, {warm.tokens} instead of {expected.tokens}")
    if log.failures:
        findings.append(f"sleep: {log.failures}")
    # Without the hooks: the next job fails with a sentence, and its request is computed again.
    engine.finish_stores()
    go_and_come_back(more=4096)  # memory that comes back where it was cannot be told from memory that stayed
    engine.llm.reset_prefix_cache()
    cold = engine.generate([prompt], [NEW_TOKENS])[0]
    if cold.tokens != expected.tokens:
        findings.append(f"sleep: without hooks {cold.tokens} instead of {expected.tokens}")
    if not defect and not any("resized" in message or "moved" in message for message in log.failures):
        findings.append(f"sleep: without hooks no job failed with a sentence, got {log.failures}")
    return findings


def states(model: Path, defect: str | None) -> Findings:
    """A hybrid model: every group is told of, states come before attention, and without them nothing is loaded."""
    engine = Engine(model, "KVKernelsConnector")
    findings: Findings = []
    connector, books, host = engine.scheduler.connector, engine.manager.books, engine.worker.host_worker
    groups = [group for group, spec in enumerate(engine.groups) if isinstance(spec, MambaSpec)]
    if tuple(groups) != host._states or not groups:
        findings.append(f"states: groups {groups} have states, the worker knows of {host._states}")
    if defect == "attention_first":
        host._copies._load.reverse()
    ended, order, tables, stored = [], [], [], []
    finished, submit, submit_store = connector.request_finished_all_groups, host._mover.submit, host.submit_store

    def watch_finished(request: Any, block_ids: Any) -> Any:
        ended.append(len(block_ids))
        tables.append([list(block_ids[engine.group_ids[group]]) for group in groups])
        return finished(request, block_ids)

    def watch_store(job_id: int, device_ids: Any, chunk_ids: Any, sizes: Any, firsts: Any) -> None:
        ends = [sum(sizes[: group + 1]) for group in range(len(sizes))]
        stored.extend(int(block) for group in groups for block in device_ids[ends[group] - sizes[group] : ends[group]])
        submit_store(job_id, device_ids, chunk_ids, sizes, firsts)

    def watch_submit(job: Any, *, priority: str, after: Any) -> Any:
        transfer = submit(job, priority=priority, after=after)
        if priority == "load":
            tensors = {t.data_ptr() for t in job.written()}
            is_state = tensors <= {t.data_ptr() for g in groups for t in host._copies._sides[g][0]}
            order.append((is_state, tuple(one.ticket for one in after), transfer.ticket))
        return transfer

    connector.request_finished_all_groups, host._mover.submit = watch_finished, watch_submit
    host.submit_store = watch_store
    tokens = engine.chunk_tokens * 3 + 8
    prompt = random_prompt(engine, tokens, 1)
    cold = engine.generate([prompt], [NEW_TOKENS])[0]
    engine.finish_stores()
    engine.finish_stores()
    engine.forget()
    warm = engine.generate([prompt], [NEW_TOKENS])[0]
    if warm.cached_tokens != engine.chunk_tokens * 3 or warm.tokens != cold.tokens:
        findings.append(f"states: {warm.cached_tokens} tokens came back, {warm.tokens} instead of {cold.tokens}")
    # A state's table is null but for its last blocks; a prompt below a block has none that could be stored.
    if not any(0 in table[:-1] for table in tables[0]) or not stored or 0 in stored:
        findings.append(f"null: of tables {tables[0]} blocks {stored} were stored")
    if set(ended) != {len(engine.scheduler.kv_cache_config.kv_cache_groups)}:
        findings.append(f"groups: request_finished_all_groups was called with {ended} groups")
    first, second = order[:2] if len(order) >= 2 else ((False, (), 0), (True, (), 0))
    # Groups share tensors in this model: what counts is which transfer waits for which, and what it moves.
    if second[1] != (first[2],) or host._copies._load[0].copies.keys() != set(groups):
        findings.append(f"order: loads were submitted as {order}")
    engine.finish_stores()
    engine.forget()
    keys = [key for key in books._cache._chains.entries if int.from_bytes(key[-4:], "big") in
            [engine.group_ids[group] for group in groups]]  # fmt: skip
    if defect != "states_stay":
        books.fail(keys)
    again = engine.generate([prompt], [NEW_TOKENS])[0]
    if again.cached_tokens or again.tokens != cold.tokens:
        findings.append(f"missing: {again.cached_tokens} tokens came back without their states")
    return findings


def capacity(model: Path, defect: str | None) -> Findings:
    """The pool's bytes: at most what was given, less than one chunk unused, and evictions when it is full."""
    given = 3_000_000
    engine = Engine(model, "KVKernelsConnector", host_bytes=given, blocks_per_chunk=3, extra={"verify": True})
    findings: Findings = []
    pages, stats = engine.worker.host_worker._pool.pages, engine.manager.books.stats()
    chunk_bytes = pages.stride(0) * 3
    used = pages.shape[0] * pages.stride(0) + (chunk_bytes if defect == "one_chunk_too_many" else 0)
    if not given - chunk_bytes < used <= given or stats["chunks"] * 3 != len(pages):
        findings.append(f"bytes: the pool has {used} of {given}, in chunks of {chunk_bytes}")
    for seed in range(4):
        engine.generate([random_prompt(engine, engine.longest_prompt - 8, seed)], [1])
        engine.finish_stores()
    if not engine.manager.books.stats()["evicted"]:
        findings.append("eviction: nothing left a pool that is too small")
    return findings


# What each is of, its model, and what a defect must be found by.
PROMISES: dict[Callable[[Path, str | None], Findings], tuple[str, dict[str, str]]] = {
    reset: ("llama-fp32", {"no_fence": "fence"}),
    sleep: ("llama-fp32", {"not_bound_again": "sleep"}),
    states: ("qwen3-next", {"attention_first": "order", "states_stay": "missing"}),
    capacity: ("llama-fp32", {"one_chunk_too_many": "bytes"}),
}
BY_NAME = {promise.__name__: promise for promise in PROMISES}


def run(model: Path, name: str, defect: str | None) -> dict[str, Any]:
    return {"findings": BY_NAME[name](model, defect)}
