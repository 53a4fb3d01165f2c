"""vLLM 0.32 and 0.33."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from entries import BF16, F8, F32, GQA, I8, LATENT, PAGE, U8, D, Entry, H, N, each, entry, flat, in_one_row

from kvkernels import KVLayout
from kvkernels.layout import parts


def vllm() -> Iterator[Entry]:
    layer = partial(KVLayout, **GQA)
    views = "a view `[B, H, N, 2 D]` a layer"
    yield entry(
        "LBNHC: FlashAttention, FlashInfer, Triton, FlexAttention, the usual order",
        f"{views}, tokens outermost",
        partial(layer, "L | B N H K D"),
        each(N, H, 2 * D, like="0213"),
    )
    yield entry(
        "LBHNC: FlashInfer on Blackwell, or where Mooncake moves pages",
        views,
        partial(layer, "L | B H N K D"),
        each(H, N, 2 * D),
    )
    yield entry(
        "LHBNC: a head's blocks together",
        f"{views}, heads outside blocks",
        partial(layer, "L | H B N K D"),
        lambda b, n: [torch.zeros(H, b, N, 2 * D, dtype=BF16).transpose(0, 1) for _ in range(n)],
    )
    yield entry(
        "BLHNC: all layers in a block",
        f"{views} of one memory",
        partial(layer, "B L H N K D"),
        in_one_row("BLHNC", 2 * D),
    )
    yield entry(
        "BLNHC: the same, token-first",
        f"{views} of one memory",
        partial(layer, "B L N H K D"),
        in_one_row("BLNHC", 2 * D),
    )
    yield entry(
        "BHLNC: layers inside heads",
        f"{views} of one memory",
        partial(layer, "B H L N K D"),
        in_one_row("BHLNC", 2 * D),
    )
    yield entry(
        "The CPU's attention",
        f"{views}, of which it takes a head as K's N rows and then V's",
        partial(layer, "L | B H K N D"),
        each(H, 2 * N, D),
    )
    yield entry(
        "FlashAttention for K and V of other sizes (MiMo: 192 and 128)",
        "a view `[B, H, N, 320]` a layer",
        partial(layer, "L | B N H K D", **{"D": 192, "D_v": 128}),
        each(N, H, 320, like="0213"),
    )
    yield entry(
        "B12X: planes of K and V",
        "a view `[B, 2, N, H D]` a layer",
        partial(layer, "L | B K N H D"),
        each(2, N, H * D),
    )
    plane = dict(N=N, H=H, D=D, dtype=BF16)
    yield entry(
        "ROCm's paged attention: K's heads cut into pieces of 16 bytes, V by elements",
        "a view `[B, 2, N, H D]` a layer, the two planes outside the blocks",
        lambda B, L: parts(
            k=KVLayout("L | B H D/8 N D%8", B=B, L=L, **plane),
            v=KVLayout("L | B H D N", B=B, L=L, **plane, offset_bytes=B * N * H * D * 2),
        ),
        lambda b, n: [torch.zeros(2 * b * N * H * D, dtype=BF16) for _ in range(n)],
    )
    cell = dict(N=N, H=H, steps={"N": 2 * (D + 4)})
    yield entry(
        "Triton with a scale a token and head (fp8, int8)",
        "a view `[B, H, N, 264]` a layer: K, its scale, V, its scale",
        lambda B, L: parts(
            k=KVLayout("L | B H N D", B=B, L=L, D=D, dtype=F8, **cell),
            k_scales=KVLayout("L | B H N", B=B, L=L, dtype=F32, offset_bytes=D, **cell),
            v=KVLayout("L | B H N D", B=B, L=L, D=D, dtype=F8, offset_bytes=D + 4, **cell),
            v_scales=KVLayout("L | B H N", B=B, L=L, dtype=F32, offset_bytes=2 * D + 4, **cell),
        ),
        each(H, N, 2 * (D + 4), dtype=U8),
    )
    data, scale = N * H * D // 2, N * H * D // 16
    row = {"row_bytes": 2 * (data + scale), "N": N, "H": H}
    yield entry(
        "FlashInfer with NVFP4: K's data, K's scales, V's data, V's scales",
        "a view `[B, 2 H, N, 72]` a layer",
        lambda B, L: parts(
            k=KVLayout("L | B H N D", B=B, L=L, D=D // 2, dtype=U8, **row),
            k_scales=KVLayout("L | B H N D", B=B, L=L, D=D // 16, dtype=F8, offset_bytes=data, **row),
            v=KVLayout("L | B H N D", B=B, L=L, D=D // 2, dtype=U8, offset_bytes=data + scale, **row),
            v_scales=KVLayout("L | B H N D", B=B, L=L, D=D // 16, dtype=F8, offset_bytes=2 * data + scale, **row),
        ),
        flat(2 * H * N * (D // 2 + D // 16)),
    )
    yield entry(
        "TurboQuant, UltraQuant: K and V of a head and token in one slot",
        "a view `[B, H, N, 136]` a layer, say",
        partial(KVLayout, "L | B N H D", N=N, H=H, D=136, dtype=U8),
        each(N, H, 136, dtype=U8, like="0213"),
    )


def vllm_latent() -> Iterator[Entry]:
    yield entry(
        "MLA (DeepSeek V2, V3, Kimi)",
        "a view `[B, 1, N, 576]` a layer",
        partial(KVLayout, "L | B N D", **LATENT),
        each(1, PAGE, 576),
    )
    packed = dict(N=PAGE, steps={"N": 656})
    yield entry(
        "fp8_ds_mla (DeepSeek V3.2): 512 values, 4 scales, 64 values of rope",
        "a view `[B, 1, N, 656]` of bytes a layer",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=512, dtype=F8, **packed),
            scales=KVLayout("L | B N D", B=B, L=L, D=4, dtype=F32, offset_bytes=512, **packed),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, dtype=BF16, offset_bytes=528, **packed),
        ),
        each(1, PAGE, 656, dtype=U8),
    )
    packed4 = dict(N=PAGE, steps={"N": 352})
    yield entry(
        "nvfp4_ds_mla: 512 values in 256 bytes, 64 of rope, 32 scales, permuted",
        "a view `[B, 1, N, 352]` of bytes a layer",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=256, dtype=U8, **packed4),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, dtype=F8, offset_bytes=256, **packed4),
            scales=KVLayout("L | B N D", B=B, L=L, D=32, dtype=F8, offset_bytes=320, **packed4),
        ),
        each(1, PAGE, 352, dtype=U8),
    )
    keys = dict(N=PAGE, row_bytes=PAGE * 132)
    yield entry(
        "The indexer beside it: all keys of a block, then all scales",
        "a view `[B, 1, N, 132]` of bytes a layer",
        lambda B, L: parts(
            keys=KVLayout("L | B N D", B=B, L=L, D=128, dtype=F8, **keys),
            scales=KVLayout("L | B N", B=B, L=L, dtype=F32, offset_bytes=PAGE * 128, **keys),
        ),
        flat(PAGE * 132),
    )
    rows = dict(N=PAGE, row_bytes=37440)
    yield entry(
        "DeepSeek V4: 448 values and 64 of rope a row, then all scales; pages of whole rows of 576 bytes",
        "a view `[B, 1, N, 584]` of bytes a layer, padded",
        lambda B, L: parts(
            latent=KVLayout("L | B N D", B=B, L=L, D=448, dtype=F8, steps={"N": 576}, **rows),
            rope=KVLayout("L | B N D", B=B, L=L, D=64, dtype=BF16, offset_bytes=448, steps={"N": 576}, **rows),
            scales=KVLayout("L | B N D", B=B, L=L, D=8, dtype=U8, offset_bytes=PAGE * 576, **rows),
        ),
        flat(37440),
    )
    yield entry(
        "MLA, dealt out among 8 decode context ranks: rank 3's",
        "a view `[B, 1, N, 576]` a layer",
        partial(KVLayout, "L | B N D", deal=(3, 8, 1), **LATENT),
        each(1, PAGE, 576),
    )
    yield entry(
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
    yield entry(
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
        flat(page),
    )
    q, v = 128 * 2, 128 * 4
    gdn, gdn_page = 2 * q + v, (2 * q + v) * 3 * 2 + 4 * 128 * 128 * 4
    rows = dict(W=3, dtype=BF16, row_bytes=gdn_page)
    yield entry(
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
        flat(gdn_page),
    )
    yield entry(
        "A state that nobody says the inside of",
        "a page of bytes a layer",
        partial(KVLayout, "L | B", opaque=True, page_bytes=66048),
        each(66048, dtype=I8),
    )
