"""Host memory registered with CUDA: pinned, in chunks, all of it or none."""

from __future__ import annotations

import ctypes
import math
import mmap
import os

import torch

#: The most that is registered at a time: from driver 580 on, one of 512 GiB or more fails (vLLM issue 51080).
CHUNK_BYTES = 64 << 30

_PORTABLE = 1  # for the contexts of all devices


class RegistrationError(RuntimeError):
    """CUDA does not take memory as pinned; none of it is registered then."""


def why_no_cuda() -> str:
    """Why nothing can be registered here, or ``""``."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda._is_in_bad_fork():
        return "CUDA cannot be used in a forked process"
    return ""


class Registration:
    """A range of host memory that is pinned while this is not undone.

    ::

        | chunk 0: whole rows .... | chunk 1 .................. | chunk 2: the rest |
          at most CHUNK_BYTES        begins with a row on a page's boundary

    A chunk ends where a row does, unless rows end on a page's boundary too rarely for that: CUDA refuses a copy that
    spans two registrations (SGLang pull request 36798), and whoever copies by itself copies rows.

    Parameters
    ----------
    address, byte_count : int
        The range, of whole pages of the system.
    row_bytes : int
        From one row to the next; the first begins at `address`.

    Raises
    ------
    RegistrationError
        CUDA refused. What was registered until then is not any more, and no later call meets the error.
    """

    def __init__(self, address: int, byte_count: int, row_bytes: int) -> None:
        cudart = torch.cuda.cudart()
        # Kept, since it may be undone when the interpreter ends.
        self._unregister = cudart.cudaHostUnregister
        self._process = os.getpid()
        self._begins: list[int] = []
        step = _chunk_bytes(row_bytes)
        try:
            for begin in range(0, byte_count, step):
                end = min(begin + step, byte_count)
                code = int(cudart.cudaHostRegister(address + begin, end - begin, _PORTABLE))
                if code != 0:
                    _forget_error()
                    raise RegistrationError(
                        f"cudaHostRegister of bytes {begin} to {end} of {byte_count} failed: "
                        f"{cudart.cudaGetErrorString(cudart.cudaError(code))} ({code})"
                    )
                self._begins.append(address + begin)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Unregister all of it. A second call does nothing, nor does one in a forked process, which has no CUDA."""
        begins, self._begins = self._begins, []
        if os.getpid() != self._process:
            return
        for begin in reversed(begins):
            if int(self._unregister(begin)) != 0:
                _forget_error()


def _chunk_bytes(row_bytes: int) -> int:
    unit = math.lcm(row_bytes, mmap.PAGESIZE)
    if unit > CHUNK_BYTES:
        unit = mmap.PAGESIZE
    return CHUNK_BYTES // unit * unit


def _forget_error() -> None:
    """Takes the thread's last error away, which the next check of a kernel launch would blame on that kernel.

    It is that of torch's own runtime, which does not hand the function out; one that is linked into torch itself is
    out of reach.
    """
    name = f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}"
    try:
        runtime = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return
    runtime.cudaGetLastError()
