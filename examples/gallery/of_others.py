"""TensorRT-LLM, LMCache and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from entries import (
    BF16,
    F8,
    F16,
    F32,
    GQA,
    I8,
    LATENT,
    PAGE,
    PAGES,
    U8,
    D,
    Entry,
    H,
    N,
    each,
    entry,
    flat,
    one,
    several,
)

from kvkernels import KVLayout
from kvkernels.layout import parts


def tensorrt_llm() -> Iterator[Entry]:
    yield entry(
        "A pool of all layers with as many heads; a window's pool is shorter",
        "`[B, L, 2, H N D]`",
        partial(KVLayout, "B L K H N D", **PAGES),
        one("B", "L", 2, H * PAGE * D),
    )
    yield entry(
        "MLA: K alone", "`[B, L, 1, N 576]`", partial(KVLayout, "B L N D", **LATENT), one("B", "L", 1, PAGE * 576)
    )
    fp4 = dict(N=PAGE, H=H, K=2)
    yield entry(
        "NVFP4, and the pool of its scales",
        "`[B, L, 2, H N 64]` and `[B, L, 2, H N 8]`",
        lambda B, L: KVLayout(
            "B L K H N D",
            B=B,
            L=L,
            D=D // 2,
            dtype=U8,
            **fp4,
            scales=KVLayout("B L K H N D", B=B, L=L, D=D // 16, dtype=F8, **fp4),
        ),
        several(one("B", "L", 2, H * PAGE * 64, dtype=U8), one("B", "L", 2, H * PAGE * 8, dtype=F8)),
    )
    yield entry(
        "Recurrent states: layers outermost",
        "`[L, B, 1, bytes]`",
        partial(KVLayout, "L B", opaque=True, page_bytes=66048),
        one("L", "B", 1, 66048, dtype=U8),
    )


def lmcache() -> Iterator[Entry]:
    chunk = partial(KVLayout, **{**GQA, "N": 256})
    yield entry(
        "KV_2LTD: a chunk of all layers",
        "`[2, L, T, H D]` a chunk",
        partial(chunk, "B K L N H D"),
        one("B", 2, "L", 256, H * D),
    )
    yield entry(
        "KV_T2D: a layer's chunk, token-first",
        "`[T, 2, H D]` a layer and chunk",
        partial(chunk, "L | B N K H D"),
        each(256, 2, H * D),
    )
    yield entry(
        "KV_2TD: a layer's chunk",
        "`[2, T, H D]` a layer and chunk",
        partial(chunk, "L | B K N H D"),
        each(2, 256, H * D),
    )
    yield entry(
        "KV_MLA_FMT",
        "`[1, L, T, 576]` a chunk",
        partial(KVLayout, "B L N D", N=256, D=576, dtype=BF16),
        one("B", "L", 256, 576),
    )
    layer = partial(KVLayout, **GQA)
    yield entry(
        "NL_X_TWO_NB_BS_NH_HS: FlashAttention of older vLLM",
        "`[2, B, N, H, D]` a layer",
        partial(layer, "L | K B N H D"),
        lambda b, n: [torch.zeros(2, b, N, H, D, dtype=BF16) for _ in range(n)],
    )
    yield entry(
        "NL_X_TWO_NB_NH_BS_HS, and vLLM-RBLN's with a 1 in it",
        "`[2, B, H, N, D]` a layer",
        partial(layer, "L | K B H N D"),
        lambda b, n: [torch.zeros(2, b, H, 1, N, D, dtype=BF16) for _ in range(n)],
    )
    yield entry(
        "NL_X_NB_TWO_BS_NH_HS: FlashInfer of older vLLM",
        "`[B, 2, N, H, D]` a layer",
        partial(layer, "L | B K N H D"),
        each(2, N, H, D),
    )
    yield entry(
        "NL_X_NB_TWO_NH_BS_HS: the same, HND",
        "`[B, 2, H, N, D]` a layer",
        partial(layer, "L | B K H N D"),
        each(2, H, N, D),
    )
    yield entry(
        "NB_NL_TWO_BS_NH_HS: vLLM's layers in one tensor",
        "`[B, L, 2, N, H, D]`",
        partial(layer, "B L K N H D"),
        one("B", "L", 2, N, H, D),
    )
    yield entry(
        "NL_X_TWO_X_NB_BS_NH_HS: vLLM-Ascend",
        "a tuple of `[B, N, H, D]` a layer",
        partial(layer, "L K | B N H D"),
        lambda b, n: [torch.zeros(b, N, H, D, dtype=BF16) for _ in range(2 * n)],
    )
    yield entry(
        "NL_X_NB_BS_NH_CS, and NL_X_NB_BS_NH_TWO_HS before it: vLLM, token-first",
        "`[B, N, H, 2 D]` a layer",
        partial(layer, "L | B N H K D"),
        each(N, H, 2 * D),
    )
    yield entry(
        "NL_X_NB_NH_BS_CS, and NL_X_NB_NH_BS_TWO_HS before it: vLLM, head-first",
        "`[B, H, N, 2 D]` a layer",
        partial(layer, "L | B H N K D"),
        each(H, N, 2 * D),
    )
    yield entry(
        "NB_NL_TWO_NH_BS_HS: TensorRT-LLM",
        "`[B, L, 2, H, N, D]`",
        partial(layer, "B L K H N D"),
        one("B", "L", 2, H, N, D),
    )
    yield entry(
        "TWO_X_NL_X_NBBS_NH_HS, and TWO_X_NL_X_NB_BS_NH_HS: SGLang",
        "`[B N, H, D]`, all layers' K, then all layers' V",
        partial(layer, "K L | B N H D"),
        lambda b, n: [torch.zeros(b * N, H, D, dtype=BF16) for _ in range(2 * n)],
    )
    yield entry(
        "NL_X_NB_BS_NH_HS: SGLang's unified memory, a component each",
        "`[B, N, H, D]` of K and of V a layer, their tokens apart",
        lambda B, L: KVLayout("L K | B N H D", B=B, L=L, **GQA, steps={"N": 2 * L * H * D * 2}),
        lambda b, n: list(torch.zeros(b, N, 2 * n, H, D, dtype=BF16).unbind(2)),
    )
    yield entry(
        "NL_X_NB_BS_HS, and NL_X_NBBS_ONE_HS with a 1 in it: MLA",
        "`[B, N, 576]` a layer",
        partial(KVLayout, "L | B N D", **LATENT),
        each(PAGE, 576),
    )
    keys = dict(N=PAGE, row_bytes=PAGE * 132)
    yield entry(
        "NL_X_NB_BSV_BSS: an indexer's keys, then its scales",
        "`[B, N, 132]` of bytes a layer",
        lambda B, L: parts(
            keys=KVLayout("L | B N D", B=B, L=L, D=128, dtype=F8, **keys),
            scales=KVLayout("L | B N", B=B, L=L, dtype=F32, offset_bytes=PAGE * 128, **keys),
        ),
        flat(PAGE * 132),
    )
    planes = dict(N=PAGE, dtype=BF16)
    yield entry(
        "NL_X_NP_X_NB_BS_ONE_HS: Ascend's planes of latent, rope and index keys",
        "a tuple of `[B, N, 1, 512]`, `[B, N, 1, 64]` and `[B, N, 1, 128]` a layer, here all layers' latents first",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=512, **planes),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, **planes),
            keys=KVLayout("L | B N D", B=B, L=L, D=128, **planes),
        ),
        several(each(PAGE, 1, 512), each(PAGE, 1, 64), each(PAGE, 1, 128)),
    )


def llama_cpp() -> Iterator[Entry]:
    # A block is a stream: a sequence's cells.
    cells = dict(N=512, H=H, D=D, dtype=F16)
    yield entry(
        "With flash attention: K and V cell by cell",
        "`[streams, cells, H D]` of K and of V a layer",
        partial(KVLayout, "L K | B N H D", K=2, **cells),
        lambda b, n: [torch.zeros(b, 512, H * D, dtype=F16) for _ in range(2 * n)],
    )
    yield entry(
        "Without: V is transposed",
        "`[streams, cells, H D]` of K and `[streams, H D, cells]` of V, all layers' K first",
        partial(parts, k="L | B N H D", v="L | B H D N", **cells),
        lambda b, n: [
            *(torch.zeros(b, 512, H * D, dtype=F16) for _ in range(n)),
            *(torch.zeros(b, H * D, 512, dtype=F16) for _ in range(n)),
        ],
    )
    q8 = dict(N=512, H=H)
    blocks = D // 32
    yield entry(
        "q8_0: a scale, then 32 values",
        "`[streams, cells, H 136]` bytes of K a layer",
        lambda B, L: parts(
            scales=KVLayout("L | B N H D", B=B, L=L, D=blocks, dtype=F16, steps={"D": 34}, **q8),
            kv=KVLayout("L | B N H D/32 D%32", B=B, L=L, D=D, dtype=I8, steps={"D/32": 34}, offset_bytes=2, **q8),
        ),
        each(512, H * blocks * 34, dtype=U8),
    )
