"""Moves KV-cache blocks between devices, layouts and tensor-parallel shards: each byte asked for, or an error."""

from kvkernels.explain import Explanation, check_device, counters, explain, reset_counters
from kvkernels.info import info
from kvkernels.layout import (
    KVCache,
    KVLayout,
    Plan,
    compile_plan,
    convert_blocks,
    copy_slots,
    expand_blocks,
    whole_page_runs,
)
from kvkernels.ops import (
    concat_tp_shards,
    concat_tp_shards_out,
    copy_pages,
    gather_blocks,
    scatter_blocks,
    split_tp_shards,
    swap_blocks,
    swap_blocks_batch,
)
from kvkernels.prepared import BoundPools, PreparedCopy, PreparedGroups, SlabbedCopy, bind, prepare
from kvkernels.version import __version__

__all__ = [
    "BoundPools",
    "Explanation",
    "KVCache",
    "KVLayout",
    "Plan",
    "PreparedCopy",
    "PreparedGroups",
    "SlabbedCopy",
    "__version__",
    "bind",
    "check_device",
    "compile_plan",
    "concat_tp_shards",
    "concat_tp_shards_out",
    "convert_blocks",
    "copy_pages",
    "copy_slots",
    "counters",
    "expand_blocks",
    "explain",
    "gather_blocks",
    "info",
    "prepare",
    "reset_counters",
    "scatter_blocks",
    "split_tp_shards",
    "swap_blocks",
    "swap_blocks_batch",
    "whole_page_runs",
]
