"""Random transfers from four threads end in the bytes that a slow model of the rules gives.

KVKERNELS_MOVER_SUBMISSIONS sets how many; a million take some minutes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from mover_model import THREADS, Sent, round_of

import kvkernels
from kvkernels.registration import LIBRARY
from kvkernels.transfer import GatherJob, Job, Mover, PreparedJob, ScatterJob, SwapJob

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")

SUBMISSIONS = int(os.environ.get("KVKERNELS_MOVER_SUBMISSIONS", "6000"))
A_ROUND = 1500  # submissions, after which all bytes are compared
BLOCKS = 24
PAGES = (16, 200, 4096, 100_000)  # bytes of a page of the four families of pools


@dataclass
class World:
    """Pools, and what they must hold."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    model: list[np.ndarray] = field(default_factory=list)

    def add(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor)
        self.model.append(tensor.numpy().copy())
        return len(self.tensors) - 1


class Family:
    """Two layers, their copies and a buffer, all of one page size."""

    def __init__(self, world: World, page: int) -> None:
        self.world, self.page = world, page
        both = torch.randint(0, 255, (BLOCKS, 2, page), dtype=torch.uint8)
        # Keys and values side by side in one tensor, and pools of their own.
        self.near = [world.add(both[:, i]) for i in range(2)]
        self.far = [world.add(torch.randint(0, 255, (BLOCKS, page), dtype=torch.uint8)) for _ in range(2)]
        self.buffer = world.add(torch.randint(0, 255, (6, 2 * page), dtype=torch.uint8))
        of = [[world.tensors[i] for i in side] for side in (self.near, self.far)]
        self.copies = (kvkernels.prepare(*of), kvkernels.prepare(*of[::-1]))

    def job(self, random: np.random.Generator) -> tuple[Job, Callable[[], None], set, set]:
        count = int(random.integers(1, 6))
        ids, others = (random.permutation(BLOCKS)[:count].tolist() for _ in range(2))
        tensors, model = self.world.tensors, self.world.model
        kind = int(random.integers(0, 4))
        if kind == 0:
            way = int(random.integers(0, 2))
            src, dst = (self.near, self.far)[:: 1 - 2 * way]
            layer = None if random.integers(0, 2) else int(random.integers(0, 2))
            used = [0, 1] if layer is None else [layer]

            def copy() -> None:
                for i in used:
                    model[dst[i]][others] = model[src[i]][ids]

            pairs = torch.tensor(list(zip(ids, others, strict=True)))
            reads, writes = {(src[i], b) for i in used for b in ids}, {(dst[i], b) for i in used for b in others}
            return PreparedJob(self.copies[way], pairs, layer), copy, reads, writes
        if kind == 1:
            src, dst = (int(i) for i in random.permutation([*self.far, self.near[0]])[:2])

            def swap() -> None:
                model[dst][others] = model[src][ids]

            pairs = torch.tensor(list(zip(ids, others, strict=True)))
            return (SwapJob(tensors[src], tensors[dst], self.page, pairs), swap,
                    {(src, b) for b in ids}, {(dst, b) for b in others})  # fmt: skip
        side = (self.near, self.far)[int(random.integers(0, 2))]
        pools = [tensors[i] for i in side]
        rows = {(self.buffer, row) for row in range(count)}
        pages = {(i, b) for i in side for b in ids}
        if kind == 2:

            def gather() -> None:
                model[self.buffer][:count] = np.concatenate([model[i][ids] for i in side], axis=1)

            return GatherJob(pools, torch.tensor(ids), tensors[self.buffer][:count]), gather, pages, rows

        def scatter() -> None:
            for place, i in enumerate(side):
                model[i][ids] = model[self.buffer][:count, place * self.page : (place + 1) * self.page]

        return ScatterJob(tensors[self.buffer][:count], torch.tensor(ids), pools), scatter, rows, pages


class Client:
    """One thread's submissions."""

    def __init__(self, mover: Mover, families: list[Family], world: World, seed: int) -> None:
        self.mover, self.families, self.world = mover, families, world
        self.random = np.random.default_rng(seed)
        self.sent: list[Sent] = []
        self.error: BaseException | None = None

    def run(self, count: int) -> None:
        try:
            while len(self.sent) < count:
                # Most transfers end sooner than the next is submitted: now and then many wait for each other.
                with self.mover.held() if self.random.random() < 0.1 else nullcontext():
                    for _ in range(int(self.random.integers(1, 30))):
                        self.step()
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        random = self.random
        after = [self.sent[int(i)] for i in random.integers(0, len(self.sent), 2)] if self.sent else []
        after = after[: int(random.choice([0, 0, 0, 1, 2]))]
        priority = str(random.choice(["expedited", "load", "store"]))
        others = [one.transfer for one in after]
        family = self.families[int(random.choice(len(self.families), p=[0.4, 0.3, 0.2, 0.1]))]
        if random.random() < 0.03:
            dst = int(random.choice(family.far))
            doomed = torch.zeros(BLOCKS, family.page, dtype=torch.uint8)
            job = SwapJob(doomed, self.world.tensors[dst], family.page, torch.tensor([[0, 3], [1, 7]]))
            with self.mover.held():
                transfer = self.mover.submit(job, priority=priority, after=others)
                doomed.untyped_storage().resize_(0)
            sent = Sent(transfer, lambda: None, set(), {(dst, 3), (dst, 7)}, [], is_doomed=True)
        else:
            job, apply, reads, writes = family.job(random)
            transfer = self.mover.submit(job, priority=priority, after=others)
            sent = Sent(transfer, apply, reads, writes, [])
        sent.after = [one.ticket for one in others]
        self.sent.append(sent)
        roll = random.random()
        if roll < 0.05:
            one = self.sent[-1 - int(random.integers(0, min(5, len(self.sent))))]
            one.is_cancelled |= one.transfer.cancel()
        elif roll < 0.08:
            transfer.wait(0.001 if self.random.random() < 0.5 else 0)
        elif roll < 0.12:
            self.mover.poll()


@pytest.mark.parametrize("lanes", [1, 3])
def test_random_transfers_end_in_the_models_bytes(lanes):
    world = World()
    families = [Family(world, page) for page in PAGES]
    states: Counter[str] = Counter()
    with Mover(lanes=lanes, chunk_bytes=64 << 10) as mover:
        for round_ in range(max(1, SUBMISSIONS // 2 // A_ROUND)):
            clients = [Client(mover, families, world, 1000 * round_ + i) for i in range(THREADS)]
            states += round_of(mover, clients, A_ROUND, world.tensors, world.model)
        assert mover.stats()["queued"] == mover.stats()["running"] == 0
    assert set(states) == {"done", "failed", "cancelled"} and states["done"] > sum(states.values()) / 2
