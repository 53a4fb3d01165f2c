"""Comparing captures: figures against a slow model, each rule, and where the first difference is."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kvkernels
from kvkernels_records import CaptureFileError, CaptureResult, LayerCapture, capture_kv_mock, measure, save_capture
from kvkernels_records import check as check_module
from kvkernels_records.check import Limits, Report, compare
from kvkernels_records.dtypes import BFLOAT16, as_float64
from kvkernels_records.files import save_arrays
from kvkernels_records.pages import page_digests, save_page_digests, written_pages
from kvkernels_records.rules import parse_rule
from kvkernels_records.sources import open_source

DRAW = np.random.default_rng(5)


def check(tmp_path: Path, a: dict, b: dict, limits: Limits | None = None, **options: object) -> Report:
    """Compare two sets of arrays by way of files."""
    paths = [save_npz(tmp_path / f"{name}.npz", arrays) for name, arrays in (("a", a), ("b", b))]
    return compare(open_source([paths[0]]), open_source([paths[1]]), limits or Limits(), **options)


def save_npz(path: Path, arrays: dict) -> Path:
    np.savez(path, **arrays)
    return path


def one(report: Report) -> dict:
    (key,) = report.keys
    return key


def slow_figures(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, int]:
    """Element by element, in Python's own floats."""
    worst = total = dot = first = second = 0.0
    mismatches = 0
    for x, y in zip(as_float64(a).ravel().tolist(), as_float64(b).ravel().tolist(), strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            mismatches += not (x == y or (math.isnan(x) and math.isnan(y)))
            continue
        worst, total = max(worst, abs(x - y)), total + abs(x - y)
        dot, first, second = dot + x * y, first + x * x, second + y * y
    cosine = (
        1.0 if first == second == 0 else 0.0 if 0 in (first, second) else dot / math.sqrt(first) / math.sqrt(second)
    )
    return worst, total / a.size, cosine, mismatches


@pytest.mark.parametrize("slab", [1, 7, 1 << 19])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint16"])
@pytest.mark.parametrize("shape", [(2, 6, 5), (30,), (5, 6), (), (2, 3, 4, 5)])
def test_figures_are_those_of_a_slow_model(tmp_path, monkeypatch, shape, dtype, slab):
    monkeypatch.setattr(measure, "_SLAB_ELEMENTS", slab)
    a, b = (np.asarray(DRAW.standard_normal(shape) * 50).astype(np.float32).astype(dtype) for _ in range(2))
    if dtype.startswith("float") and a.size > 9:
        for array in (a, b):
            array.reshape(-1)[DRAW.integers(0, a.size, 3)] = DRAW.choice([np.nan, np.inf, -np.inf, 0.0], 3)
    found = one(check(tmp_path, {"x": a}, {"x": b}))
    worst, mean, cosine, mismatches = slow_figures(a, b)
    assert found["max_abs_diff"] == worst
    assert found["mean_abs_diff"] == pytest.approx(mean, rel=1e-12)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-12)
    assert found["nonfinite_mismatches"] == mismatches
    assert found["divergent"] == (mismatches > 0 or worst > 1e-3 or cosine < 0.999)


def test_equal_arrays_agree(tmp_path):
    x = DRAW.standard_normal((2, 3, 4))
    found = one(check(tmp_path, {"x": x}, {"x": x}))
    assert (found["divergent"], found["max_abs_diff"], found["cosine"]) == (False, 0.0, 1.0)


def test_the_union_of_the_keys_is_compared_and_a_missing_one_diverges(tmp_path):
    x = np.ones(3)
    report = check(tmp_path, {"both": x, "first": x}, {"both": x, "second": x})
    assert {key["key"]: key["reason"] for key in report.keys} == {
        "both": None,
        "first": "missing in target",
        "second": "missing in baseline",
    }
    assert report.divergent


def test_another_shape_diverges(tmp_path):
    found = one(check(tmp_path, {"x": np.ones((2, 3))}, {"x": np.ones((3, 2))}))
    assert found["divergent"] and found["reason"] == "shapes (2, 3) and (3, 2)" and found["cosine"] is None


