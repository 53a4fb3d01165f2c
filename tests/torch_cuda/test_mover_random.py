"""Random transfers between pools on a device and on the host, from four threads with streams of their own.

The model knows no streams: a transfer that is done did what it says, all of them in order of submission.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from mover_model import THREADS, Sent, round_of
from torch_cuda.transfers import device, host

import kvkernels
from kvkernels.transfer import (
    GatherJob,
    Job,
    Mover,
    PreparedJob,
    ScatterJob,
    SwapJob,
    Transfer,
    TransferCancelled,
    TransferFailed,
)

pytestmark = pytest.mark.cuda

# KVKERNELS_MOVER_SUBMISSIONS=100000 takes minutes.
SUBMISSIONS = int(os.environ.get("KVKERNELS_MOVER_SUBMISSIONS", "2000"))
A_ROUND = 400  # submissions, after which all bytes are compared
BLOCKS, PAGE = 16, 48


class World:
    """Two layers on the device and two on the host, a buffer on each side, and what they must hold."""

    def __init__(self) -> None:
        self.tensors = [device(blocks=BLOCKS, page=PAGE), device(blocks=BLOCKS, page=PAGE),
                        host(blocks=BLOCKS, page=PAGE), host(blocks=BLOCKS, page=PAGE),
                        device(blocks=6, page=2 * PAGE), host(blocks=6, page=2 * PAGE)]  # fmt: skip
        self.model = [tensor.cpu().numpy().copy() for tensor in self.tensors]
        near, far = self.tensors[:2], self.tensors[2:4]
        self.copies = {(0, 2): kvkernels.prepare(near, far), (2, 0): kvkernels.prepare(far, near, executor="dma")}

    def job(self, random: np.random.Generator) -> tuple[Job, Callable[[], None], set, set]:
        count = int(random.integers(1, 6))
        ids, others = (random.permutation(BLOCKS)[:count].tolist() for _ in range(2))
        pairs, model, tensors = torch.tensor(list(zip(ids, others, strict=True))), self.model, self.tensors
        kind = int(random.integers(0, 4))
        if kind == 0:
            src, dst = ((0, 2), (2, 0))[int(random.integers(0, 2))]

            def copy() -> None:
                for i in range(2):
                    model[dst + i][others] = model[src + i][ids]

            return (PreparedJob(self.copies[src, dst], pairs), copy, {(src + i, b) for i in range(2) for b in ids},
                    {(dst + i, b) for i in range(2) for b in others})  # fmt: skip
        if kind == 1:
            src, dst = ((0, 1), (1, 0), (0, 2), (2, 1), (1, 3), (3, 0))[int(random.integers(0, 6))]

            def swap() -> None:
                model[dst][others] = model[src][ids]

            executor = str(random.choice(["auto", "kernel", "dma"]))
            job = SwapJob(tensors[src], tensors[dst], PAGE, pairs, executor)
            return job, swap, {(src, b) for b in ids}, {(dst, b) for b in others}
        side, buffer = ((0, 4), (0, 5), (2, 4))[int(random.integers(0, 3))]
        rows, pages = {(buffer, row) for row in range(count)}, {(side + i, b) for i in range(2) for b in ids}
        if kind == 2:

            def gather() -> None:
                model[buffer][:count] = np.concatenate([model[side + i][ids] for i in range(2)], axis=1)

            job_of = GatherJob(tensors[side : side + 2], torch.tensor(ids), tensors[buffer][:count])
            return job_of, gather, pages, rows

        def scatter() -> None:
            for i in range(2):
                model[side + i][ids] = model[buffer][:count, i * PAGE : (i + 1) * PAGE]

        return ScatterJob(tensors[buffer][:count], torch.tensor(ids), tensors[side : side + 2]), scatter, rows, pages


class Client:
    """One thread's submissions, beside a stream in which something is always going on."""

    def __init__(self, mover: Mover, world: World, seed: int) -> None:
        self.mover, self.world = mover, world
        self.random = np.random.default_rng(seed)
        self.sent: list[Sent] = []
        self.error: BaseException | None = None

    def run(self, count: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                own, other = device(blocks=BLOCKS), host(blocks=BLOCKS)
                while len(self.sent) < count:
                    own.copy_(other, non_blocking=True)
                    self.step()
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        random = self.random
        after = [self.sent[int(i)] for i in random.integers(0, len(self.sent), 2)] if self.sent else []
        after = after[: int(random.choice([0, 0, 0, 1, 2]))]
        named: list[Transfer | torch.cuda.Event] = [one.transfer for one in after]
        if random.random() < 0.1:
            named.append(torch.cuda.Event())
            named[-1].record()
        job, apply, reads, writes = self.world.job(random)
        transfer = self.mover.submit(job, priority=str(random.choice(["expedited", "load", "store"])), after=named)
        self.sent.append(Sent(transfer, apply, reads, writes, [one.transfer.ticket for one in after]))
        roll = random.random()
        if roll < 0.1:
            one = self.sent[-1 - int(random.integers(0, min(5, len(self.sent))))]
            one.is_cancelled |= one.transfer.cancel()
        elif roll < 0.15:
            transfer.wait(0.001)
        elif roll < 0.2:
            self.mover.poll()
        elif roll < 0.3:
            with suppress(TransferFailed, TransferCancelled):
                self.sent[int(random.integers(0, len(self.sent)))].transfer.block_stream()


@pytest.mark.parametrize("chunk_bytes", [None, PAGE])
def test_random_transfers_end_in_the_models_bytes(sim, chunk_bytes):
    world = World()
    states: Counter[str] = Counter()
    with Mover("cuda:0", chunk_bytes=chunk_bytes) as mover:
        for round_ in range(max(1, SUBMISSIONS // 2 // A_ROUND)):
            if sim is not None:
                sim.adversarial(1 + round_)
            clients = [Client(mover, world, 1000 * round_ + i) for i in range(THREADS)]
            states += round_of(mover, clients, A_ROUND, world.tensors, world.model)
        assert mover.stats()["queued"] == mover.stats()["running"] == 0
    assert set(states) == {"done", "failed", "cancelled"} and states["done"] > sum(states.values()) / 2
