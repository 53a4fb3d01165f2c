"""What engines keep today, at its real sizes: named, sharded and converted, compared with torch's own indexing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvkernels
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks
from kvkernels.layout import parts

U8, F8, BF16, F32 = torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32


def _random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=U8)


def _poison(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0xA5, dtype=U8)


def _convert(src, dst, mapping, **options) -> None:
    """Of (layout, tensors) pairs, with each executor in turn; the sources stay as they are."""
    pairs = [[one] if isinstance(one, tuple) else one for one in (src, dst)]
    caches = [[KVCache(layout, tensors) for layout, tensors in side] for side in pairs]
    tensors = [[t for cache in side for t in cache.tensors] for side in caches]
    before = [[t.clone() for t in side] for side in tensors]
    results = []
    for executor in ("reference", "cpu"):
        for tensor, was in zip(tensors[1], before[1], strict=True):
            tensor.copy_(was)
        kvkernels.reset_counters()
        convert_blocks(caches[0], caches[1], torch.tensor(mapping), executor=executor, **options)
        assert kvkernels.counters()[executor]["calls"] == 1
        results.append([t.clone() for t in tensors[1]])
    assert all(torch.equal(a.view(U8), b.view(U8)) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a.view(U8), b.view(U8)) for a, b in zip(tensors[0], before[0], strict=True))


@pytest.mark.parametrize(("values", "dtype"), [(576, BF16), (656, U8), (132, U8)])
def test_latents_as_vllm_registers_them(values, dtype):
    cache = _random(6, 1, 64, values * dtype.itemsize).view(dtype)
    layout = KVLayout.of(cache, "B H N D")
    assert layout == KVLayout("B H N D", B=6, N=64, D=values, dtype=dtype)
    host = _poison(4, 64, values * dtype.itemsize).view(dtype)
    _convert((layout, cache), (KVLayout.of(host, "B N D"), host), [[5, 1]])
    assert torch.equal(host[1].view(U8), cache[5, 0].view(U8)) and (host[[0, 2, 3]].view(U8) == 0xA5).all()


@pytest.mark.parametrize("letters", ["L H B N D", "B H L N D", "L B H N D", "B L N H D"])
def test_every_order_that_vllm_registers(letters):
    """A part of 256 bytes a token and head: K and V side by side."""
    sizes = {"L": 4, "B": 5, "H": 8, "N": 16, "D": 256}
    buffer = _random(*(sizes[c] for c in letters.split()))
    host = _poison(3, 4, 16, 8, 256)
    src = KVLayout.of(buffer, letters)
    _convert((src, buffer), (KVLayout.of(host, "B L N H D"), host), [[4, 0], [2, 2]])
    named = buffer.permute([letters.split().index(c) for c in "BLNHD"])
    assert torch.equal(host[[0, 2]], named[[4, 2]]) and (host[1] == 0xA5).all()


def _dealt(values: torch.Tensor, rank: int, of: int, interleave: int) -> torch.Tensor:
    """Of ``[blocks, tokens, ...]`` the tokens whose turn is this rank's."""
    turn = torch.arange(values.shape[1]) // interleave % of
    return values[:, turn == rank].contiguous()


@pytest.mark.parametrize(("src", "dst"), [((8, 1), (4, 1)), ((8, 1), (1, 1)), ((2, 16), (8, 4)), ((1, 1), (4, 64))])
def test_tokens_that_context_parallel_ranks_hold(src, dst):
    """DCP of N ranks to one of M, to none, from none, at interleaves of one token up to a block."""
    whole = _random(6, 512, 576)  # of 512 tokens each
    sides = []
    for of, interleave in (src, dst):
        n = 512 // of
        layouts = [KVLayout("B N D", B=6, N=n, D=576, dtype=U8, deal=(r, of, interleave)) for r in range(of)]
        sides.append((layouts, [_dealt(whole, r, of, interleave) for r in range(of)]))
    (src_layouts, held), (dst_layouts, wanted) = sides
    out = [_poison(*one.shape) for one in wanted]
    src_side, dst_side = list(zip(src_layouts, held, strict=True)), list(zip(dst_layouts, out, strict=True))
    _convert(src_side, dst_side, [[1, 4], [5, 0]])
    for mine, right in zip(out, wanted, strict=True):
        assert torch.equal(mine[[4, 0]], right[[1, 5]]) and (mine[[1, 2, 3, 5]] == 0xA5).all()