def test_both_zero_is_cosine_1_and_one_zero_is_0(tmp_path):
    zero, small = np.zeros(4), np.full(4, 1e-9)
    assert one(check(tmp_path, {"x": zero}, {"x": -zero}))["cosine"] == 1.0
    for a, b in ((zero, small), (small, zero)):
        found = one(check(tmp_path, {"x": a}, {"x": b}))
        assert found["cosine"] == 0.0 and found["divergent"]


def test_thresholds_are_reached_and_not_passed(tmp_path):
    a, b = np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.5])
    assert not one(check(tmp_path, {"x": a}, {"x": b}, Limits(0.5, 0.9)))["divergent"]
    assert one(check(tmp_path, {"x": a}, {"x": b}, Limits(0.499, 0.9)))["reason"] == "max_abs_diff 0.5 > 0.499"
    assert "cosine" in one(check(tmp_path, {"x": a}, {"x": b}, Limits(0.5, 0.9999)))["reason"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_on_one_side_diverge(tmp_path, value):
    a = np.ones(5)
    b = a.copy()
    b[3] = value
    for first, second in ((a, b), (b, a)):
        found = one(check(tmp_path, {"x": first}, {"x": second}, Limits(1e9, -1.0)))
        assert found["divergent"] and found["reason"] == "1 NaN or Inf on one side"


def test_nan_and_inf_in_the_same_places_agree(tmp_path):
    a = np.array([1.0, np.nan, np.inf, -np.inf])
    assert not one(check(tmp_path, {"x": a}, {"x": a + np.array([1e-9, 0, 0, 0])}))["divergent"]
    assert one(check(tmp_path, {"x": a}, {"x": -a}))["nonfinite_mismatches"] == 2
    assert one(check(tmp_path, {"x": a[:3]}, {"x": a[[0, 2, 1]]}))["nonfinite_mismatches"] == 2


def test_empty_arrays_are_equal(tmp_path):
    for shape in ((0,), (2, 0, 4), (0, 3, 4)):
        found = one(check(tmp_path, {"x": np.zeros(shape)}, {"x": np.zeros(shape)}))
        assert (found["divergent"], found["max_abs_diff"], found["cosine"]) == (False, 0.0, 1.0)


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(CaptureFileError, match="there is nothing to compare"):
        check(tmp_path, {}, {})
    for name in ("c", "d"):
        save_capture(CaptureResult([]), tmp_path / f"{name}.npz")
    with pytest.raises(CaptureFileError, match="there is nothing to compare"):
        compare(*(open_source([tmp_path / f"{name}.npz"]) for name in ("c", "d")), Limits())


def test_json_is_strict(tmp_path):
    a = np.array([1e308, np.nan, np.inf, 1.0])
    report = check(tmp_path, {"x": a, "y": np.zeros(2)}, {"x": -a, "y": np.ones(2)}, Limits(math.inf, 0.5))
    text = json.dumps(report.as_json(), allow_nan=False)
    assert json.loads(text)["keys"][0]["max_abs_diff"] is None


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_that_float64_does_not_hold_have_a_cosine(tmp_path, scale):
    a = DRAW.standard_normal(50)
    b = a + 0.3 * DRAW.standard_normal(50)
    found = one(check(tmp_path, {"x": a * scale}, {"x": b * scale}))
    assert found["cosine"] == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-12)


def test_large_integers_differ_though_their_floats_do_not(tmp_path):
    a = np.array([1 << 60, 5], np.int64)
    found = one(check(tmp_path, {"x": a}, {"x": a + np.array([1, 0])}))
    assert found["max_abs_diff"] == 1.0 and found["divergent"]


@pytest.mark.parametrize("limits", [(-1e-3, 0.9), (math.nan, 0.9), (1e-3, 1.5), (1e-3, math.nan)])
def test_thresholds_that_are_none_are_refused(limits):
    with pytest.raises(ValueError, match="threshold must be a number"):
        Limits(*limits)


