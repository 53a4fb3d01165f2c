#!/usr/bin/env python3
"""Asks a model the same thing three times: computed, found on the device, and brought back from host memory.

    python generate.py MODEL --kv-transfer-config JSON

The JSON is what `vllm serve` takes under the same name.
"""

import argparse
import json
import time

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-transfer-config", type=json.loads, required=True, metavar="JSON")
    parser.add_argument("--prompt", default=" ".join(f"w{number}" for number in range(3, 403)))
    parser.add_argument("--max-tokens", type=int, default=8)
    arguments = parser.parse_args()

    llm = LLM(
        arguments.model,
        kv_transfer_config=KVTransferConfig(**arguments.kv_transfer_config),
        enable_prefix_caching=True,
        # The model as it is written; otherwise vLLM compiles it first, for a minute.
        enforce_eager=True,
        max_model_len=2048,
    )

    def ask(what: str, prompt: str, max_tokens: int) -> tuple[list[int], int]:
        start = time.perf_counter()
        [output] = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0), use_tqdm=False)
        print(
            f"{what}: {1e3 * (time.perf_counter() - start):.0f} ms, "
            f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens not computed: "
            f"{output.outputs[0].text}"
        )
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    ask("warming up", arguments.prompt[::-1], 1)
    ask("computed", arguments.prompt, arguments.max_tokens)
    on_device, _ = ask("found on the device", arguments.prompt, arguments.max_tokens)
    # vLLM submits a store in the step after the one that computed its blocks; this request brings that step.
    ask("something else", arguments.prompt[::-1], 1)
    if not llm.reset_prefix_cache():
        raise SystemExit("vLLM did not empty the device's prefix cache")
    from_host, cached = ask("brought back from the host", arguments.prompt, arguments.max_tokens)
    if not cached:
        raise SystemExit("nothing came back from the host")
    if from_host != on_device:
        raise SystemExit("the answer is not what it was when the KV cache was on the device")


if __name__ == "__main__":
    main()
