"""Owners of a shared pool that are killed, and attachers that live on: a program, since processes are forked from it.

Prints, as JSON, how often what was seen. test_memory_shared.py runs it.

::

    parent     forks, waits a random time, kills the owner, waits for the attachers, looks for what is left
      owner    makes the pool, stamps its pages with the number of the round, until it is killed
      attacher attaches as soon as it can, looks at all pages and writes its own, until the owner is gone, and once more
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from kvkernels.memory import NoOwnerError, PinnedPool

PAGES, PAGE_BYTES = 64, 16 << 10
NEVER_ATTACHED, LIVED_ON = 0, 10


def own(name: str, stamp: int) -> None:
    """Until it is killed."""
    pool = PinnedPool(PAGES, PAGE_BYTES, pin=False, shared=name)
    while True:
        pool.pages[: PAGES // 2].fill_(stamp)


def attach(name: str, stamp: int, own_pages: slice, owner_ends: int) -> int:
    """What became of it; an exception or a signal is for the parent to see."""
    poll = select.poll()
    poll.register(owner_ends, select.POLLHUP)
    while True:
        try:
            pool = PinnedPool.attach(name, PAGES, PAGE_BYTES, pin=False)
            break
        except NoOwnerError:
            if poll.poll(1):
                return NEVER_ATTACHED
    while True:
        lives = pool.owner_lives()
        assert set(pool.pages[: PAGES // 2].unique().tolist()) <= {0, stamp}
        pool.pages[own_pages].fill_(stamp + lives)
        assert (pool.pages[own_pages] == stamp + lives).all()
        if not lives:
            return LIVED_ON


def forked(function, *arguments) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = function(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def names() -> list[str]:
    return re.findall(r"@kvkernels:\S*", Path("/proc/net/unix").read_text())


def mappings(name: str) -> int:
    """Of any process, of the memory of a name."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            found += path.read_text().count(f"/memfd:{name}")
        except OSError:  # the process has ended, or is another's
            continue
    return found


def main() -> None:
    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    name = f"kill-{os.getpid()}"
    counts = {"kills": 0, "lived on": 0, "never attached": 0, "failed": 0, "names left": 0, "mappings left": 0}
    for i in range(kills):
        owner_ends, of_owner = os.pipe()
        owner = forked(own, name, 1 + i % 200)
        os.close(of_owner)
        attachers = [forked(attach, name, 1 + i % 200, part, owner_ends) for part in (slice(32, 48), slice(48, 64))]
        os.close(owner_ends)
        time.sleep(rng.choice((0.02, 0.2)) * rng.random())
        os.kill(owner, signal.SIGKILL)
        counts["kills"] += os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == -signal.SIGKILL
        # No attacher has the name, so that another owner can begin at once.
        counts["names left"] += sum(found.endswith(name) for found in names())
        for attacher in attachers:
            code = os.waitstatus_to_exitcode(os.waitpid(attacher, 0)[1])
            counts[{LIVED_ON: "lived on", NEVER_ATTACHED: "never attached"}.get(code, "failed")] += 1
        counts["mappings left"] += mappings(name)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
