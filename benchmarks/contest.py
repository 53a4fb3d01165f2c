"""The contestants of a copy: kvkernels' ops, torch's fastest spelling of the same, and a loop of copies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from geometry import Geometry, Moves
from kvkernels import ops

RUN_COLUMNS = 16
TORCH = "torch"
LOOP = "copy_ loop"

# What each op does with whole pages, and which form each of these reads and writes.
KIND_OF = {"swap_blocks": "swap", "copy_pages": "swap", "gather_blocks": "gather", "scatter_blocks": "scatter"}
FORMS_OF = {"swap": ("pools", "pools"), "gather": ("pools", "rows"), "scatter": ("rows", "pools")}
# swap_blocks is vLLM's call, whose signature has no executor.
CHOOSES_EXECUTOR = ("copy_pages", "gather_blocks", "scatter_blocks")


@dataclass(frozen=True)
class Contestant:
    """``run`` moves pages from ``src_form`` to ``dst_form``; one of ours says what its first call is given."""

    name: str
    src_form: str
    dst_form: str
    run: Callable[[], Any]
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)


def whole_page_runs(geometry: Geometry) -> torch.Tensor:
    """The plan of a copy between equal layouts: one run a pool, one fragment a page."""
    runs = torch.zeros(geometry.pools, RUN_COLUMNS, dtype=torch.int64)
    runs[:, 0] = runs[:, 1] = torch.arange(geometry.pools)
    runs[:, 4] = geometry.page_bytes
    runs[:, 7::3] = 1
    return runs


def ours(
    op: str, executor: str, sm_budget: int, geometry: Geometry, moves: Moves, src: torch.Tensor, dst: torch.Tensor
) -> Contestant:
    """One op of kvkernels over all pools: one call, but one a pool for swap_blocks, which takes one pool."""
    name = op if executor == "auto" else f"{op} ({executor})"
    chosen = {"executor": executor, "sm_budget": sm_budget} if op in CHOOSES_EXECUTOR else {}
    src_pools, dst_pools = geometry.form(src, "pools"), geometry.form(dst, "pools")
    function = getattr(ops, op)
    calls: list[tuple[Any, ...]]
    if op == "swap_blocks":
        calls = [
            (source, target, geometry.page_bytes, moves.mapping)
            for source, target in zip(src_pools, dst_pools, strict=True)
        ]
    elif op == "copy_pages":
        calls = [(src_pools, dst_pools, moves.mapping, whole_page_runs(geometry))]
    elif op == "gather_blocks":
        calls = [(src_pools, moves.src, geometry.buffer(dst))]
    else:
        calls = [(geometry.buffer(src), moves.dst, dst_pools)]

    def run() -> None:
        for call in calls:
            function(*call, **chosen)

    return Contestant(name, *FORMS_OF[KIND_OF[op]], run, calls[0], chosen)


def words(pages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The pages as int64 where they divide evenly: index_copy_ is several times faster on words than on bytes."""
    return [page.view(torch.int64) if page.shape[1] % 8 == 0 else page for page in pages]


def torch_rival(
    kind: str, geometry: Geometry, moves: Moves, src: torch.Tensor, dst: torch.Tensor, staging: torch.Tensor
) -> Contestant:
    """torch's fastest spelling, allocating nothing: index_select(out=) and index_copy_, through ``staging`` for a swap.

    Between devices the indexing runs on either side, and ``staging``, on the destination's device, takes the copy
    between.
    """
    src_form, dst_form = FORMS_OF[kind]
    sources, targets = words(geometry.form(src, src_form)), words(geometry.form(dst, dst_form))
    stages = words(staging[: geometry.payload_bytes].view(geometry.pools, geometry.moved, -1).unbind())
    src_ids, dst_ids = moves.src.to(src.device), moves.dst.to(dst.device)
    if src.device != dst.device:
        run = _between_devices(sources, targets, stages, src_ids, dst_ids, src_form, dst_form)
    elif kind == "gather":

        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                torch.index_select(source, 0, src_ids, out=target)
    elif kind == "scatter":

        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.index_copy_(0, dst_ids, source)
    else:

        def run() -> None:
            for source, stage, target in zip(sources, stages, targets, strict=True):
                torch.index_select(source, 0, src_ids, out=stage)
                target.index_copy_(0, dst_ids, stage)

    return Contestant(f"{TORCH} {kind}", src_form, dst_form, run)


def _between_devices(
    sources: list[torch.Tensor],
    targets: list[torch.Tensor],
    stages: list[torch.Tensor],
    src_ids: torch.Tensor,
    dst_ids: torch.Tensor,
    src_form: str,
    dst_form: str,
) -> Callable[[], None]:
    """Gathers on the source's device, copies in one piece a pool, scatters on the destination's device."""
    from_host = not src_ids.is_cuda
    near = [torch.empty_like(stage, device=src_ids.device, pin_memory=from_host) for stage in stages]

    def run() -> None:
        # The host must not fill a staging buffer that the call before is still reading.
        torch.cuda.current_stream().synchronize()
        for source, close, stage in zip(sources, near, stages, strict=True):
            if src_form == "pools":
                torch.index_select(source, 0, src_ids, out=close)
            else:
                close.copy_(source)
            stage.copy_(close, non_blocking=True)
        if not from_host:
            torch.cuda.current_stream().synchronize()
        for stage, target in zip(stages, targets, strict=True):
            if dst_form == "pools":
                target.index_copy_(0, dst_ids, stage)
            else:
                target.copy_(stage)

    return run


def copy_loop(kind: str, geometry: Geometry, moves: Moves, src: torch.Tensor, dst: torch.Tensor) -> Contestant:
    """One copy_ for each page, the views made beforehand: the copies that a loop over a block table issues."""
    src_form, dst_form = FORMS_OF[kind]
    src_ids, dst_ids = moves.ids(src_form, "src").tolist(), moves.ids(dst_form, "dst").tolist()
    copies = [
        (target[to], source[start])
        for source, target in zip(geometry.form(src, src_form), geometry.form(dst, dst_form), strict=True)
        for start, to in zip(src_ids, dst_ids, strict=True)
    ]
    asynchronous = src.is_cuda or dst.is_cuda

    def run() -> None:
        for target, source in copies:
            target.copy_(source, non_blocking=asynchronous)

    return Contestant(f"{LOOP} {kind}", src_form, dst_form, run)
