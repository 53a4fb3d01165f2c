"""What the books of host memory cost: the table of benchmarks/results/memory.md.

Hashes, the prefix cache and the pool on one thread, each case in short bursts that take turns, on the thread's own
clock; the figure is the median of all bursts. With --vllm, a second process has vLLM's own `hash_block_tokens` hash the
same prompts, and its bursts take turns with these.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK_SIZE = 16
PROMPT_BLOCKS = 2048  # 32 Ki tokens
CALL_BLOCKS = 64
LARGE_BLOCKS = 4096
CACHED_PROMPTS = (2, 16)
POOL_BLOCKS = 100_000
# In blocks a second, or in microseconds a call.
GOALS_PER_S = {
    "hash, list, xxh3_128": 1.5e6,
    "hash, numpy, xxh3_128": 4e6,
    **{f"{what} of 64 known, of {prompts * PROMPT_BLOCKS} cached": 2e6
       for what in ("lookup", "insert") for prompts in CACHED_PROMPTS},
}  # fmt: skip
GOALS_US = {"alloc and free, 1 block": 3.0, f"alloc and free, {LARGE_BLOCKS} blocks": 30.0}
# A goal for how many times as fast as vLLM's the hashing from a list is.
GOALS_TIMES = {"vLLM hash_block_tokens, sha256": 3.0, "vLLM hash_block_tokens, xxhash": 2.0}

#: What to run, how often in a burst, and the blocks of a run: 0 where the figure is microseconds a run.
Case = tuple[Callable[[], Any], int, int]


def prompt() -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(128_000) for _ in range(PROMPT_BLOCKS * BLOCK_SIZE)]


def our_cases() -> dict[str, Case]:
    import numpy as np

    from kvkernels.memory import BlockHasher, KVPool, PrefixCache

    tokens = prompt()
    array = np.array(tokens, dtype=np.int64)
    hashers = {name: BlockHasher(BLOCK_SIZE, algorithm=name) for name in ("xxh3_128", "blake3", "sha256")}
    cases: dict[str, Case] = {}
    for name, hasher in hashers.items():
        cases[f"hash, list, {name}"] = (lambda hasher=hasher: hasher.hashes(tokens), 1, PROMPT_BLOCKS)
        cases[f"hash, numpy, {name}"] = (lambda hasher=hasher: hasher.hashes(array), 1, PROMPT_BLOCKS)

    # The yardstick: what of it is not this project's, and how busy the machine was.
    digest, block = importlib.import_module("xxhash").xxh3_128_digest, bytes(16 + 4 * BLOCK_SIZE)

    def digest_alone() -> None:
        for _ in range(PROMPT_BLOCKS):
            digest(block)

    cases["xxhash.xxh3_128_digest alone, in a loop"] = (digest_alone, 1, PROMPT_BLOCKS)

    prompts = [hashers["xxh3_128"].hashes([i, *tokens])[:PROMPT_BLOCKS] for i in range(max(CACHED_PROMPTS))]
    for count in CACHED_PROMPTS:
        cases |= known_cases(prompts[:count])

    full = PrefixCache(BLOCK_SIZE, PROMPT_BLOCKS)
    turn = iter(range(1 << 60))

    def churn() -> None:
        """Prompts that share nothing, in a cache with room for one: each block evicts another."""
        hashes = prompts[next(turn) % 2]
        given = range(PROMPT_BLOCKS) if hashes is prompts[0] else range(PROMPT_BLOCKS, 2 * PROMPT_BLOCKS)
        full.insert(hashes, list(given))

    cases["insert of new ones, each evicting another"] = (churn, 1, PROMPT_BLOCKS)

    pool = KVPool(POOL_BLOCKS * BLOCK_SIZE, BLOCK_SIZE)
    for blocks, name in ((1, "1 block"), (LARGE_BLOCKS, f"{LARGE_BLOCKS} blocks")):
        tokens_wanted = blocks * BLOCK_SIZE
        cases[f"alloc and free, {name}"] = (lambda wanted=tokens_wanted: pool.free(pool.alloc(wanted)), 200, 0)
    return cases


def known_cases(prompts: list[list[bytes]]) -> dict[str, Case]:
    """Calls in random order, on a cache that has all of them."""
    from kvkernels.memory import PrefixCache

    cache = PrefixCache(BLOCK_SIZE, POOL_BLOCKS)
    calls = []
    for i, hashes in enumerate(prompts):
        for start in range(0, PROMPT_BLOCKS, CALL_BLOCKS):
            blocks = list(range(i * PROMPT_BLOCKS + start, i * PROMPT_BLOCKS + start + CALL_BLOCKS))
            call = (hashes[start : start + CALL_BLOCKS], blocks, hashes[start - 1] if start else None)
            cache.insert(call[0], blocks, parent=call[2])
            calls.append(call)
    random.Random(0).shuffle(calls)

    def look_up() -> None:
        for hashes, _, _ in calls:
            cache.lookup(hashes)

    def insert() -> None:
        for hashes, blocks, parent in calls:
            cache.insert(hashes, blocks, parent=parent)

    def hold() -> None:
        for hashes in prompts:
            cache.lookup(hashes, hold=True)
            cache.release(hashes)

    size, known = f"of {len(cache)} cached", len(calls) * CALL_BLOCKS
    return {
        f"lookup of {CALL_BLOCKS} known, {size}": (look_up, 1, known),
        f"insert of {CALL_BLOCKS} known, {size}": (insert, 1, known),
        f"lookup of {PROMPT_BLOCKS} known, held and released, {size}": (hold, 1, known),
    }


def vllm_cases() -> dict[str, Case]:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    tokens = prompt()
    cases: dict[str, Case] = {}
    for name in ("sha256", "xxhash"):
        hash_function = get_hash_fn_by_name(name)
        kv_cache_utils.init_none_hash(hash_function)

        def run(hash_function: Any = hash_function) -> None:
            parent = None
            for start in range(0, len(tokens), BLOCK_SIZE):
                block = tokens[start : start + BLOCK_SIZE]
                parent = kv_cache_utils.hash_block_tokens(hash_function, parent, block, None)

        cases[f"vLLM hash_block_tokens, {name}"] = (run, 1, PROMPT_BLOCKS)
    return cases


def work(make_cases: Callable[[], dict[str, Case]]) -> None:
    """A burst of every case for each line that comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM says things on stdout
    cases = make_cases()
    for _ in sys.stdin:
        burst = {}
        for name, (run, repeat, blocks) in cases.items():
            begin = time.thread_time()
            for _ in range(repeat):
                run()
            seconds = (time.thread_time() - begin) / repeat
            burst[name] = blocks / seconds if blocks else seconds * 1e6
        print(json.dumps(burst), file=answers, flush=True)


