"""Which group is attention and which are states; how a pool is cut for them."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from kvkernels.connectors.groups import choose_groups
from kvkernels.connectors.rows import Rows, group_mappings, num_chunks
from kvkernels.connectors.sums import PageSums
from kvkernels.layout import canonicalize
from kvkernels.layout.specs import MLA, ChunkedLocalAttention, FullAttention, KVCacheGroup, Mamba, SlidingWindow

SIZES = {"num_kv_heads": 2, "head_size": 8, "dtype": torch.float16}
FULL = FullAttention(block_size=16, **SIZES)
LATENT = MLA(block_size=32, head_size=8, dtype=torch.float16)
CHUNKED = ChunkedLocalAttention(block_size=16, attention_chunk_size=64, **SIZES)
WINDOW = SlidingWindow(block_size=16, sliding_window=64, **SIZES)
STATE = Mamba(shapes=((2, 8), (4, 4)), dtypes=(torch.float16, torch.float32), block_size=16)


def groups_of(*specs):
    return [KVCacheGroup([f"layer.{i}"], spec) for i, spec in enumerate(specs)]


def test_s3_the_attention_group_is_chosen_and_the_others_are_states():
    groups = [KVCacheGroup(["m0"], STATE), KVCacheGroup(["m1"], STATE), KVCacheGroup(["attn0", "attn1"], FULL)]
    choice = choose_groups(groups)
    assert (choice.attention, choice.attention_layers, choice.block_size) == (2, ("attn0", "attn1"), 16)
    assert choice.states == (0, 1) and choice.chained == (2,)


def test_s3_the_real_case_of_48_states_and_16_attention_layers():
    state = Mamba(shapes=((4,),), dtypes=(torch.float32,), block_size=1568)
    full = FullAttention(block_size=1568, **SIZES)
    groups = [KVCacheGroup([f"m{g}.{i}" for i in range(16)], state) for g in range(3)]
    groups.append(KVCacheGroup([f"a{i}" for i in range(16)], full))
    choice = choose_groups(groups)
    assert (choice.attention, len(choice.attention_layers), choice.block_size) == (3, 16, 1568)
    assert choice.states == (0, 1, 2) and 10_976 // choice.block_size == 7 and 10_976 % choice.block_size == 0


@pytest.mark.parametrize(
    "specs,chosen",
    [
        ((STATE, WINDOW, CHUNKED, LATENT, FULL), 4),
        ((STATE, WINDOW, CHUNKED, LATENT), 3),
        ((STATE, WINDOW, CHUNKED), 2),
        ((STATE, WINDOW), 1),
        ((FULL, FULL), 0),
    ],
)
def test_s3_full_attention_comes_before_mla_chunked_and_sliding_window(specs, chosen):
    assert choose_groups(groups_of(*specs)).attention == chosen


def test_a_model_with_states_alone_has_no_attention():
    choice = choose_groups(groups_of(STATE, STATE))
    assert choice.attention is None and choice.attention_layers == () and choice.states == (0, 1)


def test_a_group_may_be_named():
    assert choose_groups(groups_of(FULL, WINDOW), 1).attention == 1


@pytest.mark.parametrize("group,text", [(3, "from 0 to 2, got 3"), (-1, "from 0 to 2, got -1"), (0, "of states")])
def test_s3_a_group_that_does_not_exist_is_an_error_with_the_range(group, text):
    with pytest.raises(ValueError, match=text):
        choose_groups(groups_of(STATE, FULL, WINDOW), group)


def test_s3_no_groups_are_an_error():
    with pytest.raises(ValueError, match="at least one"):
        choose_groups([])


def test_a_spec_of_no_known_kind_is_named():
    class Odd:
        block_size = 16

    with pytest.raises(ValueError, match="Odd"):
        choose_groups(groups_of(Odd()))


def test_one_spec_a_layer_and_a_group_without_layers_are_read():
    groups = [KVCacheGroup(["a", "b"], {"a": FULL, "b": FULL}), KVCacheGroup([], WINDOW)]
    assert choose_groups(groups).attention_layers == ("a", "b")


def test_s3_states_are_opaque_pages_at_the_place_of_their_tensor():
    """Each group's layers have their bytes in the row, those that groups share once."""
    raw = torch.randint(0, 256, (4, 512), dtype=torch.uint8)
    halves, singles = raw.view(torch.float16), raw.view(torch.float32)
    states = [halves.as_strided((4, 2, 8), (256, 8, 1)), singles.as_strided((4, 4, 4), (128, 4, 1), 8)]
    state = Mamba(shapes=((2, 8), (4, 4)), dtypes=(torch.float16, torch.float32), page_size_padded=512)
    canonical = canonicalize({"m": states}, [KVCacheGroup(["m"], state)])
    rows = Rows(tuple(one.page_size_bytes for one in canonical.tensors))
    assert rows.row_bytes == 512 and [ref.page_size_bytes for ref in canonical.group_data_refs[0]] == [96]
    pool = torch.zeros(3, rows.row_bytes, dtype=torch.uint8)
    view = rows.views(pool)[0][:, :96]
    view[2] = canonical.tensors[0].tensor[1, :96].view(torch.uint8)
    assert torch.equal(pool[2, :32], states[0][1].contiguous().view(torch.uint8).flatten())
    assert torch.equal(pool[2, 32:96], states[1][1].contiguous().view(torch.uint8).flatten())


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3, 7])
def test_mappings_agree_with_going_through_the_blocks_one_by_one(blocks_per_chunk):
    draw = np.random.default_rng(blocks_per_chunk)
    for _ in range(200):
        sizes = [int(n) for n in draw.integers(0, 9, draw.integers(1, 5))]
        firsts = [int(n) for n in draw.integers(0, 20, len(sizes))]
        device, chunks, expected = [], [], []
        for size, first in zip(sizes, firsts, strict=True):
            pairs, chunk = [], None
            for place in range(first, first + size):
                if chunk is None or place % blocks_per_chunk == 0:
                    chunk = int(draw.integers(0, 1000))
                    chunks.append(chunk)
                device.append(int(draw.integers(0, 1000)))
                pairs.append([device[-1], chunk * blocks_per_chunk + place % blocks_per_chunk])
            expected.append(pairs or None)
        got = group_mappings(
            np.array(device, np.int32), np.array(chunks, np.int32), sizes, firsts, blocks_per_chunk
        )  # fmt: skip
        assert [None if one is None else one.tolist() for one in got] == expected


