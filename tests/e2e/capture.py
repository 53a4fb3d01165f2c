"""What an engine holds against a plain forward of the same weights, by every way to a capture; and wrong readings."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

import kvkernels
from engine import Engine
from kvkernels.capture import (
    CachedLayer,
    CaptureResult,
    LayerCapture,
    Packing,
    capture_from_llm,
    load_capture,
    save_capture,
    save_page_digests,
)
from kvkernels.capture import vllm as engine_captures
from kvkernels_records.check import Limits, compare
from kvkernels_records.dtypes import as_float64, bits_of
from kvkernels_records.pages import written_pages
from kvkernels_records.sources import numpy_of, open_source
from roundtrip import random_prompt

NEW_TOKENS = 4
# The least cosine below layer 0 in bfloat16. A router takes another expert on a rounding error.
COSINE = {"qwen3-next": 0.98, "gpt-oss": 0.99}
KINDS = {
    "llama-fp32": {"full_attention"},
    "llama-bf16": {"full_attention"},
    "gemma3": {"full_attention", "sliding_window"},
    "gpt-oss": {"full_attention", "sliding_window"},
    "qwen3-next": {"full_attention", "state"},
    "deepseek": {"mla"},
}
Findings = list[str]


def reference(model: Path, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer, ``(heads, tokens, dim)``, by transformers; of a sliding window the last tokens alone."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        cache = network(torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) if getattr(layer, "keys", None) is not None else None
            for layer in cache.layers]  # fmt: skip


def compare_with_forward(model: Path, result: CaptureResult) -> Findings:
    """Every layer's K and V against the forward of the prompt and of what was generated."""
    ids = result.metadata["prompt_token_ids"] + result.metadata["generated_token_ids"][:-1]
    cached = reference(model, ids)
    least = COSINE.get(model.name, 0.999)
    findings = []
    for one in result:
        if one.key is not None:
            for name, got, wanted in zip("KV", (one.key, one.value), cached[one.layer_index], strict=True):
                if problem := difference(one, got, wanted, len(ids), least):
                    findings.append(f"forward: layer {one.layer_index} {one.capture_point} {name}: {problem}")
    return findings


def difference(one: LayerCapture, got: np.ndarray, wanted: torch.Tensor, tokens: int, least: float) -> str:
    """What is too far apart, or nothing: layer 0 an ulp, those below it 1e-4 in float32 and by cosine in bfloat16."""
    missing = tokens - wanted.shape[1]  # that transformers did not keep
    first = max(missing, one.first_token)
    mine = as_float64(got)[:, first - one.first_token :]
    theirs = wanted.double().numpy()[:, first - missing : one.first_token + got.shape[1] - missing]
    if mine.shape != theirs.shape or not mine.size:
        return f"{mine.shape} instead of {theirs.shape}"
    largest = float(np.abs(mine - theirs).max())
    # An ulp of the largest value: rotary embeddings are rounded once here and once there.
    ulp = 2.0 ** np.floor(np.log2(np.abs(theirs).max())) * torch.finfo(wanted.dtype).eps
    if one.layer_index == 0:
        return f"{largest} apart, more than an ulp of {ulp}" if largest > ulp else ""
    if wanted.dtype == torch.float32:
        return f"{largest} apart" if largest > 1e-4 else ""
    cosine = float((mine * theirs).sum() / np.sqrt((mine**2).sum() * (theirs**2).sum()))
    return f"cosine {cosine}" if cosine < least else ""


def same(one: CaptureResult, other: CaptureResult, what: str) -> Findings:
    """Bit for bit what both have."""
    mine, theirs = one.arrays(), other.arrays()
    findings = [f"{what}: {name} is missing" for name in mine.keys() ^ theirs.keys()]
    return findings + [
        f"{what}: {name} differs" for name in mine.keys() & theirs.keys()
        if bits_of(mine[name]).tobytes() != bits_of(theirs[name]).tobytes()
    ]  # fmt: skip


