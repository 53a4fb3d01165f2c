"""Time to the first token of a long prompt: computed, on the device, from the host; and without a connector."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from engine import Engine
from roundtrip import random_prompt

PROMPTS = 9
TOKENS = 2000


def run(model: Path, connector: str | None) -> dict[str, Any]:
    engine = Engine(model, connector, host_bytes=1 << 26)
    times: dict[str, list[float]] = {"cold": [], "device": [], "host": []}
    findings: list[str] = []
    for seed in range(PROMPTS):
        prompt = random_prompt(engine, TOKENS, seed)
        for where in times if connector else ("cold", "device"):
            if where == "host":
                engine.finish_stores()
                engine.finish_stores()
                engine.forget()
            start = time.perf_counter()
            [answer] = engine.generate([prompt], [1])
            times[where].append(1e3 * (time.perf_counter() - start))
            if bool(answer.cached_tokens) != (where != "cold"):
                findings.append(f"ttft: {where}: {answer.cached_tokens} tokens were cached")
    return {"findings": findings, "ttft_ms": {where: statistics.median(of) for where, of in times.items() if of}}
