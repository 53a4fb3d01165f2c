"""Copies that fail, chunks that spoil, pools that are full: what becomes of two hundred requests.

Every few loads and stores something is made to go wrong, while requests are aborted and preempted. The engine must
live, and each request that was neither aborted nor failed must have the tokens that it has without a connector.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from engine import Engine
from stress import DEVICE_BLOCKS, HOST_BLOCKS, token_bytes

REQUESTS = 200
EVERY = 4
MOST_STEPS = 2500
# What goes wrong; "fail" is "op" under the policy by which the request fails instead of being computed again.
MODES = ("op", "full", "check", "fail", "expedited")


def requests() -> list[tuple[list[int], int, int | None]]:
    """Prompt, length of the answer, and the step after which the request is aborted, for one in nine."""
    draw = random.Random(7)
    prefixes = [[draw.randrange(3, 500) for _ in range(draw.randrange(70, 240))] for _ in range(12)]
    return [
        (
            draw.choice(prefixes) + [draw.randrange(3, 500) for _ in range(draw.randrange(10, 60))],
            draw.choice([1, 12, 24]),
            draw.randrange(0, 12) if number % 9 == 8 else None,
        )
        for number in range(REQUESTS)
    ]


class Log(logging.Handler):
    """Messages of the connector's that say that something failed."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []
        logging.getLogger("kvkernels.connectors").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "failed" in record.getMessage():
            self.failures.append(record.getMessage())


def inject(engine: Engine, mode: str) -> dict[str, int]:
    """Makes every few loads and stores fail; returns how many have."""
    host, books = engine.worker.host_worker, engine.manager.books
    injected = {"store": 0, "load": 0, "full": 0}
    calls = {"store": 0, "load": 0, "full": 0}

    def is_due(what: str) -> bool:
        calls[what] += 1
        due = calls[what] % EVERY == 0
        injected[what] += due
        return due

    submit, reserve, submit_load = host._copies.submit, books.reserve, host.submit_load

    def failing_submit(mover: Any, mappings: Any, is_store: bool, expedited: bool, transfers: list[Any]) -> None:
        if is_due("store" if is_store else "load"):
            raise RuntimeError("this copy was made to fail")
        submit(mover, mappings, is_store, expedited, transfers)

    def full_reserve(keys: Any, parents: Any) -> Any:
        return None if is_due("full") else reserve(keys, parents)

    def spoilt_load(
        job_id: int, chunk_ids: Any, device_ids: Any, group_sizes: Any, first_blocks: Any, **keywords: Any
    ) -> None:
        if is_due("load"):
            # The first block that is loaded, which may be one in the middle of its chunk.
            row = int(chunk_ids[0]) * host.blocks_per_chunk + first_blocks[0] % host.blocks_per_chunk
            host.host[0][row, :64] += 1
        submit_load(job_id, chunk_ids, device_ids, group_sizes, first_blocks, **keywords)

    if mode in ("op", "fail", "expedited"):
        host._copies.submit = failing_submit
    elif mode == "full":
        books.reserve = full_reserve
    else:
        host.submit_load = spoilt_load
    return injected


def keys_stay(engine: Engine) -> None:
    """Failed keys stay in the pool, so that their request loads them again and again."""
    engine.manager.books.fail = lambda keys: []


def failures_unseen(engine: Engine) -> None:
    """The worker says that all went well."""
    get_finished = engine.worker.get_finished

    def blind() -> list[Any]:
        finished = get_finished()
        for result in finished:
            result.success = True
        return finished

    engine.worker.get_finished = blind


def nothing_checked(engine: Engine) -> None:
    engine.worker.host_worker._sums.check = lambda pages, ids, rows: []


def no_second_try(engine: Engine) -> None:
    """An expedited load that fails is taken for done."""
    host = engine.worker.host_worker
    host._retried = lambda job: None


# In which mode, and what must find it.
DEFECTS: dict[Callable[[Engine], None], tuple[str, set[str]]] = {
    keys_stay: ("check", {"steps"}),
    failures_unseen: ("op", {"tokens", "counted"}),
    nothing_checked: ("check", {"tokens", "counted"}),
    no_second_try: ("expedited", {"tokens"}),
}
BY_NAME = {defect.__name__: defect for defect in DEFECTS}