def test_dealt_tokens_and_heads_to_tensor_parallel_ranks_of_another_block_size():
    """TP 4 of which DCP takes 2: two heads, each on two ranks that take turns; then TP 2 of blocks of 16."""
    sizes = {"L": 2, "K": 2, "D": 128, "dtype": BF16}
    whole = KVLayout("L | K B N H D", B=6, N=16, H=2, **sizes)
    values = _random(2, 2, 6, 32, 2, 256)  # blocks of 16 tokens on each of two ranks
    src = []
    for rank in range(4):
        layout = replace(whole.shard(rank // 2, 2), deal=(rank % 2, 2, 1))
        held = values[:, :, :, rank % 2 :: 2, rank // 2 : rank // 2 + 1].contiguous()
        src.append((layout, [layer.view(BF16) for layer in held]))
    dst, out = [], _poison(2, 2, 2, 12, 16, 1, 256)
    for rank in range(2):
        shard = KVLayout("L | K B N H D", B=12, N=16, H=2, **sizes).shard(rank, 2)
        dst.append((shard, [layer.view(BF16) for layer in out[rank]]))
    _convert(src, dst, [[6, 1], [7, 0], [2, 11]])  # ids of 16 tokens
    tokens = values.view(2, 2, 12, 16, 2, 256)
    for rank in range(2):
        assert torch.equal(out[rank][:, :, [1, 0, 11], :, 0], tokens[:, :, [6, 7, 2], :, rank])
        assert (out[rank][:, :, 2:11] == 0xA5).all()


@pytest.mark.parametrize("pattern", ["K B N L H D", "B H L N K D", "B L K N H D", "L | K B N H D"])
def test_a_pipeline_stage_in_a_buffer_of_all_layers(pattern):
    sizes = {"K": 2, "N": 16, "H": 8, "D": 64, "dtype": BF16}
    stage = KVLayout("L | K B N H D", B=6, L=2, first_layer=2, total_layers=4, **sizes)
    held = [_random(2, 6, 16, 8, 128).view(BF16) for _ in range(2)]
    buffer = KVLayout(pattern, L=4, B=3, **sizes)
    extents = {"L": 4, "K": 2, "B": 3, "N": 16, "H": 8, "D": 128}
    letters = pattern.replace(" ", "")
    tensors = [_poison(*(extents[c] for c in buffer.inside)) for _ in range(buffer.num_tensors)]
    flat = [tensor.flatten() for tensor in tensors]
    _convert((stage, held), (buffer, flat), [[5, 1]], allow_partial=True)
    whole = torch.stack(flat).view(*(extents[c] for c in letters.replace("|", "")))
    named = whole.permute([letters.replace("|", "").index(c) for c in "LKBNHD"])
    for layer in range(2):
        assert torch.equal(named[2 + layer, :, 1], held[layer][:, 5].view(U8))
    assert (named[:2] == 0xA5).all() and (named[:, :, [0, 2]] == 0xA5).all()
    # Layers are counted over all stages.
    plan = compile_plan(stage, buffer, allow_partial=True)
    assert len(plan.runs) == 4 and len(plan.runs[0]) == len(plan.runs[1]) == 0 < len(plan.runs[2])
    with pytest.raises(ValueError, match="compile_plan: the sources lack layers that the destination has"):
        compile_plan(stage, buffer)
    back = [_poison(2, 6, 16, 8, 128).view(BF16) for _ in range(2)]
    convert_blocks(KVCache(buffer, flat), KVCache(stage, back), torch.tensor([[1, 0]]), layer=3)
    assert torch.equal(back[1][:, 0].view(U8), held[1][:, 5].view(U8)) and (back[0].view(U8) == 0xA5).all()


def test_padded_cells_and_a_part_of_a_fused_row():
    rows = _random(6, 64, 1152).view(BF16)
    cells = _poison(3, 64, 160).view(BF16)
    rope, padded = KVLayout.of(rows[..., 512:], "B N D"), KVLayout.of(cells[..., :64], "B N D")
    assert (rope.steps, padded.steps) == ({"N": 1152}, {"N": 160})
    _convert((rope, rows[..., 512:]), (padded, cells), [[4, 2]])
    assert torch.equal(cells[2, :, :64].view(U8), rows[4, :, 512:].view(U8))
    assert (cells[2, :, 64:].view(U8) == 0xA5).all() and (cells[:2].view(U8) == 0xA5).all()


def test_v_heads_of_another_size_in_the_shape_that_is_registered():
    """192 elements of K and 128 of V, packed, become the two tensors that other engines have."""
    packed = [_random(5, 4, 16, 640).view(BF16) for _ in range(2)]
    layout = KVLayout.of(packed, "L | B H N (K D)", D_v=128)
    apart = KVLayout("L K | B N H D", L=2, K=2, B=3, N=16, H=4, D=192, D_v=128, dtype=BF16)
    out = [_poison(3, 16, 4, 2 * d).view(BF16) for _ in range(2) for d in (192, 128)]
    _convert((layout, packed), (apart, out), [[4, 0]])
    for i in range(2):
        got = torch.cat([out[2 * i][0], out[2 * i + 1][0]], -1).transpose(0, 1)
        assert torch.equal(got.view(U8), packed[i][4].view(U8))


def test_other_numbers_of_heads_of_k_and_v():
    k, v = _random(4, 16, 8, 64), _random(4, 16, 4, 32)
    sizes = {"B": 4, "N": 16, "dtype": U8}
    apart = parts(k=KVLayout.of(k, "B N H D"), v=KVLayout.of(v, "B N H D"))
    row = 8 * 64 + 4 * 32
    one = parts(
        k=KVLayout("B N H D", H=8, D=64, steps={"N": row}, **sizes),
        v=KVLayout("B N H D", H=4, D=32, steps={"N": row}, offset_bytes=8 * 64, **sizes),
    )
    page = _poison(4, 16, row)
    assert one.num_pools == 1
    _convert((apart, [k, v]), (one, page), [[2, 3]])
    assert torch.equal(page[3], torch.cat([k[2].flatten(1), v[2].flatten(1)], 1)) and (page[:3] == 0xA5).all()
    # Sharded over 8 ranks, where each two of them hold one head of V.
    held = [[k[:, :, [rank]].contiguous(), v[:, :, [rank // 2]].contiguous()] for rank in range(8)]
    ranks = [(apart.shard(rank, 8), tensors) for rank, tensors in enumerate(held)]
    page = _poison(4, 16, row)
    _convert(ranks, (one, page), [[1, 0]])
    assert torch.equal(page[0], torch.cat([k[1].flatten(1), v[1].flatten(1)], 1))


def test_rocms_pages_of_k_that_is_cut_and_v_that_is_turned():
    sizes = {"L": 2, "B": 4, "N": 16, "H": 8, "D": 128, "dtype": BF16}
    rocm = parts(k="L | B H D/8 N D%8", v="L | B H D N", **sizes)
    keys, values = ([_random(4, 16, 8, 256).view(BF16) for _ in range(2)] for _ in "kv")
    plain = KVLayout("K L | B N H D", K=2, **sizes)
    k = [_poison(4, 8, 16, 16, 16).view(BF16) for _ in range(2)]
    v = [_poison(4, 8, 128, 32).view(BF16) for _ in range(2)]
    _convert((plain, keys + values), (rocm, k + v), [[1, 2], [3, 0]])
    for i in range(2):
        for at, of in ((2, 1), (0, 3)):
            cut = keys[i][of].view(16, 8, 16, 8).permute(1, 2, 0, 3)
            assert torch.equal(k[i][at].view(U8), cut.contiguous().view(U8))
            assert torch.equal(v[i][at].view(U8), values[i][of].permute(1, 2, 0).contiguous().view(U8))
    back = [_poison(4, 16, 8, 256).view(BF16) for _ in range(4)]
    _convert((rocm, k + v), (plain, back), [[2, 1], [0, 3]])
    assert all(torch.equal(a[[1, 3]].view(U8), b[[1, 3]].view(U8)) for a, b in zip(back, keys + values, strict=True))
    # One tensor of both, as the engine allocates it: V begins where K's blocks end.
    half, one_layer = 4 * 16 * 8 * 128 * 2, {name: size for name, size in sizes.items() if name != "L"}
    joint = parts(k=KVLayout("B H D/8 N D%8", **one_layer), v=KVLayout("B H D N", offset_bytes=half, **one_layer))
    assert (joint.num_tensors, joint.num_pools, joint.pools[1].offset_bytes) == (1, 2, half)
    buffer, two = torch.cat([k[0].flatten(), v[0].flatten()]), [_poison(4, 16, 8, 256).view(BF16) for _ in "kv"]
    _convert((joint, buffer), (KVLayout("K | B N H D", K=2, **one_layer), two), [[2, 3]])
    assert torch.equal(two[0][3].view(U8), keys[0][1].view(U8))
    assert torch.equal(two[1][3].view(U8), values[0][1].view(U8))


@pytest.mark.parametrize(("first", "count"), [(0, 24), (5, 15), (7, 2), (16, 8), (3, 21)])
@pytest.mark.parametrize("by", [(8, 1), (8, 6), (4, 12)])
def test_ranges_that_begin_and_end_inside_of_a_cut(first, count, by):
    """Elements 5 to 19 of 24 are three of an eight, an eight, and four of one; cut otherwise on the other side."""
    a, b = by
    whole = KVLayout(f"B D/{a} N D%{a}", B=3, N=4, D=24, dtype=U8)
    if b > 1:
        rest = KVLayout(f"B N D%{b} D/{b}", B=3, N=4, D=24, dtype=U8)
    else:
        rest = KVLayout("B N D", B=3, N=4, D=count, dtype=U8, first_d=first, total_d=24)
    values = _random(3, 24 // a, 4, a)
    named = values.transpose(1, 2).reshape(3, 4, 24)
    out = _poison(3, rest.page_bytes)
    _convert((whole, values), (rest, out), [[2, 0]])
    wanted = named[2, :, first : first + count] if b == 1 else named[2].view(4, 24 // b, b).transpose(1, 2)
    assert torch.equal(out[0], wanted.flatten()) and (out[1:] == 0xA5).all()
    back = _poison(*values.shape)
    _convert((rest, out), (whole, back), [[0, 1]], allow_partial=b == 1)
    kept = back.transpose(1, 2).reshape(3, 4, 24)[1]
    held = slice(first, first + count) if b == 1 else slice(0, 24)
    assert torch.equal(kept[:, held], named[2][:, held]) and (back[[0, 2]] == 0xA5).all()
    assert (kept == 0xA5).sum() >= 4 * (24 - (held.stop - held.start))


def test_blocks_whose_tokens_are_cut_become_smaller_ones():
    """Eight tokens, in two fours that stand apart, are one unit; the next one of the block begins behind both."""
    cut = KVLayout("B N/4 D N%4", B=3, N=16, D=6, dtype=U8)
    values, out = _random(3, 4, 6, 4), _poison(4, 8, 6)
    _convert((cut, values), (KVLayout("B N D", B=4, N=8, D=6, dtype=U8), out), [[5, 0], [2, 3]])
    tokens = values.transpose(2, 3).reshape(6, 8, 6)
    assert torch.equal(out[[0, 3]], tokens[[5, 2]]) and (out[1:3] == 0xA5).all()
    back = _poison(3, 4, 6, 4)
    _convert((KVLayout("B N D", B=4, N=8, D=6, dtype=U8), out), (cut, back), [[3, 1]])
    kept = back.transpose(2, 3).reshape(6, 8, 6)
    assert torch.equal(kept[1], tokens[2]) and (kept[[0, 2, 3, 4, 5]] == 0xA5).all()


V32 = {"B": 4, "N": 64, "steps": {"N": 656}}
LATENT = parts(
    latent=KVLayout("B N D", D=512, dtype=F8, **V32),
    scale=KVLayout("B N D", D=4, dtype=F32, offset_bytes=512, **V32),
    rope=KVLayout("B N D", D=64, dtype=BF16, offset_bytes=528, **V32),
)


def test_three_parts_in_a_page_and_an_indexer_beside_it():
    """DeepSeek V3.2's row of 656 bytes, and the indexer's of 132, to five tensors."""
    index = {"B": 4, "N": 64, "steps": {"N": 132}, "tensor": 1}
    members = {m.name: m.layout for m in LATENT.members}
    one = parts(
        **members,
        keys=KVLayout("B N D", D=128, dtype=F8, **index),
        keys_scale=KVLayout("B N", dtype=F32, offset_bytes=128, **index),
    )
    assert (one.num_tensors, one.num_pools, one.pools[0].page_bytes) == (2, 2, 656 * 64)
    rows, keys = _random(4, 64, 656), _random(4, 1, 64, 132)
    five = parts(
        **{name: replace(part, steps={}, offset_bytes=0, B=2, page_bytes=0, tensor=None)
           for name, part in ((m.name, m.layout) for m in one.members)}
    )  # fmt: skip
    out = [_poison(2, 64, n) for n in (512, 16, 128, 128, 4)]
    _convert((one, [rows, keys]), (five, [o.flatten() for o in out]), [[3, 1]])
    assert torch.equal(torch.cat([o[1] for o in out[:3]], -1), rows[3])
    assert torch.equal(torch.cat([o[1] for o in out[3:]], -1), keys[3, 0])
    assert all((o[0] == 0xA5).all() for o in out)
    plan = compile_plan(LATENT, LATENT)
    assert len(plan.runs.all) == 1 and plan.largest_fragment_bytes == 656 * 64, "a page between like pages is one piece"
    # vLLM's indexer keeps 64 keys, then their 64 scales.
    split = parts(
        keys=KVLayout("B N D", B=4, N=64, D=128, dtype=F8, steps={"B": 64 * 132}),
        keys_scale=KVLayout("B N", B=4, N=64, dtype=F32, offset_bytes=64 * 128, steps={"B": 64 * 132}),
    )
    assert split.num_pools == 1 and split.pools[0].page_bytes == 64 * 132
    cells = _poison(4, 64, 132)
    joined = parts(
        keys=KVLayout("B N D", B=4, N=64, D=128, dtype=F8, steps={"N": 132}),
        keys_scale=KVLayout("B N", B=4, N=64, dtype=F32, offset_bytes=128, steps={"N": 132}),
    )
    pages = _random(4, 64 * 132)
    _convert((split, pages), (joined, cells), [[0, 3]])
    wanted = torch.cat([pages[0, : 64 * 128].view(64, 128), pages[0, 64 * 128 :].view(64, 4)], 1)
    assert torch.equal(cells[3], wanted)


@pytest.mark.parametrize(
    ("letters", "shape"),
    [("B N H", (4, 16, 8)), ("B H", (4, 8)), ("B H D", (4, 8, 64)), ("B N", (4, 16)), ("B H N", (4, 8, 16))],
)
def test_scales_of_every_kind(letters, shape):
    """A scale a token and head, a page and head, a channel of a page (KIVI's keys), or a token; with zero points."""
    sizes = {"B": 4, "N": 16, "H": 8, "D": 64, "K": 2, "dtype": F8}
    own = {c: sizes[c] for c in letters.split()} | {"dtype": F32}
    kinds = {name: KVLayout(letters, **own) for name in ("k_scales", "k_zeros", "v_scales")}
    src = parts(kv=KVLayout("K B N H D", **sizes), **kinds)
    dst = parts(kv=KVLayout("B H N K D", **sizes), **kinds)
    values, scales = _random(2, 4, 16, 8, 64), [_random(*shape, 4).view(F32).view(shape) for _ in range(3)]
    out, out_scales = _poison(4, 8, 16, 128), [_poison(*shape, 4).view(F32).view(shape) for _ in range(3)]
    _convert((src, [values.view(F8), *scales]), (dst, [out.view(F8), *out_scales]), [[1, 3]])
    for k in range(2):
        assert torch.equal(out[3, ..., 64 * k : 64 * k + 64], values[k, 1].transpose(0, 1))
    for mine, right in zip(out_scales, scales, strict=True):
        assert torch.equal(mine[3].view(U8), right[1].view(U8)) and (mine[:3].view(U8) == 0xA5).all()


def test_a_scale_in_every_cell_is_sharded_with_it():
    """vLLM's fp8 page of 132 bytes a head and token to values and scales apart, by one call and one launch a rank."""
    cell = {"B": 3, "N": 16, "H": 4, "steps": {"N": 132}}
    whole = parts(
        kv=KVLayout("B H N D", D=128, dtype=F8, **cell), scales=KVLayout("B H N", dtype=F32, offset_bytes=128, **cell)
    )
    cells = _random(3, 4, 16, 132)
    ranks = [(whole.shard(rank, 2), cells[:, 2 * rank : 2 * rank + 2].contiguous()) for rank in range(2)]
    sizes = {"B": 3, "N": 16, "H": 4}
    apart = KVLayout("B N H D", D=128, dtype=F8, scales=KVLayout("B N H", dtype=F32, **sizes), **sizes)
    out = [_poison(3, 16, 4, 128).view(F8), _poison(3, 16, 4, 4).view(F32).squeeze(-1)]
    _convert(ranks, (apart, out), [[2, 0]])
    both = torch.cat([out[0][0].view(U8), out[1][0].unsqueeze(-1).view(U8)], -1)
    assert torch.equal(both, cells[2].transpose(0, 1))


@pytest.mark.parametrize(("src_ranks", "dst_ranks"), [(2, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("rows_first", [True, False])
def test_states_are_resharded_each_part_on_its_own(src_ranks, dst_ranks, rows_first):
    """Mamba2's conv state, rows of [x | B | C], and its ssm state by heads, in one page as vLLM packs them."""
    width, sizes, heads = 3, {"x": 64, "b": 16, "c": 16}, 8

    def state(rank: int, ranks: int) -> KVLayout:
        row = sum(sizes.values()) // ranks
        conv_bytes = width * row * 2
        page = conv_bytes + heads // ranks * 8 * 16 * 4
        found, at = {}, 0
        for name, whole in sizes.items():
            d = whole // ranks
            held = {"D": d, "first_d": rank * d, "total_d": whole, "B": 4, "W": width, "dtype": BF16}
            pattern, steps = ("B W D", {"W": row * 2, "B": page}) if rows_first else ("B D W", {"B": page})
            offset = at if rows_first else at * width
            found[name] = KVLayout(pattern, steps=steps, offset_bytes=offset, tensor=0, **held)
            at += 2 * d
        h = heads // ranks
        ssm = KVLayout("B H W D", B=4, H=h, W=8, D=16, dtype=F32, steps={"B": page}, offset_bytes=conv_bytes, tensor=0)
        return parts(**found, ssm=replace(ssm, first_head=rank * h, total_heads=heads))

    def page_of(x, b, c, ssm, rank: int, ranks: int) -> torch.Tensor:
        """Of [blocks, d, width] and [blocks, heads, ...] bytes, a rank's own."""
        mine = [t.chunk(ranks, 1)[rank] for t in (x, b, c, ssm)]
        conv = torch.cat(mine[:3], 1)
        conv = conv.transpose(1, 2) if rows_first else conv
        return torch.cat([conv.reshape(4, -1), mine[3].reshape(4, -1)], 1)

    values = [_random(4, n, width, 2) for n in sizes.values()] + [_random(4, heads, 8 * 16 * 4)]
    src = [(state(r, src_ranks), page_of(*values, r, src_ranks)) for r in range(src_ranks)]
    right = [page_of(*values, r, dst_ranks) for r in range(dst_ranks)]
    dst = [(state(r, dst_ranks), _poison(*right[r].shape)) for r in range(dst_ranks)]
    assert all(layout.num_pools == 1 for layout, _ in src + dst)
    _convert(src, dst, [[1, 2]])
    for (_, mine), wanted in zip(dst, right, strict=True):
        assert torch.equal(mine[2], wanted[1]) and (mine[[0, 1, 3]] == 0xA5).all()


def test_rows_of_a_state_are_never_cut():
    """Blocks of states are copied by the block, whatever the block size of what lies beside them."""
    state = KVLayout("B W D", B=4, W=4, D=8, dtype=U8)
    assert compile_plan(state, state).unit_tokens == 1
    with pytest.raises(ValueError, match="rows of part kv must be the same on both sides, got 4 and 2"):
        compile_plan(state, replace(state, W=2, page_bytes=0))
    both = lambda n: parts(kv=KVLayout("B N D", B=4, N=n, D=8, dtype=U8), x=state)  # noqa: E731
    assert compile_plan(both(16), both(16)).bytes == 16 * 8 + 32
    with pytest.raises(ValueError, match="blocks of 16 tokens cannot be cut into 8 where part x has no N"):
        compile_plan(both(16), both(8))
