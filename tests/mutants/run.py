#!/usr/bin/env python3
"""Measures whether the tests notice: builds the library with one edit at a time and runs the fast tests on each.

    make mutants ARGS="--count 160 --workers 2"

Each worker has a copy of the tree under build/mutants. An edit is killed if a test fails or runs far too long,
stillborn if it does not compile, and survives otherwise. Survivors are read by a person: survivors.txt
says why they survive. Those that change nothing anyone could notice are counted apart; those that change how long a
copy takes are survivors, since no test is allowed to depend on time. An entry of survivors.txt for an edit that the
sources no longer allow ends the run before it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mutate import Mutant, candidates, choose
from steps import STAND_IN, plan_of
from worker import Outcome, Worker

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ROOT / "build" / "mutants" / "outcomes.jsonl"
SURVIVORS = Path(__file__).with_name("survivors.txt")
TIME_ONLY = "Time only: "

PREFACE = """# Whether the tests notice

Printed by `make mutants`: single edits of the sources, chosen by a seed and spread over the files by their length. A
comparison, a constant or an operator is another one, a condition is negated, operands are exchanged, or a check, a
wait or a statement is dropped. Each edit is built, and the fast tests run on it until one fails. A survivor that led
to a test was tried again.

*Stillborn* edits do not compile. *Equivalent* ones change nothing that anyone could notice, for the reason given
below. *Survived* is all else that no test noticed: also edits that change only how long a copy takes, since no test
may depend on time. The share is of those killed and survived.

"""


def known_survivors() -> dict[str, str]:
    """By the edit's text: why no test notices it."""
    known = {}
    for block in SURVIVORS.read_text().split("\n\n") if SURVIVORS.exists() else ():
        lines = [line for line in block.split("\n") if line and not line.startswith("#")]
        if len(lines) >= 2:
            known[lines[0].strip()] = " ".join(line.strip() for line in lines[1:])
    return known


def stale_survivors() -> list[str]:
    """Entries for edits that the sources do not allow, or not any more."""
    return sorted(set(known_survivors()) - {mutant.key() for mutant in candidates(ROOT)})


def is_equivalent(reason: str) -> bool:
    return not reason.startswith(TIME_ONLY)


def folder_of(outcome: Outcome) -> str:
    return str(Path(outcome.mutant.path).parent)


