"""SGLang's copies of pages between pools, from common_ops.abi3.so of sglang-kernel 0.4.3 (--sglang FILE)."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gpu_bench import Bench, CannotRun
from gpu_memory import Case
from gpu_transfer import Transfer

WARPS = 32
QUOTAS = (2, 12)  # its own default, and as many blocks as our kernel takes


def build_all_layers(quota: int) -> Callable[[Bench, Transfer, torch.Tensor, torch.Tensor], Case]:
    """One launch for all pools, whose addresses and ids are on the device already; a page is one item."""

    def build(bench: Bench, moved: Transfer, src: torch.Tensor, dst: torch.Tensor) -> Case:
        op = _ops(bench.options.sglang).transfer_kv_all_layer_mla
        sides = [
            torch.tensor([pool.data_ptr() for pool in moved.geometry.form(flat, "pools")]).view(torch.uint64)
            for flat in (src, dst)
        ]
        tables = [side.to(bench.device) for side in sides]
        ids = [side.to(bench.device) for side in (moved.moves.src, moved.moves.dst)]
        call = [lambda: op(*tables, *ids, moved.fragment_bytes, moved.pools, quota, WARPS)]
        return moved.other_case(src, dst, call)

    return build


def build_direct(bench: Bench, moved: Transfer, src: torch.Tensor, dst: torch.Tensor) -> Case:
    """Its loop of plain copies, of which neighbours are joined."""
    op = _ops(bench.options.sglang).transfer_kv_direct
    sources, targets = (moved.geometry.form(flat, "pools") for flat in (src, dst))
    call = [lambda: op(sources, targets, moved.moves.src, moved.moves.dst, 1)]
    return moved.other_case(src, dst, call)


RIVALS = {
    **{f"SGLang, {quota} blocks": build_all_layers(quota) for quota in QUOTAS},
    "SGLang direct": build_direct,
}


@lru_cache(maxsize=1)
def _ops(path: Path | None) -> Any:
    """The file's ops. libnuma, which it needs, may lie beside it."""
    if path is None:
        raise CannotRun("no --sglang FILE was given")
    numa = path.parent / "libnuma.so.1"
    try:
        if numa.exists():
            ctypes.CDLL(str(numa), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except OSError as error:
        raise CannotRun(f"{path} does not load: {error.__cause__ or error}") from error
    return torch.ops.sgl_kernel
