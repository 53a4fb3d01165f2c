"""SGLang 0.5.23."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from entries import BF16, F8, F32, LATENT, PAGE, PAGES, U8, D, Entry, H, each, entry, one, several

from kvkernels import KVLayout
from kvkernels.layout import parts


def sglang() -> Iterator[Entry]:
    layer = partial(KVLayout, **PAGES)
    yield entry(
        "NHD, a layer's K and V in one allocation",
        "`[slots, H, D]` of K and of V a layer, halves of `[2, slots, H, D]`",
        partial(layer, "L | K B N H D"),
        lambda b, n: [torch.zeros(2, b * PAGE, H, D, dtype=BF16) for _ in range(n)],
    )
    yield entry(
        "The same in lists of their own",
        "`[slots, H, D]`, all layers' K, then all layers' V",
        partial(layer, "K L | B N H D"),
        lambda b, n: [torch.zeros(b * PAGE, H, D, dtype=BF16) for _ in range(2 * n)],
    )
    yield entry(
        "HND",
        "`[pages, H, N, D]`, all layers' K, then all layers' V",
        partial(layer, "K L | B H N D"),
        several(each(H, PAGE, D), each(H, PAGE, D)),
    )
    both = dict(N=PAGE, H=H, D=D, dtype=BF16)
    yield entry(
        "vectorized_5d (AITER)",
        "`[pages, H, D/8, N, 8]` of K and `[pages, H, N/8, D, 8]` of V",
        partial(parts, k="L | B H D/8 N D%8", v="L | B H N/8 D N%8", **both),
        several(each(H, D // 8, PAGE, 8), each(H, PAGE // 8, D, 8)),
    )
    fp4 = dict(N=PAGE, H=H)
    yield entry(
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
    yield entry(
        "Token-major (unified memory): each slot has K and V of all layers",
        "one buffer of entries",
        partial(layer, "B N L K H D"),
        one("B", PAGE, "L", 2, H, D),
    )
    yield entry(
        "MLA",
        "`[slots, 1, 576]` a layer",
        partial(KVLayout, "L | B N D", **LATENT),
        lambda b, n: [torch.zeros(b * PAGE, 1, 576, dtype=BF16) for _ in range(n)],
    )
    keys = dict(N=PAGE, row_bytes=PAGE * 132)
    yield entry(
        "DSA's index keys",
        "`[pages, N 132]` of bytes a layer",
        lambda B, L: parts(
            keys=KVLayout("L | B N D", B=B, L=L, D=128, dtype=F8, **keys),
            scales=KVLayout("L | B N", B=B, L=L, dtype=F32, offset_bytes=PAGE * 128, **keys),
        ),
        each(PAGE * 132, dtype=U8),
    )
    yield entry(
        "Mamba's states",
        "`[L, slots, 3, 1280]` and `[L, slots, 16, 64, 128]`",
        lambda B, L: parts(
            conv=KVLayout("L B W D", B=B, L=L, W=3, D=1280, dtype=BF16),
            ssm=KVLayout("L B H D", B=B, L=L, H=16, D=64 * 128, dtype=F32),
        ),
        several(one("L", "B", 3, 1280), one("L", "B", 16, 64 * 128, dtype=F32)),
    )


def sglang_host() -> Iterator[Entry]:
    whole = partial(KVLayout, **PAGES)
    yield entry("layer_first", "`[2, L, slots, H, D]`", partial(whole, "K L B N H D"), one(2, "L", "B", PAGE, H, D))
    yield entry("page_first", "`[2, slots, L, H, D]`", partial(whole, "K B N L H D"), one(2, "B", PAGE, "L", H, D))
    yield entry(
        "page_first_direct", "`[2, pages, L, N, H, D]`", partial(whole, "K B L N H D"), one(2, "B", "L", PAGE, H, D)
    )
    yield entry("page_head", "`[2, pages, H, N, L, D]`", partial(whole, "K B H N L D"), one(2, "B", H, PAGE, "L", D))
    yield entry(
        "page_unified, 4 groups of heads",
        "`[pages, 4, L, 2, N, 2, D]`",
        partial(whole, "B H/2 L K N H%2 D"),
        one("B", 4, "L", 2, PAGE, 2, D),
    )
    yield entry(
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
    yield entry(
        "page_first with V heads of another size",
        "`[slots, L, H, 192]` of K and `[slots, L, H, 128]` of V",
        partial(whole, "K | B N L H D", **{"D": 192, "D_v": 128}),
        several(one("B", PAGE, "L", H, 192), one("B", PAGE, "L", H, 128)),
    )
    mla = partial(KVLayout, **LATENT)
    yield entry("layer_first of MLA", "`[L, slots, 1, 576]`", partial(mla, "L B N D"), one("L", "B", PAGE, 1, 576))
    yield entry("page_first of MLA", "`[slots, L, 1, 576]`", partial(mla, "B N L D"), one("B", PAGE, "L", 1, 576))
    yield entry(
        "page_first_direct and page_unified of MLA",
        "`[pages, L, N, 1, 576]`",
        partial(mla, "B L N D"),
        one("B", "L", PAGE, 1, 576),
    )
    yield entry(
        "page_first_kv_split (Ascend)",
        "`[pages, L, N, 1, 512]` and `[pages, L, N, 1, 64]`",
        partial(mla, "K | B L N D", **{"K": 2, "D": 512, "D_v": 64}),
        several(one("B", "L", PAGE, 1, 512), one("B", "L", PAGE, 1, 64)),
    )