def measure(pythons: dict[str, str], rounds: int) -> dict[str, float]:
    """Medians by case, of the processes' bursts in turns."""
    processes = [
        subprocess.Popen([python, __file__, "--work", kind], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for kind, python in pythons.items()
    ]
    bursts: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        burst = {}
        for process in processes:
            assert process.stdin and process.stdout
            print("go", file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise SystemExit("a process of the benchmark ended early; its error is above")
            burst |= json.loads(line)
        bursts.append(burst)
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.wait()
    # The first is not counted.
    return {name: statistics.median(burst[name] for burst in bursts[1:]) for name in bursts[0]}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# What the books of host memory cost",
        "",
        f"Measured by `python benchmarks/memory.py` on {result['machine']}, Python {result['python']}, "
        f"load {result['load_1_minute']:.1f}.",
        f"One thread, on its own clock: medians of {result['rounds']} bursts, cases taking turns. Blocks of "
        f"{BLOCK_SIZE} tokens, a prompt of {PROMPT_BLOCKS} blocks; calls for cached ones in random order, by LRU.",
        "",
        "| what | million blocks a second | goal |",
        "| --- | ---: | ---: |",
    ]
    for name, figure in result["figures"].items():
        if name not in GOALS_US:
            goal = GOALS_PER_S.get(name)
            missed = " (missed)" if goal and figure < goal else ""
            lines.append(f"| {name} | {figure / 1e6:.2f} | {f'{goal / 1e6:g}{missed}' if goal else ''} |")
    lines += ["", "| what | us | goal |", "| --- | ---: | ---: |"]
    for name, goal in GOALS_US.items():
        figure = result["figures"][name]
        lines.append(f"| {name} | {figure:.2f} | {goal:g}{' (missed)' if figure > goal else ''} |")
    if result["times"]:
        lines += ["", "| beside our xxh3_128 from a list | times as slow | goal |", "| --- | ---: | ---: |"]
        for name, times in result["times"].items():
            goal = GOALS_TIMES[name]
            lines.append(f"| {name} | {times:.1f} | {goal:g}{' (missed)' if times < goal else ''} |")
    if result["note"]:
        lines += ["", result["note"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="bursts of each case (%(default)s)")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM, to compare with")
    parser.add_argument("--note", default="", help="a sentence for the end of the table")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--work", choices=("ours", "vllm"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work({"ours": our_cases, "vllm": vllm_cases}[options.work])
    import torch

    import machine
    from publish import publish

    described = machine.describe(torch.device("cpu"), None)
    figures = measure({"ours": sys.executable, **({"vllm": options.vllm} if options.vllm else {})}, options.rounds)
    result = {
        "machine": machine.in_words(described),
        "python": described["python"],
        "load_1_minute": os.getloadavg()[0],
        "rounds": options.rounds,
        "note": options.note,
        "figures": figures,
        "times": {name: figures["hash, list, xxh3_128"] / figures[name] for name in GOALS_TIMES if name in figures},
    }
    publish(options.out, "memory", result, markdown(result))


if __name__ == "__main__":
    main()
