"""What was recorded of KV caches, on numpy alone: captures, their files and comparison, and statistics of accesses.

Importing ``kvkernels`` imports torch; importing this does not. ``kvkernels.capture`` and ``kvkernels.observe`` have the
same names, and what needs torch or an engine.
"""

from kvkernels_records.capture import CaptureResult, LayerCapture, reconstruct_tp_shards
from kvkernels_records.config import CAPTURE_POINTS, CaptureConfig
from kvkernels_records.errors import CaptureFileError, MissingExtraError
from kvkernels_records.files import load_capture, open_arrays, save_capture
from kvkernels_records.mock import capture_kv_mock

__all__ = [
    "CAPTURE_POINTS",
    "CaptureConfig",
    "CaptureFileError",
    "CaptureResult",
    "LayerCapture",
    "MissingExtraError",
    "capture_kv_mock",
    "load_capture",
    "open_arrays",
    "reconstruct_tp_shards",
    "save_capture",
]