def test_two_capture_files_are_compared(tmp_path):
    result = capture_kv_mock("a b c", layers=[0, 1])
    paths = [save_capture(result, tmp_path / f"a{suffix}") for suffix in (".npz", ".safetensors")]
    report = compare(open_source(paths[:1]), open_source(paths[1:]), Limits())
    assert len(report.keys) == 4 and not report.divergent and report.first is None


def changed_capture(layers: int = 12) -> tuple[CaptureResult, CaptureResult]:
    first, second = (capture_kv_mock("a b c d e f", layers=range(layers)) for _ in range(2))
    return first, second


def compare_captures(tmp_path: Path, a: CaptureResult, b: CaptureResult, limits=None, **options) -> Report:
    paths = [save_capture(result, tmp_path / f"{name}.npz") for name, result in (("a", a), ("b", b))]
    return compare(open_source(paths[:1]), open_source(paths[1:]), limits or Limits(), **options)


@pytest.mark.parametrize("slab", [300, 6 * 128, 1 << 19])
def test_the_first_diverging_layer_head_and_token_are_named(tmp_path, monkeypatch, slab):
    monkeypatch.setattr(measure, "_SLAB_ELEMENTS", slab)
    a, b = changed_capture()
    b.get(10).key[0, 0, 0] += 1
    b.get(9).value[30, 3, 5] += 1
    b.get(9).value[2, 4, 5] += 5
    b.get(9).value[7, 3, 6] = np.nan
    report = compare_captures(tmp_path, a, b)
    assert report.first == {
        "key": "layer_9_after_prefill_value", "layer": 9, "capture_point": "after_prefill", "part": "value", "head": 7,
        "token": 3,
    }  # fmt: skip
    assert [key["key"] for key in report.keys if key["divergent"]] == [
        "layer_9_after_prefill_value",
        "layer_10_after_prefill_key",
    ]


def test_the_place_of_a_divergence_by_cosine_alone_is_the_largest_difference(tmp_path):
    a = {"layer_0_after_prefill_key": np.zeros((2, 3, 4))}
    b = {"layer_0_after_prefill_key": np.zeros((2, 3, 4))}
    b["layer_0_after_prefill_key"][1, 2] = 1e-5
    assert (check(tmp_path, a, b).first or {})["token"] == 2


def test_tokens_count_from_the_requests_first(tmp_path):
    a, b = (np.zeros((1, 4, 2), np.float32) for _ in range(2))
    b[0, 2] = 1
    results = [CaptureResult([LayerCapture(0, "after_prefill", x, x, "sliding_window", {}, 64)]) for x in (a, b)]
    report = compare_captures(tmp_path, *results, by="token")
    assert report.first["token"] == 66
    assert [unit["token"] for unit in report.units if unit["max_abs_diff"]] == [66]


