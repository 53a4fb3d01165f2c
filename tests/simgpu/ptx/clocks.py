"""Who knows of whose past: vector clocks, kept only where threads synchronise.

Every agent has a clock. Thread t of T is agent t. Asynchronous copies form chains, of which whoever waits for a copy
has waited for all earlier ones: a thread's cp.async, its bulk groups, and the bulk copies that one mbarrier counts.
A chain has two agents: one for what its copies read and one for what they write.

    agents   | threads | chain kind 0: readers | writers | kind 1: readers | writers | ...
              0       T                        2 T       3 T               4 T

A row says of one thread up to which tick of each agent of its block it has been told; ticks of other blocks' agents are
kept aside, since few kernels synchronise across blocks.

    an access (agent u, tick c) happened before thread t's next one  <=>  u == t, or t was told of u up to c or later
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Knowledge:
    """What a release hands over: a row for each block that it knows of."""

    rows: dict[int, np.ndarray] = field(default_factory=dict)

    def merge(self, other: Knowledge) -> None:
        for block, row in other.rows.items():
            mine = self.rows.get(block)
            self.rows[block] = row.copy() if mine is None else np.maximum(mine, row)


class Clocks:
    def __init__(self, blocks: int, block_threads: int, chain_kinds: int) -> None:
        """A block has a chain of each kind for every thread."""
        self.block_threads = block_threads
        self.threads = blocks * block_threads
        self.chain_kinds = chain_kinds
        # The tick that an access of the thread is stamped with, and that of a chain's last copy.
        self.now = np.ones(self.threads, np.int32)
        self.copies: dict[int, int] = defaultdict(int)
        self._rows: dict[int, np.ndarray] = {}  # of a block: [thread, agent]
        self._abroad: dict[int, dict[int, np.ndarray]] = {}  # of a thread: rows of other blocks

    def chain(self, kind: int, thread: int) -> int:
        return kind * self.threads + thread

    def reader(self, chain: int) -> int:
        kind, thread = divmod(chain, self.threads)
        return (1 + 2 * kind) * self.threads + thread

    def writer(self, chain: int) -> int:
        return self.reader(chain) + self.threads

    def column(self, agents: np.ndarray) -> np.ndarray:
        """The agents' places in their block's rows."""
        thread = agents % self.threads
        return agents // self.threads * self.block_threads + thread % self.block_threads

    def rows(self, block: int) -> np.ndarray:
        found = self._rows.get(block)
        if found is None:
            found = self._rows[block] = np.zeros(
                (self.block_threads, (1 + 2 * self.chain_kinds) * self.block_threads), np.int32
            )
        return found

    def _row(self, thread: int) -> np.ndarray:
        """With its own clock brought up to date."""
        block, local = divmod(thread, self.block_threads)
        row = self.rows(block)[local]
        row[local] = self.now[thread]
        return row

    def ordered(self, agents: np.ndarray, ticks: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Whether each access (agent, tick) is known to the thread of the same place."""
        known = agents == threads
        block = threads // self.block_threads
        their_block = agents % self.threads // self.block_threads
        columns = self.column(agents)
        for b in np.unique(block[~known]):
            rows = self._rows.get(int(b))
            here = ~known & (block == b)
            if rows is not None:
                mine = here & (their_block == b)
                known[mine] = rows[threads[mine] % self.block_threads, columns[mine]] >= ticks[mine]
        for i in np.flatnonzero(~known & (block != their_block)) if self._abroad else ():
            row = self._abroad.get(int(threads[i]), {}).get(int(their_block[i]))
            known[i] = row is not None and row[columns[i]] >= ticks[i]
        return known

    def known_to(self, knowledge: Knowledge, agents: np.ndarray, ticks: np.ndarray) -> np.ndarray:
        """The same for an asynchronous copy, which knows what its thread knew when it issued it."""
        known = np.zeros(len(agents), bool)
        their_block = agents % self.threads // self.block_threads
        columns = self.column(agents)
        for block, row in knowledge.rows.items():
            here = their_block == block
            known[here] = row[columns[here]] >= ticks[here]
        return known

    def snapshot(self, thread: int) -> Knowledge:
        block = thread // self.block_threads
        rows = {b: row.copy() for b, row in self._abroad.get(thread, {}).items()}
        rows[block] = self._row(thread).copy()
        return Knowledge(rows)

    def release(self, thread: int) -> Knowledge:
        """What the thread knows; what it does from now on is later."""
        knowledge = self.snapshot(thread)
        self.now[thread] += 1
        return knowledge

    def acquire(self, thread: int, knowledge: Knowledge) -> None:
        mine = thread // self.block_threads
        for block, row in knowledge.rows.items():
            if block == mine:
                np.maximum(self._row(thread), row, out=self._row(thread))
                continue
            abroad = self._abroad.setdefault(thread, {})
            abroad[block] = np.maximum(abroad[block], row) if block in abroad else row.copy()

    def learn(self, thread: int, agent: int, tick: int) -> None:
        row = self._row(thread)
        column = self.column(np.array([agent]))[0]
        row[column] = max(row[column], tick)

    def join(self, releasing: np.ndarray, acquiring: np.ndarray) -> None:
        """A barrier of one block: all that the first know, the second know after it."""
        block = int(releasing[0]) // self.block_threads
        rows = self.rows(block)
        local = releasing % self.block_threads
        rows[local, local] = self.now[releasing]
        together = rows[local].max(axis=0)
        told = acquiring % self.block_threads
        rows[told] = np.maximum(rows[told], together)
        self.now[releasing] += 1
        self._join_abroad(releasing, acquiring)

    def _join_abroad(self, releasing: np.ndarray, acquiring: np.ndarray) -> None:
        if not self._abroad:
            return
        together = Knowledge()
        for thread in releasing.tolist():
            together.merge(Knowledge(self._abroad.get(thread, {})))
        for thread in acquiring.tolist() if together.rows else ():
            self.acquire(thread, together)
