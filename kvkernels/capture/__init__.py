"""Captures of an engine's KV cache: from vLLM in this process, as files, and compared.

What needs neither torch nor an engine is ``kvkernels_records``, which has the same names.
"""

from kvkernels.capture.layers import CachedLayer, capture_blocks
from kvkernels.capture.packing import Packing, learn_packing
from kvkernels.capture.vllm import capture_from_llm, vllm_layers
from kvkernels_records import (
    CAPTURE_POINTS,
    CaptureConfig,
    CaptureFileError,
    CaptureResult,
    LayerCapture,
    capture_kv_mock,
    load_capture,
    open_arrays,
    reconstruct_tp_shards,
    save_capture,
)
from kvkernels_records.pages import page_digests, save_page_digests

__all__ = [
    "CAPTURE_POINTS",
    "CachedLayer",
    "CaptureConfig",
    "CaptureFileError",
    "CaptureResult",
    "LayerCapture",
    "Packing",
    "capture_blocks",
    "capture_from_llm",
    "capture_kv_mock",
    "learn_packing",
    "load_capture",
    "open_arrays",
    "page_digests",
    "reconstruct_tp_shards",
    "save_capture",
    "save_page_digests",
    "vllm_layers",
]
