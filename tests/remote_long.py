"""The long versions of the remote tests, and what they found: benchmarks/results/remote_faults.md.

python tests/remote_long.py [--rounds 200] [--frames 10000] [--seeds 1000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOOD = ("kills", "stops", "committed", "failed", "unknown", "visible", "dropped")
BAD = ("torn", "late", "contradictions", "crashed", "hangs", "leaks", "never began", "never went on")
MEANING = {
    "kills": "peers killed by SIGKILL in mid-transfer, and started again",
    "stops": "peers stopped by SIGSTOP until the other's transfers had ended, and continued",
    "committed": "transfers whose sender heard that they are visible",
    "failed": "whose sender knows that they are not",
    "unknown": "whose sender cannot know",
    "visible": "transfers published by a receiver",
    "dropped": "dropped by one",
    "torn": "published with a byte that is not the sender's",
    "late": "dropped blocks that were written to afterwards",
    "contradictions": "committed and not published, or failed and published",
    "crashed": "processes that ended by themselves",
    "hangs": "transfers that had not ended a minute after their deadline of a second",
    "leaks": "blocks, links, rings, descriptors or threads that were left",
    "never began": "pairs that never moved anything",
    "never went on": "pairs that moved nothing after the fault",
}


def faults(rounds: int, transport: str) -> dict[str, int]:
    command = [sys.executable, str(TESTS / "remote_processes.py"), str(rounds), "11", transport]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # UCX writes there, too


def tests(frames: int, seeds: int) -> str:
    """The last line of pytest's."""
    environment = {**os.environ, "KVKERNELS_REMOTE_FRAMES": str(frames), "KVKERNELS_REMOTE_SEEDS": str(seeds)}
    names = [str(TESTS / f"test_remote_{name}.py") for name in ("states", "frames")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command += ["--timeout", "3600"]
    done = subprocess.run([*command, *names], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout.strip().splitlines()[-1].strip("= ")


def page(found: dict, given: argparse.Namespace) -> str:
    transports = list(found["faults"])
    lines = [
        "# Remote transfers under faults", "",
        f"`make remote-long`: what `tests/remote_long.py` did in {found['minutes']:.0f} minutes on {found['cpu']}, "
        f"{os.cpu_count()} cores, at a load of {found['load']:.1f}.", "",
        f"## {given.rounds} faults of each transport", "",
        "Two processes with a pool each move 12 pages of 16 KiB at a time, three transfers at once, through 2 segments "
        "of 64 KiB. At a random moment one of them is killed or stopped; a third of the receivers is slow.", "",
        f"| | {' | '.join(transports)} | what |", f"| --- |{' ---: |' * len(transports)} --- |",
    ]  # fmt: skip
    for name in GOOD + BAD:
        counts = " | ".join(str(found["faults"][transport].get(name, 0)) for transport in transports)
        lines.append(f"| {name} | {counts} | {MEANING[name]} |")
    lines += ["", "What was lost is what `torn` and the rows below it count.", ""]
    lines += [f"## {given.frames:,} frames of each kind, {2 * given.seeds:,} orders of events", "",
              f"pytest: {found['tests']}.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    began = time.monotonic()
    has_nixl = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl"))
    found: dict = {"load": os.getloadavg()[0], "faults": {}}
    found["tests"] = tests(given.frames, given.seeds)
    for transport in ["tcp", "nixl"] if has_nixl else ["tcp"]:
        found["faults"][transport] = faults(given.rounds, transport)
        print(transport, found["faults"][transport], flush=True)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found["cpu"] = models[0].partition(":")[2].strip() if models else "an unknown processor"
    found["minutes"] = (time.monotonic() - began) / 60
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "remote_faults.md").write_text(page(found, given))
    if any(counts[name] for counts in found["faults"].values() for name in BAD):
        raise SystemExit("something was lost")


if __name__ == "__main__":
    main()
