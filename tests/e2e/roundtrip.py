"""Cold, from the device, from the host: one prompt three times, and every way in which the third could differ."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import defects
from audit import Audit
from engine import NEW_TOKENS, Answer, Engine, Prompt

TIMED_PROMPTS = 5


def default_prompts(engine: Engine) -> list[Prompt]:
    """Below a chunk, one token above, exactly two chunks, ends inside a block and inside a chunk, and a long one."""
    chunk, block = engine.chunk_tokens, engine.block_tokens
    if engine.longest_prompt <= chunk:
        raise ValueError(f"model and host pool take {engine.longest_prompt} tokens, which is no chunk of {chunk}")
    lengths = [chunk - 1, chunk + 1, 2 * chunk, 3 * chunk + 12, 4 * chunk + block + 5, long_prompt_tokens(engine)]
    return [random_prompt(engine, length, seed=length) for length in lengths if length <= engine.longest_prompt]


def long_prompt_tokens(engine: Engine) -> int:
    """As many whole chunks as the engine takes, and 12 tokens that are computed in any case."""
    return (engine.longest_prompt - 12) // engine.chunk_tokens * engine.chunk_tokens + 12


def random_prompt(engine: Engine, length: int, seed: int) -> Prompt:
    draw = random.Random(seed)
    return [draw.randrange(3, engine.vocabulary) for _ in range(length)]


def run(
    model: Path,
    spec: str,
    blocks_per_chunk: int,
    prompts: list[Prompt] | None,
    defect: str | None,
    cold_too: bool,
) -> dict[str, Any]:
    """The figures of one engine, and what is wrong with it: an empty list of findings is a pass."""
    engine = Engine(model, spec, blocks_per_chunk=blocks_per_chunk)
    if defect:
        defects.BY_NAME[defect](engine.worker)
    audit = Audit(engine)
    if prompts is None:
        prompts = default_prompts(engine)
        # The last two, one of them long, show a defect as well as all of them.
        prompts = prompts[-2:] if defect else prompts
    for prompt in prompts:
        if len(prompt) > engine.longest_prompt:
            raise ValueError(f"a prompt of {len(prompt)} tokens: model and host pool take {engine.longest_prompt}")
    reused = [_check_prompt(engine, audit, prompt, cold_too) for prompt in prompts]
    findings = audit.findings
    if not sum(reused):
        findings.append("cached tokens: no prompt was brought back from the host pool")
    audit.enabled = False
    timing = {} if defect else _time(engine, audit, cold_too)
    audit.check_counters()
    return {"findings": findings, "reused_tokens": sum(reused), "jobs": audit.jobs, **timing}


def _check_prompt(engine: Engine, audit: Audit, prompt: Prompt, cold_too: bool) -> int:
    """Runs one prompt and returns the tokens that came from the host pool.

    How an engine rounds depends on how many tokens it computes together, though not on where the others' KV comes from.
    So the run to compare with is one that found as many tokens on the device: the same computation, to the last bit.
    With ``cold_too`` the cold run must agree as well. In the tiny models it does, from eight computed tokens on, though
    in a long prompt only to the token: there the kernels cut the work otherwise. MLA has other formulas for a prompt
    without a prefix.
    """
    name = f"prompt of {len(prompt)} tokens"
    findings = audit.findings
    expected = engine.loadable_tokens(len(prompt))
    engine.forget(host_too=True)
    by_place = engine.watch_positions()
    [cold] = engine.generate([prompt], [NEW_TOKENS])
    engine.stop_watching()
    engine.finish_stores()
    by_hash = engine.known_pages()
    # Of its own cache an engine does not use the last token's block, of the host pool it does: where a prompt ends with
    # a chunk, that chunk must come from the host here too.
    engine.keep_prefix(expected if expected < len(prompt) else expected - engine.chunk_tokens)
    [hit] = engine.generate([prompt], [NEW_TOKENS])
    engine.finish_stores()
    engine.forget()
    audit.loaded.clear()
    [warm] = engine.generate([prompt], [NEW_TOKENS])

    if warm.cached_tokens != expected:
        findings.append(f"cached tokens: {name}: {warm.cached_tokens} came back, {expected} were expected")
    same_work = hit.cached_tokens == warm.cached_tokens
    if same_work:
        _compare(f"{name}, against a hit on the device", hit, warm, findings)
    if not same_work or (cold_too and len(prompt) - warm.cached_tokens >= 8):
        short = len(prompt) < long_prompt_tokens(engine)
        _compare(f"{name}, against the cold run", cold, warm, findings, logprobs_too=short)
    _check_loaded_pages(engine, audit, by_hash, by_place, name)
    return warm.cached_tokens


def _compare(name: str, want: Answer, got: Answer, findings: list[str], logprobs_too: bool = True) -> None:
    if got.tokens != want.tokens:
        findings.append(f"tokens: {name}: {got.tokens} instead of {want.tokens}")
    if not logprobs_too:
        return
    if any(a.keys() != b.keys() for a, b in zip(want.logprobs, got.logprobs, strict=True)):
        findings.append(f"log-probabilities: {name}: of other tokens")
        return
    pairs = [(a[token], b[token]) for a, b in zip(want.logprobs, got.logprobs, strict=True) for token in a]
    unequal = [(a, b) for a, b in pairs if a != b]
    if unequal:
        findings.append(f"log-probabilities: {name}: {len(unequal)} differ, the first is {unequal[0]}")


def _check_loaded_pages(
    engine: Engine,
    audit: Audit,
    by_hash: dict[bytes, list[bytes]],
    by_place: dict[tuple[int, int], list[bytes]],
    name: str,
) -> None:
    """What was loaded is what the device held in the cold run, under the same hash and at the same place."""
    wrong = unknown = 0
    for block in audit.loaded:
        block_hash = engine.block_pool.blocks[block.device_id].block_hash
        known = [by_place.get((block.group, block.place))]
        if block_hash is not None:
            known.append(by_hash.get(bytes(block_hash)) if engine.group_of(block_hash) == block.group else None)
        known = [pages for pages in known if pages is not None]
        unknown += not known
        wrong += any(pages != block.pages for pages in known)
    if wrong or unknown:
        of = f"of {len(audit.loaded)} loaded blocks"
        audit.findings.append(f"pages: {name}: {of} {wrong} differ from those stored, {unknown} are not known")


def _time(engine: Engine, audit: Audit, cold_too: bool) -> dict[str, Any]:
    """Medians over prompts as long as the engine takes, with the audit's own work out of the way."""
    first = len(audit.reported)
    length = long_prompt_tokens(engine)
    cold_seconds, warm_seconds, cached_tokens = [], [], []
    for seed in range(TIMED_PROMPTS):
        prompt = random_prompt(engine, length, seed)
        engine.forget(host_too=True)
        seconds, cold = _timed(engine, prompt)
        cold_seconds.append(seconds)
        engine.finish_stores()
        engine.forget()
        seconds, warm = _timed(engine, prompt)
        warm_seconds.append(seconds)
        cached_tokens.append(warm.cached_tokens)
        engine.finish_stores()
        if cold_too:
            _compare(f"long prompt {seed}, against the cold run", cold, warm, audit.findings, logprobs_too=False)
    if min(cached_tokens) != engine.loadable_tokens(length):
        audit.findings.append(f"cached tokens: of long prompts {cached_tokens} came back of {length}")
    jobs = audit.reported[first:]
    return {
        "prompt_tokens": length,
        "cold_ms": 1e3 * statistics.median(cold_seconds),
        "warm_ms": 1e3 * statistics.median(warm_seconds),
        "not_recomputed": min(cached_tokens),
        "moved_bytes": sum(size for _, size, _ in jobs),
        "store_gb_per_s": _rate(jobs, "store"),
        "load_gb_per_s": _rate(jobs, "load"),
    }


def _rate(jobs: list[tuple[str, int, float]], direction: str) -> float:
    moved = [(size, seconds) for kind, size, seconds in jobs if kind == direction]
    elapsed = sum(seconds for _, seconds in moved)
    return sum(size for size, _ in moved) / elapsed / 1e9 if elapsed else 0.0


def _timed(engine: Engine, prompt: Prompt) -> tuple[float, Answer]:
    start = time.perf_counter()
    [answer] = engine.generate([prompt], [1])
    return time.perf_counter() - start, answer
