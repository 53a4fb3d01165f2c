"""Layouts by name, and the plans that convert one into another."""

from kvkernels.layout.blocks import expand_blocks, whole_page_runs
from kvkernels.layout.cache import KVCache
from kvkernels.layout.canonical import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    canonicalize,
)
from kvkernels.layout.convert import convert_blocks
from kvkernels.layout.forms import layout_of
from kvkernels.layout.groups import copy_groups, empty_host_caches
from kvkernels.layout.layout import KVLayout, parts
from kvkernels.layout.page_runs import (
    CanonicalPageMapping,
    CopyRun,
    mapping_of_plan,
    opaque_mapping,
    plan_of_mapping,
)
from kvkernels.layout.parallel import Parallel, TensorParallel
from kvkernels.layout.plan import Plan, compile_plan
from kvkernels.layout.slots import copy_slots

__all__ = [
    "CanonicalKVCacheRef",
    "CanonicalKVCacheTensor",
    "CanonicalKVCaches",
    "CanonicalPageMapping",
    "CopyRun",
    "KVCache",
    "KVLayout",
    "Parallel",
    "Plan",
    "TensorParallel",
    "canonicalize",
    "compile_plan",
    "convert_blocks",
    "copy_groups",
    "copy_slots",
    "empty_host_caches",
    "expand_blocks",
    "layout_of",
    "mapping_of_plan",
    "opaque_mapping",
    "parts",
    "plan_of_mapping",
    "whole_page_runs",
]
