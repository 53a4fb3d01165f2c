"""More requests than either pool holds: preemptions, evictions from the host, prefixes shared by requests in flight."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import defects
from audit import Audit
from engine import Engine, Prompt

DEVICE_BLOCKS = 40
HOST_BLOCKS = 72
REQUESTS = 100


def requests() -> tuple[list[Prompt], list[int]]:
    """Prompts of 50 to 330 tokens, a prefix that others share and then tokens of their own; and answers' lengths.

    Some answers are one token: their blocks are free again in the step after, while their store is still to come.
    """
    draw = random.Random(3)
    prefixes = [[draw.randrange(3, 500) for _ in range(draw.randrange(40, 240))] for _ in range(8)]
    prompts = [
        draw.choice(prefixes) + [draw.randrange(3, 500) for _ in range(draw.randrange(10, 90))] for _ in range(REQUESTS)
    ]
    return prompts, [draw.choice([1, 32, 32]) for _ in prompts]


def token_bytes(model: Path) -> int:
    """What a float32 model keeps of a token."""
    config = json.loads((model / "config.json").read_text())
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 4)


def run(model: Path, spec: str | None, blocks_per_chunk: int, defect: str | None) -> dict[str, Any]:
    """Tokens of every request, what happened on the way, and what the audit found.

    The model must be float32: engines that batch differently round bfloat16 differently, with or without a connector.
    """
    engine = Engine(
        model,
        spec,
        blocks_per_chunk=blocks_per_chunk,
        host_bytes=HOST_BLOCKS * 32 * token_bytes(model),
        device_blocks=DEVICE_BLOCKS,
        max_model_len=512,
        max_num_seqs=8,
    )
    if spec is None:
        return {"tokens": [answer.tokens for answer in engine.generate(*requests())], "findings": []}

    happened = {"preemptions": 0, "evictions": 0}
    scheduler, manager = engine.scheduler, engine.manager
    preempt, prepare_store = scheduler._preempt_request, manager.prepare_store

    def counted_preempt(*arguments: Any, **keywords: Any) -> None:
        happened["preemptions"] += 1
        preempt(*arguments, **keywords)

    def counted_prepare_store(*arguments: Any, **keywords: Any) -> Any:
        prepared = prepare_store(*arguments, **keywords)
        happened["evictions"] += len(prepared.evicted_keys) if prepared else 0
        return prepared

    scheduler._preempt_request, manager.prepare_store = counted_preempt, counted_prepare_store
    if defect:
        defects.BY_NAME[defect](engine.worker)
    audit = Audit(engine)
    answers = engine.generate(*requests())
    engine.finish_stores()
    audit.check_counters()
    happened["loads"] = sum(direction == "load" for direction, _, _ in audit.reported)
    happened["waits"] = audit.waits
    for what, count in happened.items():
        if not count:
            audit.findings.append(f"stress: there were no {what}, so that they have not been tested")
    return {
        "tokens": [answer.tokens for answer in answers],
        "findings": audit.findings,
        "jobs": audit.jobs,
        "moved_bytes": audit.expected_bytes,
        "reused_tokens": sum(answer.cached_tokens for answer in answers),
        **happened,
    }
