"""The ops in plain torch: the oracle of the tests, and what runs where there is no compiled library.

The ops here take and refuse what those of the package do, in the same words. Of the folder's own modules, ``checks`` is
also for the fake kernels, and ``ledger`` answers explain() and counters() where no library does.
"""

from kvkernels.reference.ops import (
    NO_LIBRARY,
    concat_tp_shards,
    concat_tp_shards_checked,
    concat_tp_shards_out,
    copy_pages,
    copy_pages_checked,
    gather_blocks,
    scatter_blocks,
    split_tp_shards,
    split_tp_shards_checked,
    swap_blocks,
    swap_blocks_batch,
    swap_blocks_batch_checked,
    swap_blocks_checked,
)

__all__ = [
    "NO_LIBRARY",
    "concat_tp_shards",
    "concat_tp_shards_checked",
    "concat_tp_shards_out",
    "copy_pages",
    "copy_pages_checked",
    "gather_blocks",
    "scatter_blocks",
    "split_tp_shards",
    "split_tp_shards_checked",
    "swap_blocks",
    "swap_blocks_batch",
    "swap_blocks_batch_checked",
    "swap_blocks_checked",
]
