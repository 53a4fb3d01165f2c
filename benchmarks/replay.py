"""How long the replay of a trace takes, a policy and a capacity at a time.

One thread; the file is read before. Policies take turns, and the median of the rounds is printed, in seconds of the
thread's processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time

from kvkernels.memory.eviction import POLICIES
from kvkernels.memory.replay import Simulation, read_trace, replay

CAPACITIES = (1_000, 5_860, 30_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="as `python -m kvkernels replay` takes it")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (%(default)s)")
    options = parser.parse_args()
    requests = list(read_trace(options.trace))
    elapsed_s: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for name in POLICIES:
            for capacity in CAPACITIES:
                simulation = Simulation(name, capacity)
                begin_s = time.thread_time()
                replay(requests, [simulation])
                elapsed_s.setdefault((name, capacity), []).append(time.thread_time() - begin_s)
    print("| policy | " + " | ".join(f"{capacity:,} blocks" for capacity in CAPACITIES) + " |")
    print("| --- |" + " ---: |" * len(CAPACITIES))
    for name in POLICIES:
        medians = [statistics.median(elapsed_s[name, capacity]) for capacity in CAPACITIES]
        print(f"| {name} | " + " | ".join(f"{median_s:.2f}" for median_s in medians) + " |")


if __name__ == "__main__":
    main()
