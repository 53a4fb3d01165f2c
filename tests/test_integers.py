"""Integers are what ``operator.index`` takes, numpy's too, but no bool; what is none is named in one sentence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import kvkernels
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks, copy_slots, expand_blocks, whole_page_runs
from kvkernels.common.arguments import integer
from kvkernels.layout import TensorParallel, canonicalize, copy_groups, empty_host_caches, opaque_mapping
from kvkernels.layout.specs import MLA, KVCacheGroup
from kvkernels.names import BufferName, add_prefix, pair_names, select

LAYOUT = KVLayout("L | B N D", L=3, B=4, N=2, D=4, dtype=torch.float32)
PAIR, IDS = torch.tensor([[0, 1]]), torch.tensor([1])
PAGES = {"a": torch.zeros(6, 4, 8, dtype=torch.float16)}
GROUPS = [KVCacheGroup(["a"], MLA(block_size=4, head_size=8, dtype=torch.float16))]
ENGINE = canonicalize(PAGES, GROUPS)
HOST = empty_host_caches(ENGINE, 6)


def _cache() -> KVCache:
    return KVCache(LAYOUT, [torch.zeros(4, 2, 4) for _ in range(3)])


def _slots(skip_first) -> None:
    copy_slots(
        _cache(), torch.tensor([0, 1]), torch.zeros(1, 3, 2, 4), direction="to_buffer", skip_first=skip_first
    )  # fmt: skip


# Each takes the integer 1.
CALLS = {
    "KVLayout": lambda n: replace(LAYOUT, L=n),
    "shard rank": lambda n: KVLayout("B H", B=2, H=2, dtype=torch.int8).shard(n, 2),
    "shard size": lambda n: LAYOUT.shard(0, n),
    "is_writer": lambda n: LAYOUT.shard(0, 1).is_writer(n),
    "unit_tokens": lambda n: compile_plan(LAYOUT, LAYOUT, unit_tokens=n),
    "runs": lambda n: compile_plan(LAYOUT, LAYOUT).runs[n],
    "layer": lambda n: convert_blocks(_cache(), _cache(), PAIR, layer=n),
    "convert unit_tokens": lambda n: convert_blocks(_cache(), _cache(), PAIR, unit_tokens=n),
    "skip_first": _slots,
    "blocks_per_chunk": lambda n: expand_blocks(IDS, n),
    "chunk_ids": lambda n: expand_blocks([n], 2),
    "skip": lambda n: expand_blocks([1, 2], 2, n),
    "count": lambda n: expand_blocks([1, 2], 2, 0, n),
    "page_bytes": lambda n: whole_page_runs([PAGES["a"]], [n]),
    "num_blocks": lambda n: canonicalize({"a": torch.zeros(1, 4, 8, dtype=torch.float16)}, GROUPS, num_blocks=n),
    "block_dim": lambda n: canonicalize({"a": torch.zeros(1, 6, 4, 8, dtype=torch.float16)}, GROUPS, block_dim=n),
    "empty_host_caches": lambda n: empty_host_caches(ENGINE, n, blocks_per_host_block=n),
    "group_sizes": lambda n: copy_groups(ENGINE, HOST, IDS, IDS, [n]),
    "group_sizes of numpy": lambda n: copy_groups(ENGINE, HOST, IDS, IDS, np.array([n])),
    "first_blocks": lambda n: copy_groups(
        ENGINE, empty_host_caches(ENGINE, 6, blocks_per_host_block=2), IDS, IDS, [1], first_blocks=[n]
    ),
    "TensorParallel": lambda n: TensorParallel(n, 2, 2),
    "opaque_mapping": lambda n: opaque_mapping(8, n, 2),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_integers_of_any_kind(call, kind):
    CALLS[call](kind(1))


@each_call
@pytest.mark.parametrize("value", [True, np.True_, 1.0, "1", torch.tensor(True), 10**5000], ids=lambda v: str(type(v)))
def test_what_is_no_integer(call, value):
    """Python's own words for a number of thousands of digits would say nothing of the argument."""
    with pytest.raises((ValueError, IndexError), match=r"must (be|fit|name)") as caught:
        CALLS[call](value)
    assert "set_int_max_str_digits" not in str(caught.value)


def test_the_ends_of_int64():
    """All but the lowest number, which has no opposite."""
    most = 2**63 - 1
    assert [integer("it", n) for n in (most, -most, 0)] == [most, -most, 0]
    for n in (most + 1, -most - 1):
        with pytest.raises(ValueError, match=r"^it must fit in int64, got a number of 64 bits$"):
            integer("it", n)
    assert integer("it", 3, "from 3 on", least=3) == 3
    with pytest.raises(ValueError, match=r"^it must be from 3 on, got 2$"):
        integer("it", 2, "from 3 on", least=3)


def test_a_device_is_an_integer_or_a_name():
    with pytest.raises(ValueError, match="check_device: device must be an integer, got True"):
        kvkernels.check_device(True)


def test_names_with_thousands_of_digits():
    name = f"past_key.{'1' * 5000}"
    wanted = "names must have a layer of at most 18 digits, got one of 5000 digits"
    for read in (BufferName.parse, lambda n: add_prefix([n], "A"), lambda n: pair_names([n]), lambda n: select([n])):
        with pytest.raises(ValueError, match=wanted):
            read(name)
    assert BufferName.parse(f"past_key.{'1' * 18}") is not None
