#!/usr/bin/env python3
"""Tokens of a request leave vLLM's paged cache as LMCache's chunks, and come back to other slots.

A chunk is contiguous, ``[2, layers, 256, heads * head size]``; the last one of a request is shorter. On the way back
the engine has the first tokens already: they are skipped.
"""

from __future__ import annotations

import torch

from kvkernels import KVCache, KVLayout, copy_slots

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 4, 80, 16, 4, 32
CHUNK_TOKENS, TOKENS = 256, 600


def main() -> None:
    # An HND cache that vLLM shows token-first: the strides say head-first.
    tensors = [
        torch.randn(BLOCKS, 2, HEADS, BLOCK_SIZE, HEAD_SIZE).to(torch.float16).transpose(2, 3) for _ in range(LAYERS)
    ]
    layout = KVLayout(
        "L | B K H N D", L=LAYERS, K=2, B=BLOCKS, N=BLOCK_SIZE, H=HEADS, D=HEAD_SIZE, dtype=torch.float16
    )  # fmt: skip
    cache = KVCache(layout, tensors)
    blocks = torch.randperm(BLOCKS)
    tokens = torch.arange(TOKENS)
    slots = blocks[tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE

    lengths = [min(CHUNK_TOKENS, TOKENS - start) for start in range(0, TOKENS, CHUNK_TOKENS)]
    chunks = [torch.empty(2, LAYERS, length, HEADS * HEAD_SIZE, dtype=torch.float16) for length in lengths]
    copy_slots(cache, slots, chunks, direction="to_buffer")

    # Back, to the blocks at the other end, which hold nothing of the request.
    others = blocks.flip(0)
    targets = others[tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE
    before = [tensor.clone() for tensor in tensors]
    copy_slots(cache, targets, chunks, direction="to_cache", skip_first=32)

    for layer, tensor in enumerate(tensors):
        for kind in range(2):
            was = before[layer][blocks[tokens // BLOCK_SIZE], kind, tokens % BLOCK_SIZE]
            now = tensor[others[tokens // BLOCK_SIZE], kind, tokens % BLOCK_SIZE]
            untouched = before[layer][others[tokens // BLOCK_SIZE], kind, tokens % BLOCK_SIZE]
            assert torch.equal(now[32:], was[32:]) and torch.equal(now[:32], untouched[:32]), (layer, kind)
    print(f"{TOKENS} tokens went through {len(chunks)} chunks and came back, the first 32 left alone")


if __name__ == "__main__":
    main()
