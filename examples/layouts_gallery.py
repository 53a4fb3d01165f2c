#!/usr/bin/env python3
"""What engines register, as layouts: prints docs/layouts_gallery.md.

Each entry has the layout, and the tensors that the engine allocates, for any number of blocks and layers: the page
shows the layout at a model's size, and the tests hand small tensors of the engine's shape to ``KVCache``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvkernels import KVCache, KVLayout
from kvkernels.layout import parts

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
F8, I8, U8 = torch.float8_e4m3fn, torch.int8, torch.uint8

# An attention layer of 8 heads of 128, blocks of 16 tokens; SGLang's, TensorRT-LLM's and MLA's pages have 64.
N, H, D, PAGE = 16, 8, 128, 64
GQA = {"K": 2, "N": N, "H": H, "D": D, "dtype": BF16}
PAGES = {**GQA, "N": PAGE}
LATENT = {"N": PAGE, "D": 576, "dtype": BF16}


@dataclass(frozen=True)
class Entry:
    """One cache: who registers it, as what, its layout, and the engine's tensors, all layers' where one has them."""

    title: str
    registered: str
    layout: Callable[[int, int], KVLayout]
    tensors: Callable[[int, int], list[Tensor]]


def _entry(
    title: str, registered: str, layout: Callable[..., KVLayout], tensors: Callable[[int, int], list[Tensor]]
) -> Entry:
    """``layout`` takes B and L by name."""
    return Entry(title, registered, lambda b, n: layout(B=b, L=n), tensors)


def _each(*shape: int, dtype: torch.dtype = BF16, like: str = "") -> Callable[[int, int], list[Tensor]]:
    """A tensor a layer, its blocks first; ``like`` is the order in which the engine shows the dimensions."""

    def make(b: int, n: int) -> list[Tensor]:
        tensors = [torch.zeros(b, *shape, dtype=dtype) for _ in range(n)]
        return [tensor.permute([int(i) for i in like]) for tensor in tensors] if like else tensors

    return make


def _one(*letters: int | str, dtype: torch.dtype = BF16) -> Callable[[int, int], list[Tensor]]:
    """One tensor, with ``"B"`` and ``"L"`` where blocks and layers are counted."""
    return lambda b, n: [torch.zeros([{"B": b, "L": n}.get(x, x) for x in letters], dtype=dtype)]  # type: ignore[misc]


def _flat(page_bytes: int) -> Callable[[int, int], list[Tensor]]:
    """Bytes a layer, where the shape that is shown cuts through the parts."""
    return lambda b, n: [torch.zeros(b * page_bytes, dtype=U8) for _ in range(n)]


def _several(*makers: Callable[[int, int], list[Tensor]]) -> Callable[[int, int], list[Tensor]]:
    return lambda b, n: [tensor for make in makers for tensor in make(b, n)]


def _in_one_row(order: str, row: int, heads: int = H) -> Callable[[int, int], list[Tensor]]:
    """All layers' ``[B, H, N, row]`` in one memory, in one of vLLM's orders that have blocks or heads outermost."""
    return lambda b, n: [torch.zeros([{"L": n, "B": b, "H": heads, "N": N, "C": row}[x] for x in order], dtype=BF16)]


def vllm() -> Iterator[Entry]:
    layer = partial(KVLayout, **GQA)
    views = "a view `[B, H, N, 2 D]` a layer"
    yield _entry(
        "LBNHC: FlashAttention, FlashInfer, Triton, FlexAttention, the usual order",
        f"{views}, tokens outermost",
        partial(layer, "L | B N H K D"),
        _each(N, H, 2 * D, like="0213"),
    )
    yield _entry(
        "LBHNC: FlashInfer on Blackwell, B12X, Mooncake", views, partial(layer, "L | B H N K D"), _each(H, N, 2 * D)
    )
    yield _entry(
        "LHBNC: a head's blocks together",
        f"{views}, heads outside blocks",
        partial(layer, "L | H B N K D"),
        lambda b, n: [torch.zeros(H, b, N, 2 * D, dtype=BF16).transpose(0, 1) for _ in range(n)],
    )
    yield _entry(
        "BLHNC: all layers in a block",
        f"{views} of one memory",
        partial(layer, "B L H N K D"),
        _in_one_row("BLHNC", 2 * D),
    )
    yield _entry(
        "BLNHC: the same, token-first",
        f"{views} of one memory",
        partial(layer, "B L N H K D"),
        _in_one_row("BLNHC", 2 * D),
    )
    yield _entry(
        "BHLNC: layers inside heads",
        f"{views} of one memory",
        partial(layer, "B H L N K D"),
        _in_one_row("BHLNC", 2 * D),
    )
    yield _entry(
        "The CPU's attention",
        f"{views}, of which it takes a head as K's N rows and then V's",
        partial(layer, "L | B H K N D"),
        _each(H, 2 * N, D),
    )
    yield _entry(
        "FlashAttention for K and V of other sizes (MiMo: 192 and 128)",
        "a view `[B, H, N, 320]` a layer",
        partial(layer, "L | B N H K D", **{"D": 192, "D_v": 128}),
        _each(N, H, 320, like="0213"),
    )
    yield _entry(
        "B12X: planes of K and V",
        "a view `[B, 2, N, H D]` a layer",
        partial(layer, "L | B K N H D"),
        _each(2, N, H * D),
    )
    plane = dict(N=N, H=H, D=D, dtype=BF16)
    yield _entry(
        "ROCm's paged attention: K's heads cut into pieces of 16 bytes, V by elements",
        "a view `[B, 2, N, H D]` a layer, the two planes outside the blocks",
        lambda B, L: parts(
            k=KVLayout("L | B H D/8 N D%8", B=B, L=L, **plane),
            v=KVLayout("L | B H D N", B=B, L=L, **plane, offset_bytes=B * N * H * D * 2),
        ),
        lambda b, n: [torch.zeros(2 * b * N * H * D, dtype=BF16) for _ in range(n)],
    )
    cell = dict(N=N, H=H, steps={"N": 2 * (D + 4)})
    yield _entry(
        "Triton with a scale a token and head (fp8, int8)",
        "a view `[B, H, N, 264]` a layer: K, its scale, V, its scale",
        lambda B, L: parts(
            k=KVLayout("L | B H N D", B=B, L=L, D=D, dtype=F8, **cell),
            k_scales=KVLayout("L | B H N", B=B, L=L, dtype=F32, offset_bytes=D, **cell),
            v=KVLayout("L | B H N D", B=B, L=L, D=D, dtype=F8, offset_bytes=D + 4, **cell),
            v_scales=KVLayout("L | B H N", B=B, L=L, dtype=F32, offset_bytes=2 * D + 4, **cell),
        ),
        _each(H, N, 2 * (D + 4), dtype=U8),
    )
    data, scale = N * H * D // 2, N * H * D // 16
    row = {"row_bytes": 2 * (data + scale), "N": N, "H": H}
    yield _entry(
        "FlashInfer with NVFP4: K's data, K's scales, V's data, V's scales",
        "a view `[B, 2 H, N, 72]` a layer",
        lambda B, L: parts(
            k=KVLayout("L | B H N D", B=B, L=L, D=D // 2, dtype=U8, **row),
            k_scales=KVLayout("L | B H N D", B=B, L=L, D=D // 16, dtype=F8, offset_bytes=data, **row),
            v=KVLayout("L | B H N D", B=B, L=L, D=D // 2, dtype=U8, offset_bytes=data + scale, **row),
            v_scales=KVLayout("L | B H N D", B=B, L=L, D=D // 16, dtype=F8, offset_bytes=2 * data + scale, **row),
        ),
        _flat(2 * H * N * (D // 2 + D // 16)),
    )
    yield _entry(
        "TurboQuant, UltraQuant: K and V of a head and token in one slot",
        "a view `[B, H, N, 136]` a layer, say",
        partial(KVLayout, "L | B N H D", N=N, H=H, D=136, dtype=U8),
        _each(N, H, 136, dtype=U8, like="0213"),
    )


def vllm_latent() -> Iterator[Entry]:
    yield _entry(
        "MLA (DeepSeek V2, V3, Kimi)",
        "a view `[B, 1, N, 576]` a layer",
        partial(KVLayout, "L | B N D", **LATENT),
        _each(1, PAGE, 576),
    )
    packed = dict(N=PAGE, steps={"N": 656})
    yield _entry(
        "fp8_ds_mla (DeepSeek V3.2): 512 values, 4 scales, 64 values of rope",
        "a view `[B, 1, N, 656]` of bytes a layer",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=512, dtype=F8, **packed),
            scales=KVLayout("L | B N D", B=B, L=L, D=4, dtype=F32, offset_bytes=512, **packed),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, dtype=BF16, offset_bytes=528, **packed),
        ),
        _each(1, PAGE, 656, dtype=U8),
    )
    packed4 = dict(N=PAGE, steps={"N": 352})
    yield _entry(
        "nvfp4_ds_mla: 512 values in 256 bytes, 64 of rope, 32 scales, permuted",
        "a view `[B, 1, N, 352]` of bytes a layer",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=256, dtype=U8, **packed4),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, dtype=F8, offset_bytes=256, **packed4),
            scales=KVLayout("L | B N D", B=B, L=L, D=32, dtype=F8, offset_bytes=320, **packed4),
        ),
        _each(1, PAGE, 352, dtype=U8),
    )
    keys = dict(N=PAGE, row_bytes=PAGE * 132)
    yield _entry(
        "The indexer beside it: all keys of a block, then all scales",
        "a view `[B, 1, N, 132]` of bytes a layer",
        lambda B, L: parts(
            keys=KVLayout("L | B N D", B=B, L=L, D=128, dtype=F8, **keys),
            scales=KVLayout("L | B N", B=B, L=L, dtype=F32, offset_bytes=PAGE * 128, **keys),
        ),
        _flat(PAGE * 132),
    )
    rows = dict(N=PAGE, row_bytes=37440)
    yield _entry(
        "DeepSeek V4: 448 values and 64 of rope a row, then all scales; pages of whole rows of 576 bytes",
        "a view `[B, 1, N, 584]` of bytes a layer, padded",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=448, dtype=F8, steps={"N": 576}, **rows),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, dtype=BF16, offset_bytes=448, steps={"N": 576}, **rows),
            scales=KVLayout("L | B N D", B=B, L=L, D=8, dtype=U8, offset_bytes=PAGE * 576, **rows),
        ),
        _flat(37440),
    )
    yield _entry(
        "MLA, dealt out among 8 decode context ranks: rank 3's",
        "a view `[B, 1, N, 576]` a layer",
        partial(KVLayout, "L | B N D", deal=(3, 8, 1), **LATENT),
        _each(1, PAGE, 576),
    )
    yield _entry(
        "Ascend's MLA: latent and rope in tensors of their own",
        "a tuple of `[B, N, 1, 512]` and `[B, N, 1, 64]` a layer",
        partial(KVLayout, "L K | B N D", **{**LATENT, "K": 2, "D": 512, "D_v": 64}),
        lambda b, n: [torch.zeros(b, PAGE, 1, d, dtype=BF16) for _ in range(n) for d in (512, 64)],
    )


def vllm_states() -> Iterator[Entry]:
    # Mamba2 of 8192 channels, 8 groups of 128, 128 heads of 64; width 4. A rank's eighth.
    x, b_c, heads, size, state = 1024, 128, 16, 64, 128
    row, conv = x + 2 * b_c, 3 * (x + 2 * b_c) * 2
    page = conv + heads * size * state * 4
    in_row = dict(W=3, dtype=BF16, steps={"W": row * 2}, row_bytes=page)
    yield _entry(
        "Mamba2: conv state [w, x | B | C] and heads in one page, rank 1 of 8",
        "a page of bytes a layer",
        lambda B, L: parts(
            x=KVLayout("L | B W D", B=B, L=L, D=x, first_d=x, total_d=8 * x, **in_row),
            b=KVLayout("L | B W D", B=B, L=L, D=b_c, first_d=b_c, total_d=8 * b_c, offset_bytes=2 * x, **in_row),
            c=KVLayout(
                "L | B W D", B=B, L=L, D=b_c, first_d=b_c, total_d=8 * b_c, offset_bytes=2 * (x + b_c), **in_row
            ),
            ssm=KVLayout(
                "L | B H D",
                B=B,
                L=L,
                H=heads,
                D=size * state,
                dtype=F32,
                first_head=heads,
                total_heads=8 * heads,
                offset_bytes=conv,
                row_bytes=page,
            ),
        ),
        _flat(page),
    )
    q, v = 128 * 2, 128 * 4
    gdn, gdn_page = 2 * q + v, (2 * q + v) * 3 * 2 + 4 * 128 * 128 * 4
    rows = dict(W=3, dtype=BF16, row_bytes=gdn_page)
    yield _entry(
        "Gated DeltaNet (Qwen3-Next), its conv state dimension first: q, k and v, rank 0 of 8",
        "a page of bytes a layer",
        lambda B, L: parts(
            q=KVLayout("L | B D W", B=B, L=L, D=q, total_d=8 * q, **rows),
            k=KVLayout("L | B D W", B=B, L=L, D=q, total_d=8 * q, offset_bytes=q * 6, **rows),
            v=KVLayout("L | B D W", B=B, L=L, D=v, total_d=8 * v, offset_bytes=2 * q * 6, **rows),
            state=KVLayout(
                "L | B H D",
                B=B,
                L=L,
                H=4,
                total_heads=32,
                D=128 * 128,
                dtype=F32,
                offset_bytes=gdn * 6,
                row_bytes=gdn_page,
            ),
        ),
        _flat(gdn_page),
    )
    yield _entry(
        "A state that nobody says the inside of",
        "a page of bytes a layer",
        partial(KVLayout, "L | B", opaque=True, page_bytes=66048),
        _each(66048, dtype=I8),
    )


def sglang() -> Iterator[Entry]:
    layer = partial(KVLayout, **PAGES)
    yield _entry(
        "NHD, a layer's K and V in one allocation",
        "`[slots, H, D]` of K and of V a layer, halves of `[2, slots, H, D]`",
        partial(layer, "L | K B N H D"),
        lambda b, n: [torch.zeros(2, b * PAGE, H, D, dtype=BF16) for _ in range(n)],
    )
    yield _entry(
        "The same in lists of their own",
        "`[slots, H, D]`, all layers' K, then all layers' V",
        partial(layer, "K L | B N H D"),
        lambda b, n: [torch.zeros(b * PAGE, H, D, dtype=BF16) for _ in range(2 * n)],
    )
    yield _entry(
        "HND",
        "`[pages, H, N, D]`, all layers' K, then all layers' V",
        partial(layer, "K L | B H N D"),
        _several(_each(H, PAGE, D), _each(H, PAGE, D)),
    )
    both = dict(N=PAGE, H=H, D=D, dtype=BF16)
    yield _entry(
        "vectorized_5d (AITER)",
        "`[pages, H, D/8, N, 8]` of K and `[pages, H, N/8, D, 8]` of V",
        partial(parts, k="L | B H D/8 N D%8", v="L | B H N/8 D N%8", **both),
        _several(_each(H, D // 8, PAGE, 8), _each(H, PAGE // 8, D, 8)),
    )
    fp4 = dict(N=PAGE, H=H)
    yield _entry(
        "FP4: two values a byte, a scale for 16",
        "`[slots, H, 64]` and `[slots, H 8]`, K and V of each",
        lambda B, L: KVLayout(
            "K L | B N H D",
            B=B,
            L=L,
            K=2,
            D=D // 2,
            dtype=U8,
            **fp4,
            scales=KVLayout("K L | B N H D", B=B, L=L, K=2, D=D // 16, dtype=U8, **fp4),
        ),
        lambda b, n: [torch.zeros(b * PAGE, H * d, dtype=U8) for d in (D // 2, D // 16) for _ in range(2 * n)],
    )
    yield _entry(
        "Token-major (unified memory): each slot has K and V of all layers",
        "one buffer of entries",
        partial(layer, "B N L K H D"),
        _one("B", PAGE, "L", 2, H, D),
    )
    yield _entry(
        "MLA",
        "`[slots, 1, 576]` a layer",
        partial(KVLayout, "L | B N D", **LATENT),
        lambda b, n: [torch.zeros(b * PAGE, 1, 576, dtype=BF16) for _ in range(n)],
    )
    keys = dict(N=PAGE, row_bytes=PAGE * 132)
    yield _entry(
        "DSA's index keys",
        "`[pages, N 132]` of bytes a layer",
        lambda B, L: parts(
            keys=KVLayout("L | B N D", B=B, L=L, D=128, dtype=F8, **keys),
            scales=KVLayout("L | B N", B=B, L=L, dtype=F32, offset_bytes=PAGE * 128, **keys),
        ),
        _each(PAGE * 132, dtype=U8),
    )
    yield _entry(
        "Mamba's states",
        "`[L, slots, 3, 1280]` and `[L, slots, 16, 64, 128]`",
        lambda B, L: parts(
            conv=KVLayout("L B W D", B=B, L=L, W=3, D=1280, dtype=BF16),
            ssm=KVLayout("L B H D", B=B, L=L, H=16, D=64 * 128, dtype=F32),
        ),
        _several(_one("L", "B", 3, 1280), _one("L", "B", 16, 64 * 128, dtype=F32)),
    )


def sglang_host() -> Iterator[Entry]:
    whole = partial(KVLayout, **PAGES)
    yield _entry("layer_first", "`[2, L, slots, H, D]`", partial(whole, "K L B N H D"), _one(2, "L", "B", PAGE, H, D))
    yield _entry("page_first", "`[2, slots, L, H, D]`", partial(whole, "K B N L H D"), _one(2, "B", PAGE, "L", H, D))
    yield _entry(
        "page_first_direct", "`[2, pages, L, N, H, D]`", partial(whole, "K B L N H D"), _one(2, "B", "L", PAGE, H, D)
    )
    yield _entry("page_head", "`[2, pages, H, N, L, D]`", partial(whole, "K B H N L D"), _one(2, "B", H, PAGE, "L", D))
    yield _entry(
        "page_unified, 4 groups of heads",
        "`[pages, 4, L, 2, N, 2, D]`",
        partial(whole, "B H/2 L K N H%2 D"),
        _one("B", 4, "L", 2, PAGE, 2, D),
    )
    yield _entry(
        "page_first of a pipeline stage: the second half of the layers of a buffer that both write",
        "`[2, slots, 2 L, H, D]`",
        lambda B, L: KVLayout(
            "K B N L H D",
            B=B,
            L=L,
            first_layer=L,
            total_layers=2 * L,
            **PAGES,
            steps={"N": 2 * L * H * D * 2},
            offset_bytes=L * H * D * 2,
        ),
        lambda b, n: [torch.zeros(2 * b * PAGE * 2 * n * H * D, dtype=BF16)],
    )
    yield _entry(
        "page_first with V heads of another size",
        "`[slots, L, H, 192]` of K and `[slots, L, H, 128]` of V",
        partial(whole, "K | B N L H D", **{"D": 192, "D_v": 128}),
        _several(_one("B", PAGE, "L", H, 192), _one("B", PAGE, "L", H, 128)),
    )
    mla = partial(KVLayout, **LATENT)
    yield _entry("layer_first of MLA", "`[L, slots, 1, 576]`", partial(mla, "L B N D"), _one("L", "B", PAGE, 1, 576))
    yield _entry("page_first of MLA", "`[slots, L, 1, 576]`", partial(mla, "B N L D"), _one("B", PAGE, "L", 1, 576))
    yield _entry(
        "page_first_direct and page_unified of MLA",
        "`[pages, L, N, 1, 576]`",
        partial(mla, "B L N D"),
        _one("B", "L", PAGE, 1, 576),
    )
    yield _entry(
        "page_first_kv_split (Ascend)",
        "`[pages, L, N, 1, 512]` and `[pages, L, N, 1, 64]`",
        partial(mla, "K | B L N D", **{"K": 2, "D": 512, "D_v": 64}),
        _several(_one("B", "L", PAGE, 1, 512), _one("B", "L", PAGE, 1, 64)),
    )


def tensorrt_llm() -> Iterator[Entry]:
    yield _entry(
        "A pool of all layers with as many heads; a window's pool is shorter",
        "`[B, L, 2, H N D]`",
        partial(KVLayout, "B L K H N D", **PAGES),
        _one("B", "L", 2, H * PAGE * D),
    )
    yield _entry(
        "MLA: K alone", "`[B, L, 1, N 576]`", partial(KVLayout, "B L N D", **LATENT), _one("B", "L", 1, PAGE * 576)
    )
    fp4 = dict(N=PAGE, H=H, K=2)
    yield _entry(
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
        _several(_one("B", "L", 2, H * PAGE * 64, dtype=U8), _one("B", "L", 2, H * PAGE * 8, dtype=F8)),
    )
    yield _entry(
        "Recurrent states: layers outermost",
        "`[L, B, 1, bytes]`",
        partial(KVLayout, "L B", opaque=True, page_bytes=66048),
        _one("L", "B", 1, 66048, dtype=U8),
    )


def lmcache() -> Iterator[Entry]:
    chunk = partial(KVLayout, **{**GQA, "N": 256})
    yield _entry(
        "KV_2LTD: a chunk of all layers",
        "`[2, L, T, H D]` a chunk",
        partial(chunk, "B K L N H D"),
        _one("B", 2, "L", 256, H * D),
    )
    yield _entry(
        "KV_T2D: a layer's chunk, token-first",
        "`[T, 2, H D]` a layer and chunk",
        partial(chunk, "L | B N K H D"),
        _each(256, 2, H * D),
    )
    yield _entry(
        "KV_2TD: a layer's chunk",
        "`[2, T, H D]` a layer and chunk",
        partial(chunk, "L | B K N H D"),
        _each(2, 256, H * D),
    )
    yield _entry(
        "KV_MLA_FMT",
        "`[1, L, T, 576]` a chunk",
        partial(KVLayout, "B L N D", N=256, D=576, dtype=BF16),
        _one("B", "L", 256, 576),
    )
    layer = partial(KVLayout, **GQA)
    yield _entry(
        "NL_X_TWO_NB_BS_NH_HS: FlashAttention of older vLLM",
        "`[2, B, N, H, D]` a layer",
        partial(layer, "L | K B N H D"),
        lambda b, n: [torch.zeros(2, b, N, H, D, dtype=BF16) for _ in range(n)],
    )
    yield _entry(
        "NL_X_TWO_NB_NH_BS_HS, and vLLM-RBLN's with a 1 in it",
        "`[2, B, H, N, D]` a layer",
        partial(layer, "L | K B H N D"),
        lambda b, n: [torch.zeros(2, b, H, 1, N, D, dtype=BF16) for _ in range(n)],
    )
    yield _entry(
        "NL_X_NB_TWO_BS_NH_HS: FlashInfer of older vLLM",
        "`[B, 2, N, H, D]` a layer",
        partial(layer, "L | B K N H D"),
        _each(2, N, H, D),
    )
    yield _entry(
        "NL_X_NB_TWO_NH_BS_HS: the same, HND",
        "`[B, 2, H, N, D]` a layer",
        partial(layer, "L | B K H N D"),
        _each(2, H, N, D),
    )
    yield _entry(
        "NB_NL_TWO_BS_NH_HS: vLLM's layers in one tensor",
        "`[B, L, 2, N, H, D]`",
        partial(layer, "B L K N H D"),
        _one("B", "L", 2, N, H, D),
    )
    yield _entry(
        "NL_X_TWO_X_NB_BS_NH_HS: vLLM-Ascend",
        "a tuple of `[B, N, H, D]` a layer",
        partial(layer, "L K | B N H D"),
        lambda b, n: [torch.zeros(b, N, H, D, dtype=BF16) for _ in range(2 * n)],
    )


def llama_cpp() -> Iterator[Entry]:
    # A block is a stream: a sequence's cells.
    cells = dict(N=4096, H=H, D=D, dtype=F16)
    yield _entry(
        "With flash attention: K and V cell by cell",
        "`[streams, cells, H D]` of K and of V a layer",
        partial(KVLayout, "L K | B N H D", K=2, **cells),
        lambda b, n: [torch.zeros(b, 4096, H * D, dtype=F16) for _ in range(2 * n)],
    )
    yield _entry(
        "Without: V is transposed",
        "`[streams, cells, H D]` of K and `[streams, H D, cells]` of V, all layers' K first",
        partial(parts, k="L | B N H D", v="L | B H D N", **cells),
        lambda b, n: [
            *(torch.zeros(b, 4096, H * D, dtype=F16) for _ in range(n)),
            *(torch.zeros(b, H * D, 4096, dtype=F16) for _ in range(n)),
        ],
    )
    q8 = dict(N=4096, H=H)
    blocks = D // 32
    yield _entry(
        "q8_0: a scale, then 32 values",
        "`[streams, cells, H 136]` bytes of K a layer",
        lambda B, L: parts(
            scales=KVLayout("L | B N H D", B=B, L=L, D=blocks, dtype=F16, steps={"D": 34}, **q8),
            kv=KVLayout("L | B N H D/32 D%32", B=B, L=L, D=D, dtype=I8, steps={"D/32": 34}, offset_bytes=2, **q8),
        ),
        _each(4096, H * blocks * 34, dtype=U8),
    )


SECTIONS = {
    "vLLM 0.32 and 0.33": vllm,
    "vLLM 0.32 and 0.33: MLA and indexers": vllm_latent,
    "vLLM 0.32 and 0.33: states": vllm_states,
    "SGLang 0.5.23 on the device": sglang,
    "SGLang 0.5.23 on the host (HiCache)": sglang_host,
    "TensorRT-LLM": tensorrt_llm,
    "LMCache 0.5.6": lmcache,
    "llama.cpp": llama_cpp,
}

HEAD = """# A gallery of layouts

What engines register, a line of `KVLayout` each, and its picture. Letters are those of [layouts.md](layouts.md);
`N 132` in a shape is a product. [examples/layouts_gallery.py](../examples/layouts_gallery.py) prints this page, and the
tests hand each layout the tensors that the engine allocates. `KVLayout.from_text` reads a printed layout again.
"""


def page() -> str:
    """The page, with 1,024 blocks and 32 layers."""
    lines = [HEAD]
    for section, entries in SECTIONS.items():
        lines.append(f"## {section}\n")
        for entry in entries():
            layout = entry.layout(1024, 32)
            assert KVLayout.from_text(repr(layout)) == layout
            lines += [f"**{entry.title}**: {entry.registered}.\n", "```text", repr(layout), "", layout.draw(), "```\n"]
    return "\n".join(lines)


def check(entry: Entry, blocks: int = 3, layers: int = 2) -> KVCache:
    """The engine's tensors, small, as a cache of the layout."""
    return KVCache(entry.layout(blocks, layers), entry.tensors(blocks, layers))


if __name__ == "__main__":
    print(page(), end="")
