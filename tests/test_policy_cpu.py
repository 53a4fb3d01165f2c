"""What a file may say of copies on the host: ranges, and bytes that are right whatever it says."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import kvkernels
from kvkernels import policy
from kvkernels.policy import cpu
from kvkernels.registration import LIBRARY
from kvkernels.transfer import CopyPagesJob, Mover

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="no compiled library goes by numbers")

MOST = (1 << 63) - 1
RANGES = {
    "lanes": (1, 1024), "serial_bytes": (0, MOST), "stream_pool_bytes": (0, MOST), "stream_soon_read_bytes": (0, MOST),
    "piece_bytes": (4096, 1 << 30), "rows_interleave_from_bytes": (256, MOST),
}  # fmt: skip


@pytest.fixture(autouse=True)
def goes_back():
    with policy.trying():
        yield


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_taken_and_what_is_beyond_is_not(name):
    least, most = RANGES[name]
    for value in (least, most):
        assert cpu.checked("here", {name: value, "comment": "why"}) == {name: value}
        cpu.serve({name: value}, "a test")
        assert cpu.in_force()[name] == value
    for value in (least - 1, most + 1, 5000.0, "5000", None, True):
        with pytest.raises(ValueError) as raised:
            cpu.checked("here", {name: value})
        assert str(raised.value) == f"here.{name} must be an integer from {least} to {most}, got {value!r}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"interleave": 3}, "here.interleave must be 2 or 4, got 3"),
        ({"interleave": 2.0}, "here.interleave must be 2 or 4, got 2.0"),
        ({"writes_rows": 1}, "here.writes_rows must be true or false, got 1"),
        ({"prefetches_within": "no"}, "here.prefetches_within must be true or false, got 'no'"),
        ([], "here must be an object, got []"),
        ({"lane": 1}, f"here must have the keys {', '.join(cpu.NAMES)} and comment alone, got 'lane'"),
    ],
)
def test_what_is_no_number_of_ours(given, message):
    with pytest.raises(ValueError) as raised:
        cpu.checked("here", given)
    assert str(raised.value) == message


def test_what_is_out_of_range_never_gets_past_the_library():
    """Whoever calls the private op."""
    before = cpu.in_force()
    numbers = torch.full((len(cpu.NAMES),), -1)
    ranges = {**RANGES, "lanes": (1, (1 << 31) - 1), "interleave": (2, 4)} | dict.fromkeys(cpu.WORDS, (0, 1))
    for i, name in enumerate(cpu.NAMES):
        least, most = ranges[name]
        for value in {-2, least - 1, most + 1} - {-1, MOST + 1}:
            wrong = numbers.clone()
            wrong[i] = value
            with pytest.raises(ValueError) as raised:
                torch.ops.kvkernels._set_cpu_numbers(wrong, "")
            assert str(raised.value) == f"_set_cpu_numbers: {name} must be from {least} to {most}, got {value}"
    start = f"_set_cpu_numbers: numbers must be contiguous int64 of shape [{len(cpu.NAMES)}] on the cpu, got "
    for wrong in (numbers.int(), numbers[1:], numbers[None], torch.full((2 * len(numbers),), -1)[::2]):
        with pytest.raises(ValueError) as raised:
            torch.ops.kvkernels._set_cpu_numbers(wrong, "")
        assert str(raised.value).startswith(start)
    assert cpu.in_force() == before


def test_the_variable_replaces_a_file_s_limits_too(monkeypatch):
    monkeypatch.setenv("KVKERNELS_STREAM_BYTES", "12345")
    cpu.serve({"stream_pool_bytes": 7, "lanes": 3}, "a test")
    found = cpu.in_force()
    assert (found["stream_pool_bytes"], found["stream_soon_read_bytes"], found["lanes"]) == (12345, 12345, 3)


TOKENS, HEADS, BLOCKS = 8, 4, 24


def run_rows(kind: str, size: int) -> tuple[list[int], list[int], list[list[int]]]:
    """Pages of the pools on both sides, and runs: whole pages, two shards joined or split, heads before tokens."""
    half, whole = TOKENS * size, 2 * TOKENS * size
    ends = [0, 0, 1, 0, 0, 1, 0, 0, TOKENS]
    if kind == "pages":
        return [whole], [whole], [[0, 0, 0, 0, whole, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]]
    if kind == "join":
        return [half, half], [whole], [[i, 0, 0, i * size, size, *ends, size, 2 * size] for i in range(2)]
    if kind == "split":
        return [whole], [half, half], [[0, i, i * size, 0, size, *ends, 2 * size, size] for i in range(2)]
    page = TOKENS * HEADS * size
    loops = [1, 0, 0, TOKENS, HEADS * size, size, HEADS, size, TOKENS * size]
    return [page], [page], [[0, 0, 0, 0, size, 0, 0, *loops]]


class Copied:
    """A case with random bytes, and what must come of it, by numpy alone."""

    def __init__(self, kind: str, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        src_pages, dst_pages, rows = run_rows(kind, size)
        draw = [torch.randint(0, 256, (BLOCKS, page + 32), dtype=torch.uint8, generator=generator)
                for page in (*src_pages, *dst_pages)]  # fmt: skip
        self.whole_src, self.whole_dst = draw[: len(src_pages)], draw[len(src_pages) :]
        # Guard bytes behind each page.
        self.src = [one[:, :page] for one, page in zip(self.whole_src, src_pages, strict=True)]
        self.dst = [one[:, :page] for one, page in zip(self.whole_dst, dst_pages, strict=True)]
        ids = random.Random(seed)
        pairs = list(zip(ids.sample(range(BLOCKS), 17), ids.sample(range(BLOCKS), 17), strict=True))
        self.mapping, self.rows = torch.tensor(pairs), torch.tensor(rows)
        self.before = [one.clone() for one in self.whole_dst]
        self.untouched = [one.clone() for one in self.whole_src]
        self.expected = [one.clone() for one in self.whole_dst]
        for i, j, src_at, dst_at, count, _, _, *loops in rows:
            nest = [loops[k : k + 3] for k in (0, 3, 6)]
            for steps in itertools.product(*(range(extent) for extent, _, _ in nest)):
                a = src_at + sum(step * loop[1] for step, loop in zip(steps, nest, strict=True))
                b = dst_at + sum(step * loop[2] for step, loop in zip(steps, nest, strict=True))
                for block, other in pairs:
                    self.expected[j][other, b : b + count] = self.whole_src[i][block, a : a + count]

    def run(self) -> None:
        kvkernels.copy_pages(self.src, self.dst, self.mapping, self.rows)

    def check(self, what: object) -> None:
        assert all(map(torch.equal, self.whole_dst, self.expected)), what
        assert all(map(torch.equal, self.whole_src, self.untouched)), what
        for one, before in zip(self.whole_dst, self.before, strict=True):
            one.copy_(before)


CASES = [("pages", 513), ("pages", 1024), ("join", 1024), ("join", 200), ("split", 2048), ("strips", 128),
         ("strips", 64)]  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_bytes_are_right_with_every_setting(kind, size):
    case = Copied(kind, size, seed=size)
    threads = torch.get_num_threads()
    choices = itertools.product((2, 4), (4096, 1 << 20), (False, True), (False, True), (256, 1024, MOST), (0, MOST))
    try:
        torch.set_num_threads(3)
        for number, (interleave, piece, prefetches, writes_rows, rows_from, stream) in enumerate(choices):
            given = {
                "interleave": interleave, "piece_bytes": piece, "prefetches_within": prefetches,
                "prefetches_strips": not prefetches, "writes_rows": writes_rows,
                "rows_interleave_from_bytes": rows_from, "stream_pool_bytes": stream, "serial_bytes": 0,
                "lanes": 1 + number % 3,
            }  # fmt: skip
            cpu.serve(given, "a test")
            assert {name: cpu.in_force()[name] for name in given} == given
            case.run()
            case.check(given)
    finally:
        torch.set_num_threads(threads)


def test_a_transfer_that_was_taken_is_cut_by_one_tuning_whatever_is_set_meanwhile():
    """Rows of two shards are cut elsewhere than shards one after the other: a mix of both would leave bytes out."""
    blocks, tokens, size = 512, 16, 512
    shards = [torch.randint(0, 256, (blocks, tokens * size), dtype=torch.uint8) for _ in range(2)]
    joined = torch.zeros(blocks, 2 * tokens * size, dtype=torch.uint8)
    order = torch.randperm(blocks)
    rows = [[i, 0, 0, i * size, size, 0, 0, 1, 0, 0, 1, 0, 0, tokens, size, 2 * size] for i in range(2)]
    job = CopyPagesJob(shards, [joined], torch.stack([torch.arange(blocks), order], dim=1), torch.tensor(rows))
    changes = 0
    with Mover(lanes=1, chunk_bytes=size) as mover:
        for _ in range(50):  # where another program has the core, a transfer may end before the first change
            if changes > 1:
                break
            joined.zero_()
            cpu.serve({"writes_rows": True, "stream_pool_bytes": 0}, "a test")
            transfer = mover.submit(job)
            while not transfer.done():
                with mover.held():
                    cpu.serve({"writes_rows": bool(changes % 2), "stream_pool_bytes": 0}, "a test")
                changes += transfer.state == "running"
            assert transfer.result().chunks == 2 * blocks * tokens
            by_halves = joined[order].view(blocks, tokens, 2, size)
            for i, shard in enumerate(shards):
                assert torch.equal(by_halves[:, :, i], shard.view(blocks, tokens, size)), i
    assert changes > 1
