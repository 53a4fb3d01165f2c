#!/usr/bin/env python3
"""A prefill engine with two tensor-parallel ranks hands a request to a decode engine with four, in another layout.

The prefill side is SGLang-shaped, K and V in tensors of their own; the decode side is vLLM-shaped with K and V side by
side. The cache has six heads, which four ranks share as 2, 2, 1 and 1. One call moves and reshards.
"""

from __future__ import annotations

import torch

from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 3, 24, 16, 6, 32
SIZES = {"L": LAYERS, "K": 2, "B": BLOCKS, "N": BLOCK_SIZE, "H": HEADS, "D": HEAD_SIZE, "dtype": torch.bfloat16}


def main() -> None:
    values = torch.randn(2, LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE).to(torch.bfloat16)
    sglang = KVLayout("K L | B N H D", **SIZES)
    prefill = []
    for layout in (sglang.shard(rank, 2) for rank in range(2)):
        mine = values[..., layout.first_head : layout.first_head + layout.H, :]
        tensors = [mine[k, layer].reshape(-1, layout.H, HEAD_SIZE).clone() for k in range(2) for layer in range(LAYERS)]
        prefill.append(KVCache(layout, tensors))

    vllm = KVLayout("L | B H N K D", **SIZES)
    decode = []
    for layout in (vllm.shard(rank, 4) for rank in range(4)):
        shape = (BLOCKS, layout.H, BLOCK_SIZE, 2 * HEAD_SIZE)
        decode.append(KVCache(layout, [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]))

    print(compile_plan([cache.layout for cache in prefill], [cache.layout for cache in decode]).explain())
    mapping = torch.tensor([[3, 20], [17, 4], [8, 11]])
    convert_blocks(prefill, decode, mapping)

    for cache in decode:
        heads = range(cache.layout.first_head, cache.layout.first_head + cache.layout.H)
        for layer, tensor in enumerate(cache.tensors):
            for i, head in enumerate(heads):
                for source, target in mapping.tolist():
                    k, v = tensor[target, i].split(HEAD_SIZE, dim=-1)
                    assert torch.equal(k, values[0, layer, source, :, head])
                    assert torch.equal(v, values[1, layer, source, :, head])
    print(f"{len(mapping)} blocks of two ranks became blocks of four: every value is there")


if __name__ == "__main__":
    main()