def report(outcomes: list[Outcome], seed: int) -> str:
    reasons = known_survivors()
    rows = ["| folder | edits | stillborn | equivalent | killed | survived | share killed |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    survivors = [o for o in outcomes if o.result == "survived"]
    silent = [o for o in survivors if is_equivalent(reasons.get(o.mutant.key(), TIME_ONLY))]
    for folder in (*sorted({folder_of(o) for o in outcomes}), ""):
        mine = [o for o in outcomes if folder in ("", folder_of(o))]
        count = Counter(o.result for o in mine)
        same = sum(o in silent for o in mine)
        alive = count["survived"] - same
        share = f"{100 * count['killed'] / (count['killed'] + alive):.1f}%" if count["killed"] + alive else "-"
        rows.append(
            f"| {folder or '**all**'} | {len(mine)} | {count['stillborn']} | {same} | {count['killed']} | {alive} "
            f"| {share} |"
        )
    middle_s = statistics.median([o.elapsed_s for o in outcomes] or [0])
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = "\n".join(rows)
    text += f"\n\nSeed {seed}; on {machine}, where half of the edits took over {middle_s:.0f} s each.\n"
    for title, some in (("Survivors", [o for o in survivors if o not in silent]), ("Equivalent", silent)):
        lines = [f"- `{o.mutant}`: {reasons.get(o.mutant.key(), 'not looked at yet')}\n" for o in some]
        text += f"\n{title}:\n\n{''.join(lines)}" if lines else ""
    return PREFACE + text


def read_outcomes() -> list[Outcome]:
    lines = OUTCOMES.read_text().splitlines() if OUTCOMES.exists() else []
    return [Outcome(Mutant(**fields.pop("mutant")), **fields) for fields in map(json.loads, lines)]


def still_known(outcomes: list[Outcome], mutants: list[Mutant]) -> list[Outcome]:
    """Outcomes of edits that the sources still allow, as many of a file as are wanted; not of those that survived for
    no known reason, since a test may find them now."""
    reasons = known_survivors()
    wanted = Counter(mutant.path for mutant in mutants)
    kept: dict[str, Outcome] = {}
    for outcome in outcomes:
        mutant = outcome.mutant.moved(ROOT)
        alive = outcome.result == "survived" and outcome.mutant.key() not in reasons
        if mutant is None or alive or wanted[mutant.path] == 0 or str(mutant) in kept:
            continue
        wanted[mutant.path] -= 1
        kept[str(mutant)] = replace(outcome, mutant=mutant)
    return list(kept.values())


def to_try_again(outcomes: list[Outcome]) -> list[Mutant]:
    """Those that survived for no known reason."""
    reasons = known_survivors()
    alive = [o.mutant.moved(ROOT) for o in outcomes if o.result == "survived" and o.mutant.key() not in reasons]
    return [mutant for mutant in alive if mutant is not None]


def not_tried(mutants: list[Mutant], first: list[Mutant], outcomes: list[Outcome]) -> list[Mutant]:
    """What is left to try: as many edits of each file as its outcomes lack, on other lines."""
    lacking = Counter(mutant.path for mutant in mutants)
    lacking.subtract(Counter(outcome.mutant.path for outcome in outcomes))
    tried = {(outcome.mutant.path, outcome.mutant.line) for outcome in outcomes}
    left = []
    for mutant in (*first, *mutants):
        if lacking[mutant.path] > 0 and (mutant.path, mutant.line) not in tried:
            lacking[mutant.path] -= 1
            tried.add((mutant.path, mutant.line))
            left.append(mutant)
    return left


class Workers:
    """Some of them, each of which does one thing at a time."""

    def __init__(self, count: int) -> None:
        self._all = [Worker(ROOT, number) for number in range(count)]
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._all:
            self._free.put(worker)
        self._pool = ThreadPoolExecutor(count)

    def each(self, job: Callable[[Worker], None]) -> None:
        list(self._pool.map(job, self._all))

    def share(self, jobs: Iterable[Any], done_by: Callable[[Worker, Any], None]) -> None:
        def one(job: Any) -> None:
            worker = self._free.get()
            try:
                done_by(worker, job)
            finally:
                self._free.put(worker)

        list(self._pool.map(one, jobs))


def tests_by_kind(mutants: Sequence[Mutant]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for step in (step for mutant in mutants for step in plan_of(mutant.path)):
        found.setdefault(step.kind, {}).update(dict.fromkeys(step.tests))
    return {kind: list(tests) for kind, tests in found.items()}


def see_tests_pass(worker: Worker, kind_and_tests: tuple[str, Sequence[str]]) -> None:
    """On the unchanged tree."""
    kind, tests = kind_and_tests
    begin = time.monotonic()
    failed = worker.failing(kind, tests)
    if failed:
        raise SystemExit(f"the tests fail on the unchanged tree: {failed}")
    print(f"{kind}: {len(tests)} files: {time.monotonic() - begin:.0f} s", flush=True)


def try_all(mutants: list[Mutant], worker_count: int, outcomes: list[Outcome]) -> None:
    """Adds to the outcomes, and to their file as they come."""
    lock = threading.Lock()
    total = len(outcomes) + len(mutants)

    def try_out(worker: Worker, mutant: Mutant) -> None:
        outcome = worker.try_out(mutant)
        with lock:
            outcomes.append(outcome)
            with OUTCOMES.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            by = f" by {outcome.by}" if outcome.by else ""
            text = f"[{len(outcomes)}/{total}] {outcome.result}{by} ({outcome.elapsed_s:.0f} s): {mutant}"
            print(text, flush=True)

    workers = Workers(worker_count)
    tests = tests_by_kind(mutants)
    workers.each(lambda worker: worker.prepare(tests))
    if not outcomes:
        workers.share(tests.items(), see_tests_pass)
    workers.share(mutants, try_out)


def refuse_what_cannot_run(mutants: Sequence[Mutant]) -> None:
    stale = stale_survivors()
    if stale:
        raise SystemExit("survivors.txt has edits that the sources do not allow:\n" + "\n".join(stale))
    if STAND_IN in tests_by_kind(mutants) and not (ROOT / ".venv-simgpu" / "bin" / "python").exists():
        raise SystemExit("edits of csrc/ops need .venv-simgpu, which make simgpu makes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=160, help="edits to try")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="edits of paths that contain this")
    parser.add_argument(
        "--resume", action="store_true", help=f"keep what {OUTCOMES.relative_to(ROOT)} has of them, and the baseline"
    )
    parser.add_argument("--output", type=Path, help="writes the table there as well")
    asked = parser.parse_args()
    mutants = choose(ROOT, asked.count, asked.seed, asked.only)
    refuse_what_cannot_run(mutants)
    earlier = read_outcomes() if asked.resume else []
    outcomes = still_known(earlier, mutants)
    left = not_tried(mutants, to_try_again(earlier), outcomes)
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    OUTCOMES.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))
    baseline = "" if outcomes else " and running the tests on one"
    if left:
        print(f"{len(left)} edits; building {asked.workers} trees{baseline}", flush=True)
        try_all(left, asked.workers, outcomes)
    outcomes.sort(key=lambda o: (o.mutant.path, o.mutant.line))
    text = report(outcomes, asked.seed)
    print(text)
    if asked.output:
        asked.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
