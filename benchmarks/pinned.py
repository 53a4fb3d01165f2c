"""How long a PinnedPool takes to be ready, beside what the first touch by all cores takes: results/pinned.md.

The first touch is a thread for each core, each of which writes a zero into every page of its even part of fresh memory.
Both take turns, and a figure is the median of all rounds; the memory is given back between them, which is not timed.
The ratio of the lower quartiles is what another program beside it moves less.
"""

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import machine
from kvkernels import _host
from kvkernels.memory import PinnedPool
from publish import publish

ROOT = Path(__file__).resolve().parents[1]
PAGE_BYTES = 1 << 20
GOAL = 1.3


def first_touch(byte_count: int, huge_pages: bool, is_file: bool) -> float:
    """Seconds until memory is mapped and touched."""
    began = time.perf_counter()
    file = -1
    if is_file:
        file = os.memfd_create("benchmark")
        os.ftruncate(file, byte_count)
    memory = _host.HostMemory(byte_count, file)
    memory.advise_huge(huge_pages)
    cores = len(os.sched_getaffinity(0))
    parts = itertools.pairwise(byte_count * i // cores for i in range(cores + 1))
    threads = [threading.Thread(target=memory.touch, args=(begin, end, "write")) for begin, end in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if is_file:
        os.close(file)
    return took


def ready(byte_count: int, **options: Any) -> float:
    """Seconds until a pool can be used."""
    began = time.perf_counter()
    pool = PinnedPool(byte_count // PAGE_BYTES, PAGE_BYTES, pin=False, **options)
    took = time.perf_counter() - began
    pool.close()
    return took


def cases(byte_count: int) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """The pool, and the first touch that it is compared with."""
    return {
        'huge_pages="auto"': (lambda: ready(byte_count), lambda: first_touch(byte_count, True, False)),
        "huge_pages=False": (
            lambda: ready(byte_count, huge_pages=False),
            lambda: first_touch(byte_count, False, False),
        ),
        'shared="name"': (
            lambda: ready(byte_count, shared=f"benchmark-{os.getpid()}"),
            lambda: first_touch(byte_count, True, True),
        ),
    }


def measure(byte_count: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, contenders in cases(byte_count).items():
        times: list[list[float]] = [[], []]
        for i in range(2 * rounds):
            # In turns, and the first of a pair is the second of the next one.
            place = (i + i // 2) % 2
            times[place].append(contenders[place]())
        (pool, pool_low), (touch, touch_low) = (_median_and_low(column) for column in times)
        rows.append(
            {
                "case": name,
                "pool_s": pool,
                "first_touch_s": touch,
                "ratio": pool / touch,
                "ratio_low": pool_low / touch_low,
            }
        )
    return rows


def _median_and_low(times: list[float]) -> tuple[float, float]:
    low, median, _ = statistics.quantiles(times, n=4, method="inclusive")
    return median, low


def facts(byte_count: int) -> dict[str, Any]:
    """What a pool of this size gets here."""
    with PinnedPool(byte_count // PAGE_BYTES, PAGE_BYTES, pin=False) as pool:
        return {"huge_page_share": pool.facts.huge_page_share, "why_not_huge": pool.facts.why_not_huge}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# How long a PinnedPool takes to be ready",
        "",
        f"Measured by `python benchmarks/pinned.py` on {result['machine']}; load {result['load_1_minute']:.1f}.",
        f"{result['gib']:g} GiB, pageable: medians of {result['rounds']} rounds in which a pool and the first touch "
        "take turns. The first touch is a thread for each core that writes into every page of new memory of that kind. "
        f"Goal: at most {GOAL} times that.",
        "",
        "| pool | s | first touch by all cores, s | ratio | of the lower quartiles |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        missed = " (missed)" if row["ratio"] > GOAL else ""
        lines.append(
            f"| {row['case']} | {row['pool_s']:.2f} | {row['first_touch_s']:.2f} | {row['ratio']:.2f}{missed} "
            f"| {row['ratio_low']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="of each pool (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of each case (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    byte_count = int(options.gib * (1 << 30)) // PAGE_BYTES * PAGE_BYTES
    got = facts(byte_count)
    result = {
        "machine": machine.in_words(machine.describe(torch.device("cpu"), got["huge_page_share"])),
        "load_1_minute": os.getloadavg()[0],
        "gib": options.gib,
        "rounds": options.rounds,
        "facts": got,
        "rows": measure(byte_count, options.rounds),
    }
    publish(options.out, "pinned", result, markdown(result))


if __name__ == "__main__":
    main()
