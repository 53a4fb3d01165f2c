#!/usr/bin/env python3
"""Blocks of vLLM's paged cache become pages of SGLang's, whose pages are four times as large.

vLLM keeps a tensor a layer, K before V, blocks of 16 tokens; SGLang keeps K and V of each layer in tensors of their own
that count tokens, here in pages of 64. Both layouts are named, and the copy converts.
"""

from __future__ import annotations

import torch

from kvkernels import KVCache, KVLayout, convert_blocks

LAYERS, HEADS, HEAD_SIZE = 4, 8, 64
SIZES = {"L": LAYERS, "K": 2, "H": HEADS, "D": HEAD_SIZE, "dtype": torch.bfloat16}
TOKENS = 200


def main() -> None:
    # As vLLM allocates them: [2, blocks, 16, heads, head size] a layer.
    vllm_tensors = [torch.randn(2, 32, 16, HEADS, HEAD_SIZE).to(torch.bfloat16) for _ in range(LAYERS)]
    vllm = KVCache(KVLayout("L | K B N H D", B=32, N=16, **SIZES), vllm_tensors)

    # As SGLang allocates them: [slots, heads, head size], all K first, then all V.
    sglang_tensors = [torch.zeros(8 * 64, HEADS, HEAD_SIZE, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    sglang = KVCache(KVLayout("K L | B N H D", B=8, N=64, **SIZES), sglang_tensors)

    # A request of 200 tokens: its blocks in vLLM, its pages in SGLang. Where block sizes differ, ids count the smaller.
    blocks = torch.tensor([7, 3, 30, 12, 5, 9, 21, 2, 17, 28, 11, 0, 6])
    pages = torch.tensor([6, 1, 4, 3])
    units = (pages[:, None] * 4 + torch.arange(4)).flatten()[: len(blocks)]
    convert_blocks(vllm, sglang, torch.stack((blocks, units), dim=1))

    for layer in range(LAYERS):
        for token in range(TOKENS):
            block, page = blocks[token // 16], pages[token // 64]
            for kind in range(2):
                source = vllm_tensors[layer][kind, block, token % 16]
                target = sglang_tensors[kind * LAYERS + layer][page * 64 + token % 64]
                assert torch.equal(source, target), (layer, token, kind)
    print(
        f"{len(blocks)} blocks of 16 tokens became {len(pages)} pages of 64, in {LAYERS} layers: every value is there"
    )


if __name__ == "__main__":
    main()