@pytest.mark.parametrize(
    "by,group", [("layer", None), ("head", 0), ("token", 1), ("page", 1)], ids=["layer", "head", "token", "page"]
)
def test_figures_by_unit_are_those_of_the_units_elements(tmp_path, by, group):
    a, b = changed_capture(3)
    for layer in b.layers:
        layer.key += DRAW.standard_normal(layer.key.shape).astype(np.float16)
    report = compare_captures(tmp_path, a, b, by=by, page_tokens=4)
    pairs = list(zip(a.arrays().items(), b.arrays().values(), strict=True))
    for number, unit in enumerate(report.units):
        assert unit[by] == number
        if by == "layer":
            mine = [(x, y) for (name, x), y in pairs if name.startswith(f"layer_{number}_")]
        else:
            places = range(number * 4, min(6, number * 4 + 4)) if by == "page" else [number]
            mine = [(np.take(x, places, group), np.take(y, places, group)) for (_, x), y in pairs]
        x, y = (np.concatenate([pair[side].ravel() for pair in mine]).astype(np.float64) for side in (0, 1))
        assert unit["max_abs_diff"] == np.abs(x - y).max()
        assert unit["mean_abs_diff"] == pytest.approx(np.abs(x - y).mean())
        assert unit["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert len(report.units) == {"layer": 3, "head": 32, "token": 6, "page": 2}[by]


def test_pages_have_the_baselines_size(tmp_path):
    a, b = changed_capture(1)
    a.metadata["block_tokens"] = 2
    assert len(compare_captures(tmp_path, a, b, by="page").units) == 3
    del a.metadata["block_tokens"]
    with pytest.raises(ValueError, match="--page-tokens must be from 1 on with --by page, got None"):
        compare_captures(tmp_path, a, b, by="page")
    with pytest.raises(ValueError, match="--by must be of layer, head, token, page, got 'odd'"):
        compare_captures(tmp_path, a, b, by="odd")


def test_rules_take_the_thresholds_place_for_what_they_match(tmp_path):
    a = {"layer_0_after_prefill_key": np.ones(4), "layer_0_after_prefill_value": np.ones(4)}
    b = {name: array + 0.1 for name, array in a.items()}
    rules = [parse_rule("_key$ max_abs < 0.2 and cosine > 0.9"), parse_rule("_key max_abs < 0")]
    report = check(tmp_path, a, b, Limits(rules=rules))
    assert [key["divergent"] for key in report.keys] == [False, True]
    report = check(tmp_path, a, b, Limits(rules=[parse_rule(". rel < 0.05")]))
    assert {key["reason"] for key in report.keys} == {"not rel < 0.05"}


def test_no_rule_makes_nan_equal(tmp_path):
    rule = parse_rule(". max_abs >= 0")
    assert check(tmp_path, {"x": np.array([np.nan])}, {"x": np.array([1.0])}, Limits(rules=[rule])).divergent


@pytest.mark.parametrize(
    "expression,true",
    [
        ("max_abs < 2", True),
        ("1 < max_abs <= 1.5", True),
        ("not rel > 1e-3", False),
        ("cosine >= -1 and (mean_abs < 1 or max_abs < 0)", True),
        ("cosine >= 0.5 and max_abs < 1", False),
    ],
)
def test_rules_are_expressions(expression, true):
    figures = {"max_abs": 1.5, "mean_abs": 0.5, "rel": 0.25, "cosine": 0.9}
    assert parse_rule(f".* {expression}").holds(figures) == true


@pytest.mark.parametrize(
    "text",
    ["", "only", "( max_abs < 1", "x max_abs", "x max_abs < y", "x __import__('os')", "x max_abs == 1", "x 1 + 1 < 2",
     "x max_abs < nan", "x " + "(" * 500, "x lambda: 1", "x max_abs < 1j"],
)  # fmt: skip
def test_rules_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="check-kv: --rule must"):
        parse_rule(text)


@pytest.mark.parametrize("size", [2, 4])
def test_the_files_of_ranks_are_one_capture(tmp_path, size):
    whole = capture_kv_mock("a b c", layers=[0, 3])
    path = save_capture(whole, tmp_path / "whole.npz")
    ranks = [save_capture(whole.rank(rank, size), tmp_path / f"rank{rank}.safetensors") for rank in range(size)]
    baseline = open_source([path])
    assert not compare(baseline, open_source(ranks[::-1]), Limits(0, 1)).divergent
    with pytest.raises(CaptureFileError, match="must be of the ranks 0 to 1, got 1, 1"):
        open_source([ranks[1], ranks[1]])


def test_ranks_without_numbers_are_joined_as_given(tmp_path):
    arrays = [{"x": DRAW.standard_normal((2, 3, 4))} for _ in range(2)]
    paths = [save_npz(tmp_path / f"{i}.npz", part) for i, part in enumerate(arrays)]
    whole = save_npz(tmp_path / "whole.npz", {"x": np.concatenate([part["x"] for part in arrays])})
    assert not compare(open_source([whole]), open_source(paths), Limits(0, 1)).divergent
    assert compare(open_source([whole]), open_source(paths[::-1]), Limits(0, 1)).divergent


