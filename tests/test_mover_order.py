"""Transfers that touch one page keep their order, and no others do: whatever pools, views and layouts they come by."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import kvkernels
from kvkernels.registration import LIBRARY
from kvkernels.transfer import CopyPagesJob, GatherJob, Job, Mover, PreparedJob, ScatterJob, SwapJob

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")

LONG = 30.0


def pool(blocks: int = 8, page: int = 64) -> torch.Tensor:
    return torch.randint(1, 255, (blocks, page), dtype=torch.uint8)


def swap(src: torch.Tensor, dst: torch.Tensor, *pairs: tuple[int, int]) -> SwapJob:
    return SwapJob(src, dst, src[0].numel() * src.element_size(), torch.tensor(pairs))


def overtakes(first: Job, second: Job) -> bool:
    """Whether a load that is submitted after a store is carried out before it."""
    with Mover(lanes=1) as mover:
        with mover.held():
            sent = [mover.submit(first, priority="store"), mover.submit(second, priority="load")]
        assert mover.drain(timeout=LONG)
        ran = [chunk[0] for chunk in mover._owner.trace()]
    assert sorted(ran) == [one.ticket for one in sent]
    return ran[0] == sent[1].ticket


A, B, C = pool(), pool(), pool()
KINDS = {
    "reads what it writes": (swap(A, B, (0, 3)), swap(B, C, (3, 0)), True),
    "writes what it reads": (swap(A, B, (2, 3)), swap(C, A, (5, 2)), True),
    "writes what it writes": (swap(A, B, (2, 3)), swap(C, B, (5, 3)), True),
    "reads what it reads": (swap(A, B, (2, 3)), swap(A, C, (2, 3)), False),
    "other blocks": (swap(A, B, (0, 3)), swap(B, C, (4, 0)), False),
    "one block of many": (swap(A, B, *((i, i) for i in range(8))), swap(B, C, (7, 0)), True),
    "other pools": (swap(A, B, (0, 3)), swap(pool(), C, (3, 0)), False),
    "inside one pool": (swap(A, A, (0, 3)), swap(A, A, (3, 5)), True),
    "rows of a gather": (GatherJob([A], torch.tensor([1, 2]), B[:2]), swap(B, C, (1, 0)), True),
    "rows of another": (GatherJob([A], torch.tensor([1, 2]), B[:2]), swap(B, C, (2, 0)), False),
    "a scatter": (ScatterJob(A[:2], torch.tensor([6, 4]), [B]), swap(B, C, (4, 0)), True),
    "apart from a scatter": (ScatterJob(A[:2], torch.tensor([6, 4]), [B]), swap(B, C, (5, 0)), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transfers_that_touch_one_page_keep_their_order(kind):
    first, second, is_ordered = KINDS[kind]
    assert overtakes(first, second) is not is_ordered


def test_the_one_before_becomes_as_urgent_as_who_waits_for_it():
    with Mover(lanes=1) as mover:
        a, b, c, d = (pool() for _ in range(4))
        with mover.held():
            other = mover.submit(swap(pool(), pool(), (0, 0)), priority="store")
            first = mover.submit(swap(a, b, (0, 0)), priority="store")
            middle = mover.submit(swap(b, c, (0, 0)), priority="store")
            load = mover.submit(swap(pool(), pool(), (0, 0)), priority="load")
            last = mover.submit(swap(c, d, (0, 0)), priority="expedited")
        assert mover.drain(timeout=LONG)
        ran = [chunk[0] for chunk in mover._owner.trace()]
        assert ran == [one.ticket for one in (first, middle, last, load, other)]


def test_a_transfer_waits_for_all_that_it_needs():
    """Also for the last chunk of an earlier one, while another thread has nothing left to do."""
    src, mid = pool(64, 1 << 20), torch.zeros(64, 1 << 20, dtype=torch.uint8)
    far = torch.zeros(2, 1 << 20, dtype=torch.uint8)
    copy = kvkernels.prepare([src], [mid])
    with Mover(lanes=2, chunk_bytes=32 << 20) as mover:
        for _ in range(12):
            mid.zero_()
            with mover.held():
                named = mover.submit(swap(pool(), pool(), (0, 0)), priority="load")
                mover.submit(PreparedJob(copy, torch.arange(64).repeat(2, 1).T), priority="load")
                last = mover.submit(swap(mid, far, (31, 0), (63, 1)), priority="load", after=[named])
            assert last.result(LONG).state == "done"
            assert torch.equal(far[0], src[31]) and torch.equal(far[1], src[63])


def test_key_and_value_side_by_side_in_one_tensor_are_apart():
    both = torch.randint(1, 255, (8, 2, 64), dtype=torch.uint8)
    key, value = both[:, 0], both[:, 1]
    copies = [kvkernels.prepare([part], [pool()]) for part in (key, value)]
    back = [kvkernels.prepare([pool()], [part]) for part in (key, value)]
    one = torch.tensor([[3, 3]])
    for i, j in itertools.product(range(2), repeat=2):
        assert overtakes(PreparedJob(copies[i], one), PreparedJob(back[j], one)) is (i != j)
        assert overtakes(PreparedJob(back[i], one), PreparedJob(copies[j], one)) is (i != j)


def test_a_layer_is_apart_from_another():
    src, dst = [pool() for _ in range(4)], [pool() for _ in range(4)]
    copy, back = kvkernels.prepare(src, dst), kvkernels.prepare(dst, src)
    one = torch.tensor([[3, 3]])
    for i, j in [(0, 0), (0, 1), (2, 3), (3, 3)]:
        assert overtakes(PreparedJob(copy, one, i), PreparedJob(back, one, j)) is (i != j)
        assert not overtakes(PreparedJob(copy, one), PreparedJob(back, one, j))


def test_sub_blocks_are_kept_in_order_by_their_block():
    src, dst = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 64, dtype=torch.uint8)
    runs = torch.tensor([[0, 0, 0, 0, 16, 16, 16, *(1, 0, 0) * 3]])
    slots = [CopyPagesJob([src], [dst], torch.tensor([[0, 4 * block]]), runs, 4, 4) for block in range(4)]
    for block in range(4):
        assert overtakes(slots[2], swap(dst, pool(), (block, 0))) is (block != 2)


def views_of(base: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Rows of a buffer: any offset, stride and page, so that blocks of two views overlap in any way."""
    page, stride = int(random.integers(1, 40)), int(random.integers(1, 60))
    stride = max(page, stride)
    offset = int(random.integers(0, 200))
    blocks = int(random.integers(1, 1 + (len(base) - offset - page) // stride))
    return base[offset:].as_strided((blocks, page), (stride, 1))


def touched(view: torch.Tensor, base: torch.Tensor, blocks: list[int]) -> set[int]:
    first = view.data_ptr() - base.data_ptr()
    return {first + block * view.stride(0) + i for block in blocks for i in range(view.shape[1])}


@pytest.mark.parametrize("seed", range(40))
def test_any_two_views_are_ordered_where_a_page_of_theirs_meets(seed):
    random = np.random.default_rng(seed)
    base = torch.zeros(2000, dtype=torch.uint8)
    for _ in range(10):
        jobs, bytes_of = [], []
        for _ in range(2):
            view = views_of(base, random)
            blocks = random.permutation(len(view))[: random.integers(1, 6)].tolist()
            other = torch.zeros(len(blocks), view.shape[1], dtype=torch.uint8)
            writes = bool(random.integers(0, 2))
            rows = torch.tensor([(block, i) for i, block in enumerate(blocks)])
            run = torch.tensor([[0, 0, 0, 0, view.shape[1], 0, 0, *(1, 0, 0) * 3]])
            jobs.append(
                CopyPagesJob([other], [view], rows.flip(1), run) if writes else CopyPagesJob([view], [other], rows, run)
            )
            bytes_of.append((touched(view, base, blocks), writes))
        (a, a_writes), (b, b_writes) = bytes_of
        meets = bool(a & b) and (a_writes or b_writes)
        assert overtakes(*jobs) is not meets, (bytes_of, seed)
