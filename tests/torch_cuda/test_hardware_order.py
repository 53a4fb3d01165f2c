"""Calls between torch's own kernels, on one stream, on three and from many threads: what is queued happens in order.

On a GPU a spinning kernel delays what comes first, so that whoever does not wait for it is early. The stand-in delays
everything, at random, and copies take the place of torch's kernels.
"""

from __future__ import annotations

import threading

import pytest
import torch
from simgpu.sim import Sim
from torch import Tensor
from torch_cuda.hardware import (
    DIRECTIONS,
    EXECUTORS,
    ON_STAND_IN,
    WORKSHOP,
    Shape,
    on_stream,
    random_bytes,
    random_mapping,
    refusal_of,
    scaled,
    spin,
    whole_pages,
)

import kvkernels

pytestmark = pytest.mark.cuda(gib=4)

SHAPE = Shape(pools=4, blocks=scaled(400, 12), page_bytes=4096)
ROUNDS = scaled(20, 10)
SPIN_MS = 5


def _memory(place: str) -> Tensor:
    if place == "d":
        return torch.empty(SHAPE.bytes, dtype=torch.uint8, device="cuda")
    return torch.empty(SHAPE.bytes, dtype=torch.uint8, pin_memory=True)


def _move(values: Tensor, out: Tensor) -> None:
    """On the current stream; inside a GPU by a kernel of torch's, over the link by the copy engine."""
    if ON_STAND_IN or not (values.is_cuda and out.is_cuda):
        out.copy_(values, non_blocking=True)
    else:
        torch.bitwise_or(values, 0, out=out)


class Chain:
    """A source, a destination, what is written to the one and read from the other, and the call between them."""

    def __init__(self, direction: str, executor: str) -> None:
        self.source, self.destination = _memory(direction[0]), _memory(direction[-1])
        self.values, self.rubbish, self.seen = (_memory("d") for _ in range(3))
        self.rubbish.copy_(random_bytes(SHAPE.bytes))
        self.direction, self.executor = direction, executor
        self.draw()

    def draw(self, sim: Sim | None = None, seed: int = 0) -> None:
        """Other values and ids than before, which are there when it returns; on the stand-in, other times as well."""
        self.wanted = random_bytes(SHAPE.bytes)
        self.values.copy_(self.wanted)
        self.mapping = random_mapping(SHAPE.blocks // 2, SHAPE.blocks, SHAPE.blocks)
        torch.cuda.synchronize()
        if sim is not None:
            sim.adversarial(seed + 1)

    def write(self) -> None:
        _move(self.values, self.source)

    def copy(self) -> None:
        pools = SHAPE.on(self.source), SHAPE.on(self.destination)
        kvkernels.copy_pages(*pools, self.mapping, whole_pages(SHAPE), executor=self.executor)

    def read(self) -> None:
        _move(self.destination, self.seen)

    def is_right(self) -> bool:
        """Whether the pages that were read are those which were written."""
        src_ids, dst_ids = self.mapping.to(WORKSHOP).unbind(1)
        pages = zip(SHAPE.on(self.wanted), SHAPE.on(self.seen.to(WORKSHOP)), strict=True)
        return all(torch.equal(got[dst_ids], wanted[src_ids]) for wanted, got in pages)


def _is_served(chain: Chain) -> bool:
    """Whether the executor serves the direction; staged goes over the link only, and must say so."""
    if (chain.direction, chain.executor) != ("d2d", "staged"):
        return True
    assert refusal_of(chain.copy) == "no side is in host memory"
    return False


def _then(first: torch.cuda.Stream, second: torch.cuda.Stream) -> None:
    """What is put on the second stream from now on comes after all that is on the first."""
    event = torch.cuda.Event()
    event.record(first)
    second.wait_event(event)


def each(test):
    """Every executor in every direction."""
    with_directions = pytest.mark.parametrize("direction", DIRECTIONS)(test)
    return pytest.mark.parametrize("executor", EXECUTORS)(with_directions)


@each
@pytest.mark.parametrize("stream", ["side", "default"])
def test_one_stream_is_in_order(sim, executor, direction, stream):
    """Written just before the call, overwritten just after it, read back behind that: round after round."""
    chain = Chain(direction, executor)
    if not _is_served(chain):
        return
    for round_ in range(ROUNDS):
        chain.draw(sim, round_)
        with torch.cuda.stream(on_stream(stream)):
            spin(1)
            chain.write()
            chain.copy()
            _move(chain.rubbish, chain.source)
            chain.read()
            _move(chain.rubbish, chain.destination)
        torch.cuda.synchronize()
        assert chain.is_right()


@each
def test_three_streams_that_wait_for_each_other(sim, executor, direction):
    chain = Chain(direction, executor)
    if not _is_served(chain):
        return
    writer, copier, reader = (torch.cuda.Stream() for _ in range(3))
    for round_ in range(ROUNDS):
        chain.draw(sim, round_)
        with torch.cuda.stream(writer):
            spin(1)
            chain.write()
        _then(writer, copier)
        with torch.cuda.stream(copier):
            chain.copy()
        _then(copier, reader)
        with torch.cuda.stream(reader):
            chain.read()
        torch.cuda.synchronize()
        assert chain.is_right()


@each
def test_without_waiting_some_round_is_wrong(sim, executor, direction):
    """So the test above can fail. Streams may share a queue of the hardware, hence several of them."""
    chain = Chain(direction, executor)
    if not _is_served(chain):
        return
    for round_ in range(30):
        writer, copier = torch.cuda.Stream(), torch.cuda.Stream()
        chain.draw(sim, round_)
        with torch.cuda.stream(writer):
            spin(SPIN_MS)
            chain.write()
        with torch.cuda.stream(copier):
            chain.copy()
            chain.read()
        torch.cuda.synchronize()
        if not chain.is_right():
            return
    pytest.fail("a call that does not wait for its source was right 30 times")


@pytest.mark.cuda(torch_kernels=True)
@each
def test_a_call_returns_before_the_stream_has_come_to_it(executor, direction):
    """On the stand-in, where nothing spins, test_devices.py counts the calls of CUDA that wait."""
    chain = Chain(direction, executor)
    if not _is_served(chain):
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain.write()
        chain.copy()  # what is loaded or allocated once
        torch.cuda.synchronize()
        spin(50)
        chain.copy()
        assert not stream.query()
        chain.read()
    torch.cuda.synchronize()
    assert chain.is_right()


def test_threads_with_streams_of_their_own():
    """Each thread has its buffers and its stream, and takes all executors in turns."""
    directions = ("h2d", "d2h", "d2d", "h2d")
    executors = ("kernel", "dma", "staged", "auto")
    wrong: list[object] = []
    start = threading.Barrier(len(directions))

    def run(thread: int) -> None:
        try:
            direction = directions[thread]
            mine = [e for e in executors if (direction, e) != ("d2d", "staged")]
            chains = [Chain(direction, executor) for executor in mine]
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                for round_ in range(ROUNDS):
                    spin(0.2)
                    for chain in chains:
                        chain.write()
                        chain.copy()
                        chain.read()
                    torch.cuda.current_stream().synchronize()
                    wrong.extend((thread, round_, c.executor) for c in chains if not c.is_right())
        except BaseException as error:
            start.abort()
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(directions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
