"""Traces to try a policy on when there is none of one's own."""

from __future__ import annotations

import gzip
import heapq
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from kvkernels.memory.replay.trace import BLOCK_TOKENS

Line: TypeAlias = "dict[str, Any]"


class _Blocks:
    """Ids of prefixes, in the order in which they come up."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, object], int] = {}
        self._next = 0

    def of(self, parts: list[tuple[object, int]]) -> list[int]:
        """The ids of a prompt of parts, each a name for its text and a number of tokens."""
        ids: list[int] = []
        content: list[tuple[object, int]] = []
        filled = 0
        for name, tokens in parts:
            begin = 0
            while begin < tokens:
                taken = min(BLOCK_TOKENS - filled, tokens - begin)
                content.append((name, begin))
                begin, filled = begin + taken, filled + taken
                if filled == BLOCK_TOKENS:
                    ids.append(self._id(ids, tuple(content)))
                    content, filled = [], 0
        if content:
            ids.append(self._id(ids, (*content, filled)))
        return ids

    def _id(self, before: list[int], content: object) -> int:
        key = (before[-1] if before else -1, content)
        if key not in self._ids:
            self._ids[key] = self._next
            self._next += 1
        return self._ids[key]


def generate(kind: str, num_requests: int, seed: int = 0) -> Iterator[Line]:
    """A trace of requests that are made up.

    Parameters
    ----------
    kind : str
        ``"chat"``: turns of conversations, each with all before it, after one of four system prompts; a minute passes
        between turns. ``"rag"``: a question after a system prompt and three to six documents, few of which are wanted
        often; those come first. ``"agent"``: many short steps after a long prompt with tools, seconds apart; some split
        into several that go on from the same context.
    num_requests : int
    seed : int
        Equal seeds give equal traces.

    Yields
    ------
    dict
        A line of a trace.

    Raises
    ------
    ValueError
        An unknown kind, or a negative number.

    Examples
    --------
    >>> [line["hash_ids"][:3] for line in generate("rag", 2)]
    [[0, 1, 2], [0, 1, ...]]
    """
    if kind not in _KINDS:
        raise ValueError(f"generate: kind must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    if num_requests < 0:
        raise ValueError(f"generate: num_requests must be an integer from 0, got {num_requests}")
    requests = _KINDS[kind](random.Random(seed))
    blocks = _Blocks()
    for _ in range(num_requests):
        timestamp_ms, parts, output_tokens = next(requests)
        yield {
            "timestamp": round(timestamp_ms),
            "input_length": sum(tokens for _, tokens in parts),
            "output_length": output_tokens,
            "hash_ids": blocks.of(parts),
        }


def write_trace(kind: str, num_requests: int, path: str | Path, seed: int = 0) -> None:
    """Write what ``generate`` gives into a file, compressed if its name ends in ``.gz``."""
    lines = generate(kind, num_requests, seed)
    compressed = str(path).endswith(".gz")
    with gzip.open(path, "wt") if compressed else open(path, "w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


_Made: TypeAlias = "Iterator[tuple[float, list[tuple[object, int]], int]]"


def _tokens(rng: random.Random, middle: float, spread: float) -> int:
    """A length whose logarithm is normal."""
    return max(1, round(middle * rng.lognormvariate(0, spread)))


def _chat(rng: random.Random) -> _Made:
    prompts = [(f"system {i}", 600 * (i + 1)) for i in range(4)]
    return _sessions(rng, [[prompt] for prompt in prompts], arrival_s=3, pause_s=60, goes_on=0.7,
                     asked=(150, 1.2), answered=(350, 0.8), split=0.0)  # fmt: skip


def _agent(rng: random.Random) -> _Made:
    prompts = [(f"tools {i}", 6000 + 2500 * i) for i in range(3)]
    return _sessions(rng, [[prompt] for prompt in prompts], arrival_s=20, pause_s=4, goes_on=0.93,
                     asked=(900, 1.0), answered=(120, 0.6), split=0.05)  # fmt: skip


def _sessions(
    rng: random.Random, beginnings: list[list[tuple[object, int]]], *, arrival_s: float, pause_s: float, goes_on: float,
    asked: tuple[float, float], answered: tuple[float, float], split: float,
) -> _Made:  # fmt: skip
    """Requests of sessions that grow, in the order of their times."""
    number = 0
    new_session: list[tuple[object, int]] = []
    due: list[tuple[float, int, list[tuple[object, int]]]] = [(0.0, number, new_session)]
    while True:
        at_ms, _, parts = heapq.heappop(due)
        if not parts:
            number += 1
            heapq.heappush(due, (at_ms + rng.expovariate(1 / arrival_s) * 1000, number, new_session))
            parts = rng.choice(beginnings)
        number += 1
        parts = [*parts, (f"in {number}", _tokens(rng, *asked))]
        output_tokens = _tokens(rng, *answered)
        yield at_ms, parts, output_tokens
        parts = [*parts, (f"out {number}", output_tokens)]
        for _ in range(3 if rng.random() < split else 1):
            if rng.random() < goes_on:
                number += 1
                later_ms = at_ms + _tokens(rng, pause_s * 1000, 0.8)
                heapq.heappush(due, (later_ms, number, parts))


def _rag(rng: random.Random) -> _Made:
    documents = [(f"document {i}", _tokens(rng, 1500, 0.6)) for i in range(400)]
    rank_of = {document: rank for rank, document in enumerate(documents)}
    weights = [1 / (rank + 1) ** 0.9 for rank in range(len(documents))]
    at_ms, number = 0.0, 0
    while True:
        number += 1
        at_ms += rng.expovariate(1.0) * 1000
        # The more wanted first, so that prefixes are shared.
        wanted = sorted(set(rng.choices(documents, weights, k=rng.randint(3, 6))), key=rank_of.__getitem__)
        question = (f"question {number}", _tokens(rng, 60, 0.7))
        yield at_ms, [("system", 1100), *wanted, question], _tokens(rng, 250, 0.7)


_KINDS = {"chat": _chat, "rag": _rag, "agent": _agent}
