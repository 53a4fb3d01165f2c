"""``python -m kvkernels replay``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvkernels.memory.eviction import POLICIES
from kvkernels.memory.replay.belady import optimal_hits
from kvkernels.memory.replay.generate import write_trace
from kvkernels.memory.replay.plot import plot
from kvkernels.memory.replay.simulate import Simulation
from kvkernels.memory.replay.trace import BLOCK_TOKENS, TraceError, read_trace

BOUND = "belady"  #: the optimum's name among the policies
KINDS = ("chat", "rag", "agent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("traces", nargs="*", metavar="TRACE", help="files of one request a line, replayed one by one")
    parser.add_argument(
        "--policy", type=_policies, default=_policies("all"), metavar="NAMES",
        help=f"separated by commas, or all (the default): {', '.join((*POLICIES, BOUND))}",
    )  # fmt: skip
    parser.add_argument(
        "--capacity", type=_capacities, default=_capacities("1000,10000,30000"), metavar="LIST",
        help=f"in blocks of {BLOCK_TOKENS} tokens, or in tokens with tok at the end, which is rounded down; "
             "default 1000,10000,30000",
    )  # fmt: skip
    parser.add_argument("--chains", action="store_true", help="hold a block only while the one before it is held")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw hit rates over capacity")
    parser.add_argument("--generate", choices=KINDS, help="write a trace that is made up, and replay nothing")
    parser.add_argument("-n", type=_count, default=1000, metavar="N", help="requests to generate, 1000 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the generator")
    parser.add_argument("-o", metavar="FILE", help="where the generated trace goes; compressed if it ends in .gz")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say, and return the exit status."""
    try:
        if options.generate:
            return _generate(options)
        if not options.traces:
            return _fail("replay: a trace, or --generate, must be given")
        found = [
            replay_file(path, options.policy, options.capacity, chains=options.chains, draws=bool(options.plot))
            for path in options.traces
        ]
        if options.plot:
            plot(found, options.plot)
    except (TraceError, OSError, ModuleNotFoundError) as error:
        return _fail(str(error))
    print(json.dumps(found, indent=2) if options.json else "\n\n".join(map(text_of, found)))
    return 0


def replay_file(
    path: str | Path, policies: list[str], capacities: list[int], *, chains: bool = False, draws: bool = False
) -> dict[str, Any]:
    """Replay a trace once, with every policy at every capacity beside one another.

    Parameters
    ----------
    path : str or Path
    policies : list of str
        Of ``POLICIES``, and ``"belady"`` for the most that is possible.
    capacities : list of int
        In blocks.
    chains : bool
        As ``Simulation`` has it.
    draws : bool
        The optimum is needed in any case.

    Returns
    -------
    dict
        ``trace``, ``requests``, ``accesses``, ``unbounded_hits``, ``chains``, and ``results``: for each policy and
        capacity ``policy``, ``capacity_blocks``, ``hits`` and ``hit_rate``, which is hits over accesses.

    Raises
    ------
    TraceError
        The trace cannot be read.
    """
    simulations = [Simulation(name, size, chains=chains) for name in policies if name != BOUND for size in capacities]
    with_bound = draws or BOUND in policies
    runs = [simulation.run for simulation in simulations]
    requests = accesses = unbounded_hits = 0
    seen: set[int] = set()
    future = array("q")
    with _progress(path) as on_bytes:
        for request in read_trace(path, on_bytes):
            ids = request.hash_ids
            requests += 1
            accesses += len(ids)
            unbounded_hits += next((depth for depth, block in enumerate(ids) if block not in seen), len(ids))
            seen.update(ids)
            if with_bound:
                future.extend(ids)
            for run_request in runs:
                run_request(ids, request.timestamp_ms)
    counts = [(simulation.policy, simulation.capacity, simulation.hits) for simulation in simulations]
    if with_bound:
        counts += [(BOUND, size, optimal_hits(future, size)) for size in capacities]
    results = [
        {"policy": name, "capacity_blocks": size, "hits": hits, "hit_rate": hits / max(1, accesses)}
        for name, size, hits in counts
    ]
    return {
        "trace": str(path),
        "requests": requests,
        "accesses": accesses,
        "unbounded_hits": unbounded_hits,
        "chains": chains,
        "results": results,
    }


def text_of(found: dict[str, Any]) -> str:
    """What ``replay_file`` found, as a table."""
    accesses, most = found["accesses"], found["unbounded_hits"]
    sizes = list(dict.fromkeys(row["capacity_blocks"] for row in found["results"]))
    order = ", no block without the one before it" if found["chains"] else ""
    lines = [
        f"{found['trace']}: {found['requests']:,} requests, {accesses:,} blocks, "
        f"{most:,} hits ({most / max(1, accesses):.1%}) without a bound{order}",
        "hits by blocks".ljust(14) + "".join(f"{size:>20,}" for size in sizes),
    ]
    for name in dict.fromkeys(row["policy"] for row in found["results"]):
        rows = [row for row in found["results"] if row["policy"] == name]
        lines.append(name.ljust(14) + "".join(f"{row['hits']:>12,} {row['hit_rate']:>7.1%}" for row in rows))
    return "\n".join(lines)


def _generate(options: argparse.Namespace) -> int:
    if options.o is None:
        return _fail("replay: -o must be given with --generate")
    write_trace(options.generate, options.n, options.o, options.seed)
    return 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


@contextlib.contextmanager
def _progress(path: str | Path) -> Iterator[Callable[[int], object] | None]:
    """A bar on a terminal, where rich is installed; else nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        size = Path(path).stat().st_size if Path(path).is_file() else None
        task = bar.add_task(Path(path).name, total=size)
        yield lambda done: bar.update(task, completed=done)


def _policies(text: str) -> list[str]:
    names = [*POLICIES, BOUND] if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in POLICIES and name != BOUND]:
        raise argparse.ArgumentTypeError(
            f"must be all, or of {', '.join((*POLICIES, BOUND))}, separated by commas, got {unknown[0]!r}"
        )
    return list(dict.fromkeys(names))


def _capacities(text: str) -> list[int]:
    sizes = []
    for part in text.split(","):
        number = part.removesuffix("tok")
        size = int(number) if number.isascii() and number.isdigit() else 0
        if number != part:
            size //= BLOCK_TOKENS
        if size < 1:
            raise argparse.ArgumentTypeError(
                f"must be numbers of blocks, or of tokens as in 3000000tok, that come to at least a block, got {part!r}"
            )
        sizes.append(size)
    return sorted(set(sizes))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)