def run(model: Path, connector: str | None, mode: str, defect: str | None) -> dict[str, Any]:
    """Tokens of every request, None where it was aborted or failed, and what is wrong."""
    # Half the device's blocks: prefixes are soon gone from it.
    extra: dict[str, Any] = {"verify": mode == "check"}
    if mode == "expedited":
        extra["sync_load_budget_bytes"] = 1 << 40
    engine = Engine(
        model, connector, blocks_per_chunk=2, host_bytes=HOST_BLOCKS * 32 * token_bytes(model),
        device_blocks=DEVICE_BLOCKS, max_model_len=512, max_num_seqs=8, extra=extra,
        on_load_failure="fail" if mode == "fail" else "recompute",
    )  # fmt: skip
    findings: list[str] = []
    if connector is None:
        return {"tokens": drive(engine, findings, abort=False)[0], "findings": findings}
    log, counted = Log(), {"load": 0, "store": 0}
    fail, preempt = engine.manager.fail, engine.scheduler._preempt_request
    preemptions = 0

    def counting_fail(keys: Any, *, is_store: bool) -> None:
        counted["store" if is_store else "load"] += 1
        fail(keys, is_store=is_store)

    def counting_preempt(*arguments: Any, **keywords: Any) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(*arguments, **keywords)

    engine.manager.fail, engine.scheduler._preempt_request = counting_fail, counting_preempt
    injected = inject(engine, mode)
    if defect:
        BY_NAME[defect](engine)
    tokens, aborted, failed = drive(engine, findings, abort=True)
    # Who loads again and again what failed would do so for ever.
    if findings:
        return {"tokens": tokens, "findings": findings}
    engine.worker.host_worker._copies.submit = type(engine.worker.host_worker._copies).submit.__get__(
        engine.worker.host_worker._copies
    )
    engine.finish_stores()
    happened = {"preemptions": preemptions, "aborts": aborted, **_expected(mode, injected)}
    findings += [f"failures: there were no {what}" for what, count in happened.items() if not count]
    if mode != "full":
        stores = 0 if mode == "check" else injected["store"]
        loads = 0 if mode == "expedited" else injected["load"]
        # A chunk that was spoilt under two requests spoils both; one that was aborted is told of all the same.
        if counted["store"] != stores or (counted["load"] != loads if mode != "check" else counted["load"] < loads):
            findings.append(f"counted: {counted} of {stores} stores and {loads} loads that were made to fail")
        if mode != "expedited" and len(log.failures) != sum(counted.values()):
            findings.append(f"counted: {len(log.failures)} messages about {sum(counted.values())} failures")
    if failed and mode != "fail":
        findings.append(f"failures: {failed} requests failed, though they could have been computed again")
    if mode == "fail" and not failed:
        findings.append("failures: no request failed")
    stats = engine.manager.books.stats()
    if stats["cached"] + stats["free"] != stats["chunks"]:
        findings.append(f"books: {stats} when nothing was under way")
    return {"tokens": tokens, "findings": findings, "failed": failed, **happened}


def _expected(mode: str, injected: dict[str, int]) -> dict[str, int]:
    kinds = {"full": ["full"], "check": ["load"]}.get(mode, ["store", "load"])
    return {f"failed {kind}s" if kind != "full" else "full pools": injected[kind] for kind in kinds}


def drive(engine: Engine, findings: list[str], abort: bool) -> tuple[list[list[int] | None], int, int]:
    """All requests, up to twelve at a time; tokens of each, how many were aborted, and how many failed."""
    core = engine.llm.llm_engine
    waiting = list(enumerate(requests()))
    tokens: list[list[int] | None] = [None] * len(waiting)
    until: dict[str, int] = {}
    live: set[str] = set()
    aborted = failed = steps = 0
    while (waiting or live) and steps < MOST_STEPS:
        while waiting and len(live) < 12:
            number, (prompt, count, after) = waiting.pop(0)
            name = str(number)
            params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
            core.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
            live.add(name)
            if abort and after is not None:
                until[name] = steps + after
        for name in [name for name, step in until.items() if step <= steps]:
            del until[name]
            if name in live:
                core.abort_request([name])
                live.discard(name)
                aborted += 1
        for output in core.step():
            if output.finished and output.request_id in live:
                live.discard(output.request_id)
                if output.outputs[0].finish_reason == "error":
                    failed += 1
                else:
                    tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
    if live or waiting:
        findings.append(f"steps: after {steps} steps requests {sorted(live, key=int)} have not ended")
    return tokens, aborted, failed