def test_ranks_that_do_not_fit_are_refused(tmp_path):
    for name, array in (("a", np.zeros((2, 3))), ("b", np.zeros((2, 4))), ("c", np.zeros((2, 3), np.float32))):
        save_npz(tmp_path / f"{name}.npz", {"x": array})
    save_npz(tmp_path / "d.npz", {"y": np.zeros((2, 3))})
    for other, text in (("b", "cannot be joined"), ("c", "not of the first rank's dtype")):
        source = open_source([tmp_path / "a.npz", tmp_path / f"{other}.npz"])
        with pytest.raises(CaptureFileError, match=text):
            compare(source, source, Limits())
    with pytest.raises(CaptureFileError, match="does not have the arrays of the first rank: x"):
        open_source([tmp_path / "a.npz", tmp_path / "d.npz"])


@pytest.mark.parametrize("layout,axes", [("T H D", (1, 0, 2)), ("H D T", (0, 2, 1)), ("D H T", (2, 0, 1))])
def test_layouts_are_compared_as_one(tmp_path, layout, axes):
    a = capture_kv_mock("a b c", layers=[1])
    path = save_capture(a, tmp_path / "a.npz")
    arrays = {name: np.ascontiguousarray(array.transpose(axes)) for name, array in a.arrays().items()}
    other = save_arrays(arrays, {"layout": layout}, tmp_path / "b.npz")
    assert not compare(open_source([path]), open_source([other]), Limits(0, 1)).divergent
    arrays = save_arrays(arrays, {"layout": "X"}, tmp_path / "c.npz")
    with pytest.raises(CaptureFileError, match=r"its layout must be of H T D, .*, got 'X'"):
        open_source([arrays])


def test_dtypes_are_compared_by_value(tmp_path):
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    rounded = values.bfloat16()
    wide = save_arrays({"layer_0_after_prefill_key": rounded.float().numpy()}, {}, tmp_path / "a.npz")
    bits = rounded.view(torch.uint16).numpy().view(BFLOAT16)
    narrow = save_arrays({"layer_0_after_prefill_key": bits}, {}, tmp_path / "b.safetensors")
    report = compare(open_source([wide]), open_source([narrow]), Limits(0, 1))
    assert not report.divergent and one(report)["dtype"] == ["float32", "bfloat16"]


def test_sglangs_dumps_are_compared_by_the_safe_loader(tmp_path):
    for side, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / side).mkdir()
        for index, layer in enumerate((2, 10)):
            tensor = torch.full((3, 4), value if layer == 10 else 1.0, dtype=torch.bfloat16)
            saved = {"value": tensor, "meta": {"rank": 0}} if side == "a" else tensor
            number = index + (side == "b")
            torch.save(
                saved,
                tmp_path / side / f"forward_pass_id=1___rank=0___name=k___layer_id={layer}___dump_index={number}.pt",
            )
    report = compare(open_source([tmp_path / "a"]), open_source([tmp_path / "b"]), Limits())
    assert [(key["key"].split("=")[-1], key["divergent"], key["max_abs_diff"]) for key in report.keys] == [
        ("2", False, 0.0),
        ("10", True, 0.5),
    ]


class Harmful:
    def __reduce__(self):
        return sys.exit, (3,)


@pytest.mark.parametrize("saved", [Harmful(), {"value": 3}, [torch.ones(2)]], ids=["code", "no tensor", "list"])
def test_dumps_that_are_none_are_refused_and_not_run(tmp_path, saved):
    torch.save(saved, tmp_path / "a.pt")
    source = open_source([tmp_path / "a.pt"])
    with pytest.raises(CaptureFileError, match=r"a\.pt: "):
        compare(source, source, Limits())


