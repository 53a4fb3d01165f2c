"""Buffer names: prefixing, pairing and selection, over every name that exported models use."""

from __future__ import annotations

import copy

import pytest
import torch

from kvkernels import KVCache, KVLayout, convert_blocks
from kvkernels.names import STEMS, BufferName, add_prefix, pair_names, pattern, select

NEVER = [
    "vision_embeds", "pixel_values", "image_features", "deepstack_features", "image_idx", "image_idx_output", "logits",
    "repetition_penalties", "presence_penalties", "past_repetition_penalty_buffer", "past_presence_penalty_buffer",
    "past_repetition_penalty_buffer_RetainedState", "past_presence_penalty_buffer_RetainedState",
    "vision_embeds_RetainedState",
    *(f"past_{kind}_{where}.{i}" for kind in ("key", "value") for where in ("self", "cross") for i in (0, 10)),
    "past_key_self.0_RetainedState", "past_key.", "past_key.x", "past_key.0_", "xpast_key.0", "past_key.0.1",
    "past_key.01",
    "past_key.0\n", "past_key.٣", "past_key.0__RetainedState", "past_key.0_RetainedState_RetainedState",
    "past_key.0_a_b", "past_key.0_é",
]  # fmt: skip


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("layer", [0, 1, 10, 123])
def test_a_prefix_goes_between_layer_and_suffix(stem, layer):
    names = [f"{stem}.{layer}", f"{stem}.{layer}_RetainedState", f"{stem}.{layer}_InternalRetainedState"]
    renamed = [
        f"{stem}.{layer}_VLLM",
        f"{stem}.{layer}_VLLM_RetainedState",
        f"{stem}.{layer}_VLLM_InternalRetainedState",
    ]
    assert add_prefix(names, "VLLM") == renamed
    assert add_prefix(renamed, "VLLM") == renamed
    assert add_prefix(names, None) == names and add_prefix(renamed, None) == renamed
    assert [str(BufferName.parse(name)) for name in names + renamed] == names + renamed
    with pytest.raises(ValueError, match=f"'{stem}.{layer}_VLLM' must have no other prefix, got prefix 'B'"):
        add_prefix(renamed, "B")


@pytest.mark.parametrize("name", NEVER)
def test_other_names_stay(name):
    assert add_prefix([name], "VLLM") == [name]
    assert BufferName.parse(name) is None and select([name]) == {}


@pytest.mark.parametrize(
    "prefix", ["", "é²", "a b", "a_b", "a-b", "VLLM\n", "٣", "RetainedState", "InternalRetainedState", 3]
)
def test_a_prefix_is_ascii_letters_and_digits(prefix):
    for call in (lambda: add_prefix(["past_key.0"], prefix), lambda: pattern(prefix), lambda: select([], prefix)):
        with pytest.raises(ValueError, match=r"^prefix must be ASCII letters and digits") as caught:
            call()
        assert repr(prefix) in str(caught.value)


@pytest.mark.parametrize("prefix", ["A", "0", "VLLM2", "Retained", "State"])
def test_prefixes(prefix):
    (name,) = add_prefix(["k_pe.7_RetainedState"], prefix)
    assert name == f"k_pe.7_{prefix}_RetainedState"
    assert BufferName.parse(name) == BufferName("k_pe", 7, prefix, "RetainedState")


def test_dicts_and_parts_are_not_changed_in_place():
    io = {"past_key.0": "float16", "logits": "float32"}
    parts = {"vision": dict(io), "lang": dict(io)}
    before = copy.deepcopy(parts)
    assert add_prefix(io, "V") == {"past_key.0_V": "float16", "logits": "float32"}
    assert add_prefix(parts, "V") == {"vision": io, "lang": {"past_key.0_V": "float16", "logits": "float32"}}
    assert parts == before
    assert add_prefix({"lang": ["past_key.0"]}, "V") == {"lang": ["past_key.0_V"]}
    assert add_prefix({}, "V") == {} and add_prefix([], "V") == []


def test_two_names_must_not_become_one():
    with pytest.raises(ValueError, match=r"must stay different, got 'past_key.0_V' twice"):
        add_prefix(["past_key.0", "past_key.0_V"], "V")


@pytest.mark.parametrize("prefix", [None, "VLLM"])
def test_pairs(prefix):
    names = add_prefix(["past_key.1", "past_key.10", "conv_state.1"], prefix)
    suffixes = ["RetainedState", "InternalRetainedState", "RetainedState"]
    outputs = [f"{name}_{suffix}" for name, suffix in zip(names, suffixes, strict=True)]
    assert pair_names([*outputs, "logits", *names]) == dict(zip(names, outputs, strict=True))


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["past_key.1", "past_key.10_RetainedState"], "'past_key.10_RetainedState' must have the input 'past_key.10'"),
        (["past_key.1"], "input 'past_key.1' must have an output, got none"),
        (["past_key.1_V", "past_key.1_RetainedState"], "must have the input 'past_key.1', got none"),
        (["k_pe.1", "k_pe.1_RetainedState", "k_pe.1_InternalRetainedState"], "'k_pe.1' must have one output, got"),
    ],
)
def test_names_that_do_not_pair(names, match):
    with pytest.raises(ValueError, match=match):
        pair_names(names)


def test_a_selection_is_pools_by_kind_and_layer():
    tensors = {
        f"{kind}.{i}_V": torch.full((4, 2), 10 * i + (kind == "past_value"))
        for i in (10, 1)
        for kind in ("past_value", "past_key")
    }
    tensors |= {"past_key.1": torch.zeros(1), "past_key.1_V_RetainedState": torch.zeros(1), "logits": torch.zeros(1)}
    found = select(tensors, "V")
    assert list(found) == [("past_key", 1), ("past_value", 1), ("past_key", 10), ("past_value", 10)]
    assert all(found[kind, layer] is tensors[f"{kind}.{layer}_V"] for kind, layer in found)
    assert list(select(tensors)) == [("past_key", 1)]
    assert list(select(tensors, "V", kinds=["past_value"])) == [("past_value", 1), ("past_value", 10)]
    assert select(list(tensors), "V")["past_key", 10] == "past_key.10_V"
    layout = KVLayout("L K | B D", L=2, K=2, B=4, D=2, dtype=torch.int64)
    paged = KVCache(KVLayout("B L K D", L=2, K=2, B=1, D=2, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    convert_blocks(KVCache(layout, list(found.values())), paged, torch.tensor([[3, 0]]))
    assert paged.tensors[0].tolist() == [[10, 10, 11, 11, 100, 100, 101, 101]]


def test_refused_selections():
    with pytest.raises(ValueError, match=r"kinds must be some of past_key, .*, got \[.keys.\]"):
        select([], kinds=["keys"])
    assert list(select(["k_pe.0"], kinds=iter(["k_pe"]))) == [("k_pe", 0)]
    for call in (lambda: select("k_pe.0"), lambda: select([], kinds=[]), lambda: add_prefix("k_pe.0", "V")):
        with pytest.raises(ValueError, match=r"must be"):
            call()
    with pytest.raises(ValueError, match=r"each name once, got 'k_pe.0' twice"):
        select(["k_pe.0", "k_pe.0"])
