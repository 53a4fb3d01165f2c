"""Several prepared copies as one transfer, and pools that are several tensors: all of a run is checked, then copied."""

from __future__ import annotations

import copy
import pickle
import random

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvkernels
from kvkernels import KVLayout, compile_plan

NONE = torch.empty(0, 2, dtype=torch.int64)


def pools_of(blocks: int, count: int = 3, page_bytes: int = 24, fill: int | None = None) -> list[torch.Tensor]:
    if fill is not None:
        return [torch.full((blocks, page_bytes), fill, dtype=torch.uint8) for _ in range(count)]
    return [torch.randint(0, 256, (blocks, page_bytes), dtype=torch.uint8) for _ in range(count)]


def slabs_of(pools: list[torch.Tensor], sizes: list[int]) -> list[list[torch.Tensor]]:
    """The pools' blocks in tensors of these sizes, each with guards of its own round it."""
    return [[guarded(part) for part in pool.split(sizes)] for pool in pools]


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.full((len(tensor) + 2, tensor.shape[1]), 171, dtype=tensor.dtype)
    room[1:-1] = tensor
    return room[1:-1]


def whole(slabs: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    for slab in (slab for pool in slabs for slab in pool):
        room = slab._base
        assert torch.equal(room[[0, -1]], torch.full_like(room[[0, -1]], 171)), "a guard was written"
    return [torch.cat(pool) for pool in slabs]


def random_pairs(rng: random.Random, src_ids: int, dst_ids: int, most: int) -> torch.Tensor:
    pairs = rng.randint(0, min(most, dst_ids))
    src = [rng.randrange(src_ids) for _ in range(pairs)]
    return torch.tensor(list(zip(src, rng.sample(range(dst_ids), pairs), strict=True)), dtype=torch.int64).reshape(
        -1, 2
    )


@pytest.mark.parametrize("seed", range(40))
def test_slabs_are_one_pool(seed):
    """Whatever the cuts, the ids and the sub-blocks: the bytes of a copy between pools that are one tensor each."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [[rng.randint(1, 9) for _ in range(rng.randint(1, 4))] for _ in range(2)]
    subblocks = [rng.choice([1, 2, 3]) for _ in range(2)]
    src, dst = pools_of(sum(sizes[0])), pools_of(sum(sizes[1]), fill=200)
    runs = kvkernels.whole_page_runs(src)
    runs[:, 4] = 24 // max(subblocks)
    runs[:, 5], runs[:, 6] = (24 // s if s > 1 else 0 for s in subblocks)
    mapping = random_pairs(rng, len(src[0]) * subblocks[0], len(dst[0]) * subblocks[1], 12)
    if seed % 2:
        mapping = mapping.to(torch.int32)
    src_slabs, dst_slabs = slabs_of(src, sizes[0]), slabs_of(dst, sizes[1])
    prepared = kvkernels.prepare(src_slabs, dst_slabs, runs, *subblocks)
    moved = prepared.explain(mapping)
    kvkernels.copy_pages(src, dst, mapping, runs, *subblocks)
    if seed % 3 == 0:
        mapping = torch.cat([mapping, mapping[:2]])  # a pair that comes twice is copied once
    given = mapping.clone()
    prepared.run(mapping)
    assert torch.equal(mapping, given)
    cases.assert_same_bytes(whole(dst_slabs), dst, "destination")
    cases.assert_same_bytes(whole(src_slabs), src, "source")
    if isinstance(prepared, kvkernels.SlabbedCopy):
        assert sum(one.bytes for one in moved) == len(torch.unique(mapping, dim=0)) * 3 * int(runs[0, 4])


def test_layers_plans_and_negative_ids_of_slabs():
    torch.manual_seed(1)
    sizes = {"L": 4, "N": 4, "H": 2, "D": 8, "dtype": torch.uint8}
    plan = compile_plan(KVLayout("L B N H D", B=6, **sizes), KVLayout("B L H N D", B=6, **sizes))
    src, dst = pools_of(6, 4, 64), pools_of(6, 1, 256, fill=7)
    src_slabs, dst_slabs = slabs_of(src, [2, 4]), slabs_of(dst, [3, 3])
    prepared = kvkernels.prepare(src_slabs, dst_slabs, plan, skip_negative=True)
    mapping = torch.tensor([[5, 2], [-1, 4], [1, 5], [3, -2]])
    for layer in (2, None):
        kvkernels.copy_pages(src, dst, mapping, plan.runs.of(layer), skip_negative=True)
        prepared.run(mapping, layer=layer)
        cases.assert_same_bytes(whole(dst_slabs), dst, f"layer {layer}")
    with pytest.raises(IndexError, match="layer must be"):
        prepared.run(mapping, layer=4)


def test_what_a_run_on_slabs_refuses_moves_nothing():
    src, dst = pools_of(7), pools_of(5, fill=9)
    dst_slabs = slabs_of(dst, [3, 2])
    prepared = kvkernels.prepare(slabs_of(src, [4, 3]), dst_slabs)
    for mapping, error, text in (
        ([[0, 0], [7, 1]], IndexError, r"mapping\[1, 0\] = 7 is out of range for src's 2 slabs with 7 blocks"),
        ([[0, 0], [6, 5]], IndexError, r"mapping\[1, 1\] = 5 is out of range for dst's 2 slabs with 5 blocks"),
        ([[0, 0], [-1, 1]], IndexError, r"mapping\[1, 0\] = -1 is out of range"),
        ([[0, 4], [6, 4]], ValueError, r"mapping must name each destination once, got two sources for destination 4"),
        ([0, 0], ValueError, r"mapping must have shape \[n, 2\]"),
        ([[0.5, 1.0]], ValueError, r"mapping must be int64 or int32"),
    ):
        with pytest.raises(error, match=rf"^PreparedCopy.run: {text}"):
            prepared.run(torch.tensor(mapping))
        cases.assert_same_bytes(whole(dst_slabs), dst, text)
    with pytest.raises(ValueError, match=r"mapping must be on the cpu"):
        prepared.run(torch.empty(1, 2, dtype=torch.int64, device="meta"))
    with FakeTensorMode(), pytest.raises(ValueError, match=r"mapping must have values where pools have slabs"):
        prepared.run(torch.empty(1, 2, dtype=torch.int64))


def test_a_slab_that_is_refused_stops_the_others():
    src, dst = pools_of(7, 1), pools_of(5, 1, fill=9)
    dst_slabs = [[dst[0][:3].clone(), dst[0][3:].view(torch.float32).clone().requires_grad_()]]
    prepared = kvkernels.prepare(slabs_of(src, [4, 3]), dst_slabs)
    with pytest.raises(ValueError, match=r"^PreparedCopy.run: dst\[0\] must not require a gradient"):
        prepared.run(torch.tensor([[0, 0], [6, 4]]))
    cases.assert_same_bytes([dst_slabs[0][0]], [dst[0][:3]], "the other slab")


def test_copies_inside_one_pool_of_slabs():
    pools = pools_of(8)
    slabs = slabs_of(pools, [3, 5])
    bound = kvkernels.bind(slabs)
    prepared = kvkernels.prepare(bound, bound)
    mapping = torch.tensor([[0, 4], [7, 1]])
    kvkernels.copy_pages(pools, pools, mapping, kvkernels.whole_page_runs(pools))
    prepared.run(mapping)
    cases.assert_same_bytes(whole(slabs), pools, "moved")
    with pytest.raises(ValueError, match=r"PreparedCopy.run: mapping must not write what it reads, got block 1 of a"):
        prepared.run(torch.tensor([[0, 4], [4, 1]]))
    cases.assert_same_bytes(whole(slabs), pools, "refused")


def test_what_bind_and_prepare_refuse_of_slabs():
    pools = pools_of(8, 2)
    for cuts, text in (([[3, 5], [4, 4]], r"\[\[3, 5\], \[4, 4\]\]"), ([[3, 5], [8]], r"\[\[3, 5\], \[8\]\]")):
        slabs = [list(pool.split(cut)) for pool, cut in zip(pools, cuts, strict=True)]
        with pytest.raises(ValueError, match=rf"as many blocks in each slab as the first, got {text}"):
            kvkernels.bind(slabs)
    for wrong in ([[]], [[pools[0], 3]], [pools, 3]):
        with pytest.raises(ValueError, match=r"^bind: pools must be a list of at least one Tensor or list of Tensors"):
            kvkernels.bind(wrong)
    with pytest.raises(ValueError, match=r"^prepare: slabs must be the same or share no bytes"):
        kvkernels.prepare(pools, [[pools[0][:6], pools[0][3:]]], kvkernels.whole_page_runs(pools[:1])).run(NONE)


def test_slabs_are_released_with_their_pools():
    bound = kvkernels.bind(slabs_of(pools_of(4), [1, 3]))
    assert (len(bound), len(bound.tensors), repr(bound)) == (3, 6, "BoundPools(3 pools of 2 slabs)")
    prepared = kvkernels.prepare(bound, pools_of(4))
    prepared.run(torch.tensor([[0, 1], [3, 2]]))
    for call in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match=r"SlabbedCopy cannot be pickled or copied"):
            call(prepared)
    bound.unbind()
    with pytest.raises(ValueError, match=r"the pools must be bound, got ones that were unbound"):
        prepared.run(torch.tensor([[0, 1], [3, 2]]))


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_a_hybrid_model(seed):
    """Groups that share pools by other blocks, and one of its own: the bytes of a call each."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    engine, host = pools_of(16), pools_of(16, fill=3)
    own, own_host = pools_of(4, 1, 40), pools_of(9, 1, 40, fill=5)
    expected = [pool.clone() for pool in (*host, *own_host)]
    groups = kvkernels.PreparedGroups([
        kvkernels.prepare(engine, host),
        kvkernels.prepare(engine[:2], host[:2]),
        kvkernels.prepare(own, own_host),
    ])  # fmt: skip
    rows = rng.sample(range(16), 16)
    cut = rng.randint(0, 16)
    mappings = [
        torch.tensor([[rng.randrange(16), row] for row in rows[:cut]], dtype=torch.int64).reshape(-1, 2),
        torch.tensor([[rng.randrange(16), row] for row in rows[cut:]], dtype=torch.int64).reshape(-1, 2),
        rng.choice([None, random_pairs(rng, 4, 9, 9)]),
    ]
    explained = groups.explain(mappings)
    groups.run(mappings)
    assert len(groups) == 3 and len(explained) == 3 - (mappings[2] is None)
    for pools, into, mapping in ((engine, expected[:3], 0), (engine[:2], expected[:2], 1), (own, expected[3:], 2)):
        for row in [] if mappings[mapping] is None else mappings[mapping].tolist():
            for a, b in zip(pools, into, strict=True):
                b[row[1]] = a[row[0]]
    cases.assert_same_bytes([*host, *own_host], expected, "destinations")


def test_a_group_that_is_refused_stops_all_of_them():
    engine, host = pools_of(8), pools_of(8, fill=3)
    before = [pool.clone() for pool in host]
    groups = kvkernels.PreparedGroups([kvkernels.prepare(engine, host), kvkernels.prepare(engine[:1], host[:1])])
    good = torch.tensor([[1, 2]])
    for mappings, error, text in (
        ([good, torch.tensor([[8, 3]])], IndexError, r"^PreparedCopy.run: mapping\[0, 0\] = 8 is out of range"),
        (
            [good, torch.tensor([[0, 2]])],
            ValueError,
            r"other blocks of it where one writes, got 2 in group 0",
        ),
        ([good, torch.tensor([[0, 2]]).int()], ValueError, r"got 2 in group 0 and in group 1"),
        ([torch.tensor([[1, 0]]), torch.tensor([[2, 0]])], ValueError, r"got 0 in group 0 and in group 1"),
        ([good], ValueError, r"^PreparedGroups.run: mappings must be 2, got 1"),
        ([good, torch.tensor([3])], ValueError, r"^PreparedCopy.run: mapping must have shape"),
        ([good, torch.empty(1, 2, dtype=torch.int64, device="meta")], ValueError, r"must be on the cpu, with values"),
    ):
        for call in (groups.run, groups.explain):
            with pytest.raises(error, match=text):
                call(mappings)
        cases.assert_same_bytes(host, before, text)
    groups.run([good, torch.tensor([[1, 3]])])
    groups.release()
    with pytest.raises(ValueError, match=r"released"):
        groups.run([good, None])


def test_ids_that_are_skipped_name_nothing():
    engine, host = pools_of(8), pools_of(8, fill=3)
    groups = kvkernels.PreparedGroups([kvkernels.prepare(engine, host, skip_negative=True) for _ in range(2)])
    groups.run([torch.tensor([[1, -1], [2, 3]]), torch.tensor([[1, -1], [4, 5]])])
    assert torch.equal(host[0][[3, 5]], engine[0][[2, 4]])


def test_a_group_must_not_read_what_another_writes():
    pools = pools_of(8)
    groups = kvkernels.PreparedGroups(
        [kvkernels.prepare(pools[:1], pools[1:2]), kvkernels.prepare(pools[1:2], pools[2:])]
    )
    groups.run([torch.tensor([[0, 1]]), torch.tensor([[2, 1]])])
    before = [pool.clone() for pool in pools]
    with pytest.raises(ValueError, match=r"got 3 in group 0 and in group 1"):
        groups.run([torch.tensor([[0, 3]]), torch.tensor([[3, 1]])])
    cases.assert_same_bytes(pools, before, "refused")


def test_which_pools_two_groups_may_share():
    """K and V side by side in rows share none; a shifted or partly shared pool is refused, a shared source is not."""
    rows = torch.zeros(8, 64, dtype=torch.uint8)
    k, v = rows[:, :32], rows[:, 32:]
    src = pools_of(8, 1, 32)
    one = kvkernels.prepare(src, [k])
    groups = kvkernels.PreparedGroups([one, kvkernels.prepare(src, [v])])
    groups.run([torch.tensor([[0, 1]]), torch.tensor([[0, 1]])])
    assert torch.equal(rows[1], src[0][0].repeat(2))
    round_the_end = rows.flatten()[48:].as_strided((7, 32), (64, 1))
    for other in (rows[:, 16:48], rows[1:, :32], rows.view(16, 32), round_the_end):
        with pytest.raises(ValueError, match=r"must be the same or share no bytes, got some"):
            kvkernels.PreparedGroups([one, kvkernels.prepare(src, [other])])
    kvkernels.PreparedGroups([one, kvkernels.prepare([src[0][2:]], [v])])
    for wrong in ([], [one, 3], None):
        with pytest.raises(ValueError, match=r"^PreparedGroups: copies must be a list of at least one PreparedCopy"):
            kvkernels.PreparedGroups(wrong)