def wrong_readings(engine: Engine, model: Path, ids: list[int]) -> Findings:
    """The last block's neighbour, and K as if it were not packed: each must be far from the forward in every layer."""
    findings = []

    def next_block(layer: CachedLayer) -> None:
        read = layer.capture

        def capture(point: str, table: Any, tokens: int) -> LayerCapture:
            last = -(-tokens // layer.block_tokens) - 1
            return read(point, [*table[:last], table[last] + 1], tokens)

        layer.capture = capture

    def unpacked(layer: CachedLayer) -> None:
        heads, tokens, dim = layer.packing.key.shape
        page = torch.arange(2 * heads * tokens * dim).reshape(heads, 2, tokens, dim)
        layer.packing = Packing(page[:, 0], page[:, 1])

    find = engine_captures.vllm_layers
    wrong: dict[str, Callable[[CachedLayer], None]] = {"next_block": next_block, "unpacked": unpacked}
    for name, spoil in wrong.items():

        def spoilt(*arguments: Any, spoil: Callable[[CachedLayer], None] = spoil) -> list[CachedLayer]:
            layers = find(*arguments)
            for layer in layers:
                if layer.packing is not None:
                    spoil(layer)
            return layers

        engine_captures.vllm_layers = spoilt
        result = capture_from_llm(engine.llm, ids, max_tokens=NEW_TOKENS)
        engine_captures.vllm_layers = find
        compared = [one for one in result if one.key is not None]
        wrong_layers = {finding.split()[2] for finding in compare_with_forward(model, result)}
        if len(wrong_layers) != len(compared):
            findings.append(f"controls: {name} was found in the layers {sorted(wrong_layers)} of {len(compared)} alone")
    return findings


def ranks(result: CaptureResult, folder: Path) -> Findings:
    """Cut by the library's own op into the ranks that the heads allow, saved, and read back as one."""
    whole = save_capture(result, folder / "whole")
    heads = min(one.key.shape[0] for one in result if one.key is not None)
    findings = []
    for size in (2, 4):
        if heads % size:
            continue
        parts: list[list[LayerCapture]] = [[] for _ in range(size)]
        for one in result:
            cut = [cut_heads(array, size) for array in (one.key, one.value)]
            for rank, (key, value) in enumerate(zip(*cut, strict=True)):
                parts[rank].append(LayerCapture(one.layer_index, one.capture_point, key, value, one.kind, one.parts))
        paths = [
            save_capture(CaptureResult(part, {"tp_rank": rank, "tp_size": size}), folder / f"{size}-{rank}")
            for rank, part in enumerate(parts)
        ]
        if compare(open_source([whole]), open_source(paths[::-1]), Limits(0, 1)).divergent:
            findings.append(f"ranks: {size} of them are not the whole")
        if not compare(open_source([whole]), open_source(paths[:1]), Limits(0, 1)).divergent:
            findings.append(f"ranks: one of {size} passes for the whole")
    return findings


def cut_heads(array: np.ndarray | None, size: int) -> list[np.ndarray | None]:
    if array is None:
        return [None] * size
    whole = torch.from_numpy(np.ascontiguousarray(bits_of(array)))
    out = [torch.empty(len(whole) // size, *whole.shape[1:], dtype=whole.dtype) for _ in range(size)]
    kvkernels.split_tp_shards(whole, 0, out)
    return [numpy_of(part).view(array.dtype) for part in out]


def by_request(engine: Engine, ids: list[int], expected: CaptureResult, folder: Path) -> Findings:
    """The connector's hook: the answer says where, and the next step writes it."""

    def ask(**wanted: Any) -> dict[str, Any]:
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True,
            extra_args={"kv_transfer_params": {"kvkernels_capture": wanted}},
        )  # fmt: skip
        (output,) = engine.llm.generate([TokensPrompt(prompt_token_ids=ids)], [sampling], use_tqdm=False)
        return (output.kv_transfer_params or {}).get("kvkernels_capture", {})

    findings = []
    engine.forget(host_too=True)  # computed as at first, to the last bit
    # A sliding window has given up blocks by the time that a request ends: two points are two requests' captures.
    said = ask(points=["during_decode"])
    if "path" not in said or not Path(said["path"]).parent.samefile(folder):
        return [f"request: the answer says {said}"]
    until = time.monotonic() + 30
    while not Path(said["path"]).exists() and time.monotonic() < until:
        engine.finish_stores()
    found = load_capture(said["path"])
    wanted = CaptureResult([one for one in expected if one.capture_point == "during_decode"])
    findings += same(found, wanted, "request")
    if found.metadata["id"] != said["id"]:
        findings.append("request: the file is another request's")
    for wrong, text in (
        ({"points": ["soon"]}, "capture_points must be of"),
        ({"points": "after_prefill"}, "points must be a list of str"),
        ({"layers": [-1]}, "layers must be from 0 on"),
    ):
        if text not in ask(**wrong).get("error", ""):
            findings.append(f"request: {wrong} was not refused")
    return findings


def transferred(engine: Engine, ids: list[int], expected: CaptureResult) -> Findings:
    """Tokens that come back from the host, when they are there: those that were computed, bit for bit."""
    findings = []
    engine.forget(host_too=True)
    try:
        capture_from_llm(engine.llm, ids, capture_points=["after_transfer"])
        findings.append("transfer: after_transfer of nothing was not refused")
    except ValueError as refusal:
        print(refusal)
    engine.finish_stores()
    engine.forget()
    result = capture_from_llm(engine.llm, ids, capture_points=["after_transfer"])
    for one in result:
        whole = expected.get(one.layer_index, "after_prefill")
        if one.key is None or one.key.shape[1] != engine.loadable_tokens(len(ids)) - one.first_token:
            findings.append(f"transfer: layer {one.layer_index} has {None if one.key is None else one.key.shape}")
            continue
        start = one.first_token - whole.first_token
        for got, wanted in ((one.key, whole.key), (one.value, whole.value)):
            cut = wanted[:, start : start + got.shape[1]]
            if bits_of(got).tobytes() != bits_of(np.ascontiguousarray(cut)).tobytes():
                findings.append(f"transfer: layer {one.layer_index} is not what was stored")
    return findings


def pages_written(engine: Engine, folder: Path) -> Findings:
    """Two passes over the pool say which of its pages a request wrote: those of its blocks."""
    pools = {f"pool_{i}": pages.view(torch.uint8).numpy() for i, pages in enumerate(engine.device)}
    before = save_page_digests(pools, folder / "before.npz")
    blocks: set[int] = set()
    update = engine.scheduler.update_from_output

    def look(*arguments: Any) -> Any:
        for request in engine.scheduler.running:
            for table in engine.scheduler.kv_cache_manager.get_block_ids(request.request_id):
                blocks.update(block for block in table if block)
        return update(*arguments)

    engine.scheduler.update_from_output = look
    engine.generate([random_prompt(engine, 100, seed=77)], [1])
    engine.scheduler.update_from_output = update
    after = save_page_digests(pools, folder / "after.npz")
    written = {page for pages in written_pages(open_source([before]), open_source([after])).values() for page in pages}
    if not written or not written <= blocks | {0}:
        return [f"pages: {sorted(written)} were written, the request had {sorted(blocks)}"]
    return []


def run(model: Path) -> dict[str, Any]:
    """The findings of one engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        engine = Engine(model, "KVKernelsConnector", extra={"capture_dir": str(folder)})
        ids = random_prompt(engine, 150, seed=5)
        points = ("after_prefill", "during_decode")
        started = time.perf_counter()
        result = capture_from_llm(engine.llm, ids, capture_points=points, max_tokens=NEW_TOKENS)
        print(f"{len(result.layers)} captures in {time.perf_counter() - started:.3f} s with the prompt")
        kinds = sorted({one.kind for one in result})
        findings = compare_with_forward(model, result)
        findings += same(load_capture(save_capture(result, folder / "saved")), result, "file")
        findings += wrong_readings(engine, model, ids)
        if kinds == ["full_attention"]:
            findings += ranks(result, folder)
            findings += transferred(engine, ids, result)
        findings += by_request(engine, ids, result, folder)
        findings += pages_written(engine, folder)
        if set(kinds) != KINDS.get(model.name, set(kinds)):
            findings.append(f"kinds: {kinds}")
    return {"findings": findings, "kinds": kinds}