@pytest.mark.parametrize("device,chunks,sizes", [([1, 2], [0], [3]), ([1, 2, 3], [0], [2]), ([1, 2], [0, 1, 2], [2])])
def test_ids_that_are_not_as_many_as_the_sizes_say_are_refused(device, chunks, sizes):
    with pytest.raises(ValueError, match="group_sizes must make"):
        group_mappings(np.array(device), np.array(chunks), sizes, [0], 2)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_less_than_one_chunk_of_the_budget_is_unused_over_all_ranks(ranks, verify):
    for cpu_bytes in (1_000_000, 1 << 20, 12_345_678):
        chunks = num_chunks(cpu_bytes, 4096, 3, ranks, verify=verify)
        chunk_bytes = Rows((2048, 2048), verify).row_bytes * 3 * ranks
        assert cpu_bytes - chunk_bytes < chunks * chunk_bytes <= cpu_bytes


@pytest.mark.parametrize("cpu_bytes,block_bytes", [(4095, 4096), (0, 4096), (-1, 4096), ("x", 1), (4096, 0)])
def test_a_budget_below_a_chunk_is_refused(cpu_bytes, block_bytes):
    with pytest.raises(ValueError, match="num_chunks: "):
        num_chunks(cpu_bytes, block_bytes, 1)


def test_without_vllm_the_error_names_the_extra():
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is there")
    with pytest.raises(ImportError, match=r"needs vLLM, which is not installed: pip install kvkernels\[vllm\]"):
        importlib.import_module("kvkernels.connectors.vllm")


def test_without_xxhash_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ImportError, match=r"verify=True needs xxhash.*pip install kvkernels\[vllm\]"):
        PageSums(torch.zeros(2, 16, dtype=torch.uint8))
