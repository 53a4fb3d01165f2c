"""How many CTAs of how many threads a launch has: by bytes on their way over a link, by a budget, by tiles."""

from __future__ import annotations

import pytest
from simgpu.moves import check_kernel
from simgpu.sim import D2D, D2H, DEVICE, H2D, SMS, Move, Side
from simgpu.worker import on_stand_in

LINK_BYTES = {False: 256 << 10, True: 1 << 20}  # by whether the link is coherent


def coherent_link(sim, is_coherent):
    sim.set("pageable_access", int(is_coherent))
    sim.set("host_page_tables", int(is_coherent))


def whole_pages(page_bytes, count):
    return Move(Side(0, page_bytes), Side(0, page_bytes), page_bytes), [(i, i) for i in range(count)]


@pytest.mark.parametrize("direction", [H2D, D2H, D2D])
@on_stand_in
def test_the_grid_keeps_to_the_budget(sim, direction):
    """Never more CTAs than SMs of the budget, and more warps in each where so few would not keep a link busy."""
    src, dst = sim.memory(DEVICE, 16 << 20), sim.memory(DEVICE, 16 << 20)
    move, many = whole_pages(65536, 256)
    for sm_budget, ctas, warps in ((1, 1, 32), (2, 2, 32), (5, 5, 13), (8, 8, 8), (40, 40, 8), (100_000, SMS, 8)):
        run, _ = check_kernel(sim, [move], many, src, dst, direction=direction, sm_budget=sm_budget)
        most = warps if direction != D2D else 32
        assert run.threads // 32 == min(most, -(-run.tiles // ctas)), run
        assert run.ctas == min(ctas, -(-run.tiles // (run.threads // 32))), run


@pytest.mark.parametrize(("is_coherent", "tiles", "rows"), [(False, 8, 16), (True, 32, 64)])
@pytest.mark.parametrize("direction", [H2D, D2H])
@on_stand_in
def test_a_link_gets_as_many_warps_as_keep_it_busy(sim, direction, is_coherent, tiles, rows):
    """In CTAs that find room beside other kernels'."""
    coherent_link(sim, is_coherent)
    src, dst = sim.memory(DEVICE, 16 << 20), sim.memory(DEVICE, 16 << 20)
    for (move, pairs), ctas, warp_bytes in (
        (whole_pages(65536, 256), tiles, 4096),
        (whole_pages(1024, 16384), rows, 2048),
        (whole_pages(2048, 8192), min(2 * tiles, 64), 2048),  # a page is all that a warp has
    ):
        run, _ = check_kernel(sim, [move], pairs, src, dst, direction=direction)
        assert (run.ctas, run.threads) == (ctas, 256), run
        assert run.ctas * 8 * warp_bytes >= LINK_BYTES[is_coherent]


@on_stand_in
def test_short_fragments_do_not_take_the_whole_device(sim):
    """However few bytes a warp has in flight: 64 CTAs at most."""
    src, dst = sim.memory(DEVICE, 5 << 20), sim.memory(DEVICE, 5 << 20)
    for page_bytes, warp_bytes in ((16, 512), (60, 512), (65, 65)):
        move, pairs = whole_pages(page_bytes, 1 << 16)
        run, _ = check_kernel(sim, [move], pairs, src, dst, direction=H2D)
        assert run.ctas == min(64, -(-LINK_BYTES[False] // (warp_bytes * 8))), (run, page_bytes)


@on_stand_in
def test_a_copy_within_the_device_fills_it(sim):
    src, dst = sim.memory(DEVICE, 32 << 20), sim.memory(DEVICE, 32 << 20)
    move, pairs = whole_pages(65536, 512)
    run, _ = check_kernel(sim, [move], pairs, src, dst)
    assert (run.ctas, run.threads) == (4 * SMS, 256)


@pytest.mark.parametrize(("direction", "default"), [(H2D, 8), (D2H, 8), (D2D, 4 * SMS)])
@on_stand_in
def test_few_tiles_are_spread(sim, direction, default):
    src, dst = sim.memory(DEVICE, 1 << 20), sim.memory(DEVICE, 1 << 20)
    for pages in (1, 2, 3):
        move, pairs = whole_pages(65536, pages)
        run, _ = check_kernel(sim, [move], pairs, src, dst, direction=direction)
        assert run.tiles == 16 * pages
        assert (run.ctas - 1) * run.threads // 32 < run.tiles, "a CTA without a tile"
        assert run.ctas >= min(default, 4 * pages), "few tiles are spread over the grid"


@pytest.mark.parametrize("is_coherent", [False, True])
@pytest.mark.parametrize("direction", [H2D, D2H, D2D])
@on_stand_in
def test_the_grid_of_bulk_copies_keeps_to_the_budget(sim, direction, is_coherent):
    """A CTA loads 128 KiB at once."""
    coherent_link(sim, is_coherent)
    src, dst = sim.memory(DEVICE, 32 << 20), sim.memory(DEVICE, 32 << 20)
    for page_bytes in (65536, 2048):
        move, many = whole_pages(page_bytes, (32 << 20) // page_bytes)
        default = SMS if direction == D2D else LINK_BYTES[is_coherent] // (128 << 10)
        for sm_budget, ctas in ((0, default), (1, 1), (5, 5), (100_000, SMS)):
            run, _ = check_kernel(sim, [move], many, src, dst, direction=direction, sm_budget=sm_budget, bulk=True)
            assert (run.ctas, run.threads) == (ctas, 128), run
