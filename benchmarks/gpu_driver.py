"""CUDA's own batched copy, called as an engine would call it: three arrays, no check, one call."""

import ctypes
from collections.abc import Callable

import torch

from gpu_attributes import runtime
from gpu_bench import CannotRun

VERSION = 12080  # with an index of the copy that failed, as all engines call it
IN_STREAM_ORDER = 1


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("src_access_order", ctypes.c_int),
        ("src_hint", Location),
        ("dst_hint", Location),
        ("flags", ctypes.c_uint),
    ]


def batched_copy(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor) -> Callable[[], None]:
    """A call that copies between raw addresses, int64 on the CPU, on the current stream.

    Raises
    ------
    CannotRun
        The driver has no cuMemcpyBatchAsync; and out of the call, where the driver refuses it.
    """
    function = _function()
    attributes, first = Attributes(src_access_order=IN_STREAM_ORDER), ctypes.c_size_t(0)
    stream = torch.cuda.current_stream().cuda_stream

    def run() -> None:
        failed = ctypes.c_size_t(0)
        error = function(
            targets.data_ptr(), sources.data_ptr(), sizes.data_ptr(), len(sizes), ctypes.byref(attributes),
            ctypes.byref(first), 1, ctypes.byref(failed), stream,
        )  # fmt: skip
        if error:
            raise CannotRun(f"cuMemcpyBatchAsync of {len(sizes)} copies: CUDA error {error}")

    return run


def _function() -> Callable[..., int]:
    address, status = ctypes.c_void_p(), ctypes.c_int()
    error = runtime().cudaGetDriverEntryPointByVersion(
        b"cuMemcpyBatchAsync", ctypes.byref(address), VERSION, ctypes.c_ulonglong(0), ctypes.byref(status)
    )
    if error or not address.value:
        raise CannotRun(f"the driver has no cuMemcpyBatchAsync: CUDA error {error}, status {status.value}")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    return ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer)(
        address.value
    )
