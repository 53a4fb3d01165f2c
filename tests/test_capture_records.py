"""Capture records: what a configuration refuses, how shards are joined, what a result holds, and made-up captures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvkernels_records
from kvkernels_records import (
    CaptureConfig,
    CaptureResult,
    LayerCapture,
    capture_kv_mock,
    reconstruct_tp_shards,
)
from kvkernels_records.capture import parse_name
from kvkernels_records.dtypes import BFLOAT16, DTYPES, as_float64, dtype_name

DRAW = np.random.default_rng(7)
KEY = DRAW.standard_normal((2, 5, 4)).astype(np.float16)


def config(**changed: object) -> CaptureConfig:
    return CaptureConfig(**{"url": "http://localhost:8000", "prompt": "hello", "output": "out.npz", **changed})


def test_config_defaults():
    one = config()
    assert (one.layers, one.capture_points, one.tp_size, one.max_tokens) == (None, ("after_prefill",), 1, 1)
    assert one.faults() == []
    one.check()


@pytest.mark.parametrize(
    "changed,fault",
    [
        ({"url": ""}, "url must not be empty"),
        ({"prompt": " "}, "prompt must not be empty"),
        ({"output": ""}, "output must not be empty"),
        ({"layers": [0, -1]}, "layers must be from 0 on, got -1"),
        ({"layers": []}, "layers must name at least one, got none"),
        ({"layers": [1, 1]}, "layers must be named once, got 1 again"),
        ({"tp_size": 0}, "tp_size must be at least 1, got 0"),
        ({"capture_points": ()}, "capture_points must name at least one, got none"),
        (
            {"capture_points": ("later",)},
            "capture_points must be of after_transfer, after_prefill, during_decode, got 'l",
        ),
        ({"capture_points": ("after_prefill",) * 2}, "capture_points must be named once, got 'after_prefill' again"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"capture_points": ("during_decode",)}, "max_tokens must be at least 2 for during_decode, got 1"),
    ],
)
def test_config_refuses(changed, fault):
    (found,) = config(**changed).faults()
    assert found.startswith(fault)
    with pytest.raises(ValueError, match=r"^CaptureConfig: "):
        config(**changed).check()


def test_config_lists_every_fault():
    wrong = CaptureConfig("", "", "", [-1, -2], (), 0, 0)
    assert len(wrong.faults()) == 8
    with pytest.raises(ValueError) as raised:
        wrong.check()
    assert all(fault in str(raised.value) for fault in wrong.faults())


def test_shards_of_4_heads_make_8_in_rank_order():
    shards = [np.full((4, 10, 8), rank) for rank in range(2)]
    joined = reconstruct_tp_shards(shards)
    assert joined.shape == (8, 10, 8)
    assert (joined[:4] == 0).all() and (joined[4:] == 1).all()


def test_one_shard_is_itself():
    assert reconstruct_tp_shards([KEY]) is KEY


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_every_axis_works_and_concat_sizes_may_differ(axis):
    shapes = [[2, 5, 4], [2, 5, 4]]
    shapes[1][axis] = 7
    shards = [DRAW.integers(0, 255, shape, dtype=np.uint8) for shape in shapes]
    joined = reconstruct_tp_shards(shards, axis)
    split = np.split(joined, [shapes[0][axis]], axis % 3)
    assert all(np.array_equal(got, shard) for got, shard in zip(split, shards, strict=True))


@pytest.mark.parametrize(
    "shards,axis,text",
    [
        ([], 0, "shards must not be empty"),
        ([KEY, KEY[0]], 0, "shards[1] must have 3 dimensions, got 2"),
        ([KEY, KEY, KEY[:, :3]], 0, "shards[2] must have size 5 on axis 1 as shards[0] has, got 3"),
        ([KEY, KEY[:, :, :1]], -3, "shards[1] must have size 4 on axis 2 as shards[0] has, got 1"),
        ([KEY, KEY.astype(np.float32)], 0, "shards[1] must be of dtype float16, got float32"),
        ([KEY], 3, "axis must be from -3 to 2, got 3"),
        ([KEY], -4, "axis must be from -3 to 2, got -4"),
    ],
)
def test_shards_that_do_not_fit_are_refused(shards, axis, text):
    with pytest.raises(ValueError) as raised:
        reconstruct_tp_shards(shards, axis)
    assert str(raised.value) == f"reconstruct_tp_shards: {text}"


@pytest.mark.parametrize(
    "changed,text",
    [
        ({"layer_index": -1}, "layer_index must be from 0 on"),
        ({"capture_point": "before"}, "capture_point must be of"),
        ({"kind": "odd"}, "kind must be of"),
        ({"key": KEY[0]}, "key must be (heads, tokens, dim)"),
        ({"value": KEY.astype(np.float32)}, "key and value must be of one dtype, got float16 and float32"),
        ({"value": KEY[:, :4]}, "key and value must have as many heads and tokens"),
        ({"parts": {"A/b": KEY}}, "parts must have names of a-z"),
    ],
)
def test_layers_that_are_none_are_refused(changed, text):
    given = {"layer_index": 0, "capture_point": "after_prefill", "key": KEY, "value": KEY, **changed}
    with pytest.raises(ValueError) as raised:
        LayerCapture(**given)
    assert text in str(raised.value)


def test_objects_are_no_dtype_of_a_capture():
    with pytest.raises(TypeError, match="dtype must be one of"):
        LayerCapture(0, "after_prefill", KEY.astype(object), None)


def test_the_same_layer_and_point_twice_is_an_error():
    one = LayerCapture(3, "after_prefill", KEY, KEY)
    with pytest.raises(ValueError, match="layer 3 must be given once for after_prefill"):
        CaptureResult([one, one])
    CaptureResult([one, LayerCapture(3, "after_transfer", KEY, KEY), LayerCapture(4, "after_prefill", KEY, KEY)])


def test_values_of_different_dims_are_kept():
    assert LayerCapture(0, "after_prefill", KEY, KEY[:, :, :2]).arrays().keys() == {
        "layer_0_after_prefill_key",
        "layer_0_after_prefill_value",
    }


def test_ranks_are_cut_and_joined_again():
    whole = capture_kv_mock("a b c", layers=[0, 5])
    ranks = [whole.rank(rank, 4) for rank in range(4)]
    assert [rank.metadata["tp_rank"] for rank in ranks] == [0, 1, 2, 3]
    for name, array in whole.arrays().items():
        parts = [rank.arrays()[name] for rank in ranks]
        assert parts[0].shape == (8, 3, 128)
        assert np.array_equal(reconstruct_tp_shards(parts), array)
    with pytest.raises(ValueError, match="tp_size must divide the heads, got 3 for 32"):
        whole.rank(0, 3)
    with pytest.raises(ValueError, match="tp_rank must be from 0 to 3, got 4"):
        whole.rank(4, 4)


def test_get():
    result = capture_kv_mock("a", layers=[1])
    assert result.get(1).layer_index == 1
    with pytest.raises(KeyError, match="layer 2 was not captured after_prefill"):
        result.get(2)


@pytest.mark.parametrize(
    "name", ["layer_01_after_prefill_key", "layer_1_later_key", "layer_1_after_prefill_", "key", ""]
)
def test_other_names_are_no_captures(name):
    assert parse_name(name) is None


def test_mock_defaults():
    result = capture_kv_mock("three words here")
    assert len(result.layers) == 32 and result.metadata["mock"] is True
    assert {one.key.shape for one in result} == {one.value.shape for one in result} == {(32, 3, 128)}
    assert {one.key.dtype for one in result} == {np.dtype(np.float16)}
    assert len({one.key.tobytes() for one in result} | {one.value.tobytes() for one in result}) == 64


def test_mock_is_seeded():
    def values(**changed: int) -> bytes:
        return capture_kv_mock("a b", layers=[0], **changed).get(0).key.tobytes()

    assert values() == values() != values(seed=1)


def test_mock_honours_tp_size():
    assert capture_kv_mock("a", layers=[0], tp_size=8).metadata["tp_size"] == 8
    first, second = (capture_kv_mock("a b", layers=[0], tp_size=size).get(0) for size in (1, 8))
    assert np.array_equal(first.key, second.key) and np.array_equal(first.value, second.value)
    with pytest.raises(ValueError, match="tp_size must divide 32 heads, got 3"):
        capture_kv_mock("a", tp_size=3)


def test_mock_decodes_and_keeps_the_prompts_values():
    points = ("after_prefill", "during_decode")
    result = capture_kv_mock("a b c", layers=[0], capture_points=points, max_tokens=4)
    first, second = (result.get(0, point).key for point in points)
    assert second.shape == (32, 6, 128) and np.array_equal(second[:, :3], first)


@pytest.mark.parametrize(
    "arguments,text",
    [
        ({"prompt": " "}, "prompt must not be empty"),
        ({"layers": [32]}, "layers must be below 32, got 32"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_mock_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        capture_kv_mock(**{"prompt": "a", **arguments})


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_bit_pattern_has_torchs_value(name):
    bits = np.arange(1 << 8 * DTYPES[name].itemsize).astype(f"u{DTYPES[name].itemsize}")
    wanted = torch.from_numpy(bits.copy()).view(getattr(torch, name)).double().numpy()
    assert np.array_equal(as_float64(bits.view(DTYPES[name])), wanted, equal_nan=True)


@pytest.mark.parametrize("name", DTYPES)
def test_names_of_dtypes_are_torchs(name):
    assert dtype_name(DTYPES[name]) == name
    assert getattr(torch, name).itemsize == DTYPES[name].itemsize


def test_records_refuse_arithmetic():
    with pytest.raises(TypeError):
        np.zeros(2, BFLOAT16) + np.zeros(2, BFLOAT16)


def test_everything_public_has_a_docstring():
    assert all(
        getattr(kvkernels_records, name).__doc__ for name in kvkernels_records.__all__ if name != "CAPTURE_POINTS"
    )