def test_pages_that_were_written_in_between_are_named(tmp_path):
    pools = {"keys": DRAW.integers(0, 256, (9, 100), dtype=np.uint8), "values": np.zeros((4, 64), np.uint8)}
    padded = np.zeros((9, 128), np.uint8)
    padded[:, :100] = pools["keys"]
    before = save_page_digests({**pools, "keys": padded[:, :100]}, tmp_path / "before.npz", step=1)
    pools["keys"][[2, 8], [0, 99]] ^= 1
    after = save_page_digests(pools, tmp_path / "after.npz")
    assert written_pages(open_source([before]), open_source([after])) == {"keys": [2, 8], "values": []}
    other = save_page_digests({"keys": pools["keys"]}, tmp_path / "other.npz")
    with pytest.raises(CaptureFileError, match="digests must be of the same pools"):
        written_pages(open_source([before]), open_source([other]))
    fewer = save_page_digests({**pools, "keys": pools["keys"][:3]}, tmp_path / "fewer.npz")
    with pytest.raises(CaptureFileError, match="keys must have as many pages in both"):
        written_pages(open_source([before]), open_source([fewer]))
    with pytest.raises(ValueError, match="pages must be"):
        page_digests(np.zeros((2, 3)))


def test_arrays_are_read_in_slabs(tmp_path, monkeypatch):
    """A capture much larger than what is held of it at a time: no slab has more elements than it may."""
    seen = []
    rows = measure.compare_rows
    monkeypatch.setattr(measure, "_SLAB_ELEMENTS", 1000)
    monkeypatch.setattr(measure, "compare_rows", lambda a, b: (seen.append(a.size), rows(a, b))[1])
    a, b = changed_capture(2)
    assert not compare_captures(tmp_path, a, b).divergent
    assert max(seen) <= 1000 and sum(seen) == sum(array.size for array in a.arrays().values())


def test_the_error_map_has_a_row_a_layer_and_few_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "_MAP_COLUMNS", 3)
    a, b = changed_capture(4)
    b.get(2).key[5, 5, 0] += 2
    panel = compare_captures(tmp_path, a, b).error_map["after_prefill key"]
    assert panel["layers"] == [0, 1, 2, 3] and panel["tokens"] == 6
    rows = panel["max_abs_diff"]
    assert [len(row) for row in rows] == [3] * 4 and rows[2][2] == pytest.approx(2, abs=0.01)
    assert sum(map(sum, rows)) == rows[2][2]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_were_cut_with_plans_are_one_capture(tmp_path, size):
    """Each array is a cache of one block, which the library's own plans divide by heads."""
    whole = capture_kv_mock("a b c d", layers=[0, 1])
    path = save_capture(whole, tmp_path / "whole.npz")
    layout = kvkernels.KVLayout("B H N D", B=1, H=32, N=4, D=128, dtype=torch.float16)
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(size)]
    for name, array in whole.arrays().items():
        source = kvkernels.KVCache(layout, torch.from_numpy(array.copy())[None])
        out = [torch.zeros(1, 32 // size, 4, 128, dtype=torch.float16) for _ in range(size)]
        shards = [kvkernels.KVCache(layout.shard(rank, size), tensor) for rank, tensor in enumerate(out)]
        kvkernels.convert_blocks(source, shards, torch.tensor([[0, 0]]))
        for part, tensor in zip(parts, out, strict=True):
            part[name] = tensor[0].numpy()
    paths = [
        save_arrays(part, {"tp_rank": rank, "tp_size": size}, tmp_path / f"{rank}.npz")
        for rank, part in enumerate(parts)
    ]
    assert not compare(open_source([path]), open_source(paths[::-1]), Limits(0, 1)).divergent


def test_a_rank_is_not_the_whole(tmp_path):
    whole = capture_kv_mock("a", layers=[0])
    path = save_capture(whole, tmp_path / "whole.npz")
    rank = save_capture(whole.rank(0, 2), tmp_path / "rank.npz")
    report = compare(open_source([path]), open_source([rank]), Limits())
    assert report.divergent and report.keys[0]["reason"] == "shapes (32, 1, 128) and (16, 1, 128)"
