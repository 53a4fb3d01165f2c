"""Blocks beyond 2^31 and 2^32 bytes, on the device and in host memory: products of two 32-bit numbers would wrap.

On the stand-in the memory exists only where it is touched; so only blocks that matter are filled and looked at.
"""

from __future__ import annotations

import pytest
import torch
from plans import run_row, runs_tensor
from torch_cuda.hardware import (
    DIRECTIONS,
    EXECUTORS,
    KERNELS,
    POISON,
    RegisteredMemory,
    are_same,
    fill,
    random_bytes,
    refusal_of,
    scaled,
)

import kvkernels

# Two pools on the device, and one on the host that is source or destination.
pytestmark = pytest.mark.cuda(gib=10, host_gib=6)

BLOCK_BYTES = 48 << 10
BLOCKS = ((1 << 32) + (64 << 20)) // BLOCK_BYTES
POOL_BYTES = BLOCKS * BLOCK_BYTES
# Blocks that begin below, at and above 2^31 and 2^32 bytes, and the last one.
AT_2_31, AT_2_32 = (1 << 31) // BLOCK_BYTES, (1 << 32) // BLOCK_BYTES
FAR = [0, AT_2_31, AT_2_31 + 1, AT_2_32, AT_2_32 + 7, BLOCKS - 2, BLOCKS - 1]


@pytest.fixture(scope="module")
def pools():
    """By place and role, [block, byte]; those on the device are made when they are asked for."""
    memory = RegisteredMemory(POOL_BYTES)
    memory.register(0, POOL_BYTES)
    made = {"h": memory.bytes.view(BLOCKS, BLOCK_BYTES)}

    def pool(place: str, role: str) -> torch.Tensor:
        name = place if place == "h" else place + role
        if name not in made:
            made[name] = torch.empty(BLOCKS, BLOCK_BYTES, dtype=torch.uint8, device="cuda")
        return made[name]

    yield pool
    made.clear()
    memory.unregister()
    torch.cuda.empty_cache()


def _sides(pools, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    return pools(direction[0], "source"), pools(direction[-1], "destination")


def _beside(ids: list[int]) -> list[int]:
    """Neighbours of the blocks, and where they would be by 31 or 32 bits of their offset."""
    wrapped = [id * BLOCK_BYTES % (1 << bits) // BLOCK_BYTES for id in ids for bits in (31, 32)]
    near = [id + step for id in ids for step in (-1, 1)]
    return sorted({id for id in (*wrapped, *near) if 0 <= id < BLOCKS} - set(ids))


def _poison(pool: torch.Tensor, ids: list[int]) -> None:
    one = torch.full((BLOCK_BYTES,), POISON, dtype=torch.uint8)
    for id in ids:
        pool[id].copy_(one)


def _fill(pool: torch.Tensor, ids: list[int]) -> dict[int, torch.Tensor]:
    """Random blocks, and what each is."""
    values = {id: torch.randint(0, 256, (BLOCK_BYTES,), dtype=torch.uint8) for id in ids}
    for id, value in values.items():
        pool[id].copy_(value)
    return values


def _whole_blocks() -> torch.Tensor:
    return runs_tensor(run_row((0, 0), (0, 0), BLOCK_BYTES, (0, 0)))


def _check_far_blocks(pools, direction, executor, ids_place):
    src, dst = _sides(pools, direction)
    values = _fill(src, FAR)
    targets = FAR[3:] + FAR[:3]
    _poison(dst, [*targets, *_beside(targets)])
    mapping = torch.tensor(list(zip(FAR, targets, strict=True)))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        kvkernels.copy_pages([src], [dst], mapping.to(ids_place), _whole_blocks(), executor=executor)
        torch.cuda.synchronize()
    for source, target in mapping.tolist():
        assert torch.equal(dst[target].cpu(), values[source]), (source, target)
    for id in _beside(targets):
        assert bool((dst[id].cpu() == POISON).all()), f"block {id} was written"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_far_blocks(pools, executor, direction):
    if (executor, direction) == ("staged", "d2d"):
        said = refusal_of(lambda: _check_far_blocks(pools, direction, executor, "cpu"))
        assert said == "no side is in host memory"
        return
    _check_far_blocks(pools, direction, executor, "cpu")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", KERNELS)
def test_far_ids_on_the_device(pools, executor, direction):
    _check_far_blocks(pools, direction, executor, "cuda")
    kvkernels.check_device(0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_far_offsets_in_a_page(pools, executor, direction):
    """One page of over 4 GiB: offsets and strides of a run, upwards on one side and downwards on the other."""
    src, dst = (pool.view(1, POOL_BYTES) for pool in _sides(pools, direction))
    stride, count, fragment_bytes = (1 << 31) + 4096, 3, 1040
    first, last = 64, 128 + (count - 1) * stride
    values = torch.randint(0, 256, (count, fragment_bytes), dtype=torch.uint8)
    around = torch.full((fragment_bytes + 128,), POISON, dtype=torch.uint8)
    for i, value in enumerate(values):
        src[0, first + i * stride :][:fragment_bytes].copy_(value)
        dst[0, last - i * stride - 64 :][: len(around)].copy_(around)
    runs = runs_tensor(run_row((0, 0), (first, last), fragment_bytes, (0, 0), [(count, stride, -stride)]))
    torch.cuda.synchronize()

    def copy() -> None:
        kvkernels.copy_pages([src], [dst], torch.tensor([[0, 0]]), runs, executor=executor)

    if executor == "staged":
        reason = "no side is in host memory" if direction == "d2d" else "a pair spans .* bytes of host memory"
        with pytest.raises(ValueError, match=f"executor 'staged' cannot serve this call: {reason}"):
            copy()
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        copy()
        torch.cuda.synchronize()
    for i, value in enumerate(values):
        around[64:-64] = value
        assert torch.equal(dst[0, last - i * stride - 64 :][: len(around)].cpu(), around), i


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", [e for e in EXECUTORS if e not in ("staged", "triton")])
def test_one_fragment_of_all_blocks(pools, executor, direction):
    """Neighbours that join to one fragment longer than 2^32 bytes."""
    count = scaled(BLOCKS, 30)
    src, dst = (pool[:count].view(-1) for pool in _sides(pools, direction))
    # Of no length that divides a power of two: bytes from 2^31 or 2^32 away are others.
    fill(src, random_bytes(min(src.numel(), (61 << 20) + 7)))
    fill(dst)
    ids = torch.arange(count)
    torch.cuda.synchronize()
    kvkernels.reset_counters()
    with torch.cuda.stream(torch.cuda.Stream()):
        blocks = [src.view(count, BLOCK_BYTES)], [dst.view(count, BLOCK_BYTES)]
        kvkernels.copy_pages(*blocks, torch.stack((ids, ids), 1), _whole_blocks(), executor=executor)
        torch.cuda.synchronize()
    (counted,) = (counted for counted in kvkernels.counters().values() if counted["calls"])
    assert counted["bytes"] == count * BLOCK_BYTES
    assert executor != "dma" or counted["descriptors"] == 1
    assert are_same(dst, src)
