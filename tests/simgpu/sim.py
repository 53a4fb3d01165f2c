"""The stand-in for CUDA from Python."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .device import Device, Modules, ptx_of
from .oracle import PAGE as PAGE
from .oracle import Move as Move
from .oracle import Side as Side
from .oracle import copy_naively as copy_naively
from .oracle import random_pairs as random_pairs
from .oracle import segments_of as segments_of

PAGEABLE, PINNED, DEVICE, MANAGED = range(4)
H2H, H2D, D2H, D2D = range(4)
LEGACY, LEGACY_BY_NAME, PER_THREAD = 0, 1, 2
STREAM_ORDER, DURING_CALL, ANY_ORDER = 1, 2, 3
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, NOT_SUPPORTED = 1, 2, 700, 801
NOT_READY = 600
SMS = 132
BATCH = 2048
LARGE_PARAMETERS, SMALL_PARAMETERS = 32000, 4096


class CudaError(RuntimeError):
    """What C++ threw as CudaError."""


class Refused(ValueError):
    """What C++ threw as std::invalid_argument."""


@dataclass
class IdColumn:
    address: int = 0
    stride_bytes: int = 0
    width: int = 0


@dataclass
class DeviceIds:
    src: IdColumn
    dst: IdColumn
    rows: int
    src_limit: int
    dst_limit: int
    skip_negative: bool = False
    op: int = 7

    def numbers(self) -> list[int]:
        columns = [n for c in (self.src, self.dst) for n in (c.address, c.stride_bytes, c.width)]
        return [*columns, self.rows, self.src_limit, self.dst_limit, int(self.skip_negative), self.op]


@dataclass
class Issued:
    launches: int
    descriptors: int
    bytes: int


@dataclass
class KernelRun:
    launches: int
    ctas: int
    threads: int
    tiles: int
    descriptors: int
    bytes: int
    table_bytes: int
    uploads: bool
    variant: str
    issued: Issued


@dataclass(frozen=True)
class Counters:
    """What was asked of the stand-in; the difference of two is what was asked between."""

    launches: int
    copy_calls: int
    descriptors: int
    host_to_host_bytes: int
    host_to_device_bytes: int
    device_to_host_bytes: int
    device_to_device_bytes: int
    staged_copies: int
    stream_synchronisations: int
    device_synchronisations: int
    event_synchronisations: int
    hidden_synchronisations: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def synchronisations(self) -> int:
        return (
            self.stream_synchronisations
            + self.device_synchronisations
            + self.event_synchronisations
            + self.hidden_synchronisations
        )


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass
class Sim:
    """Memory, streams, time, failures and the log of the stand-in; the entry points of csrc/cuda."""

    cuda: Any
    cudart: Any
    drive: Any
    buffers: list[tuple[str, int]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    device: Device | None = None
    watched: tuple[int, np.ndarray] | None = None
    events: list[int] = field(default_factory=list)
    host_functions: list[Any] = field(default_factory=list)

    _loaded = None
    _modules: dict[str, Modules] | None = None

    @classmethod
    def of(cls, build: str) -> Sim:
        if cls._loaded is None:
            names = ("libcuda.so.1", "libcudart.so.13", "libkvkernels_drive.so")
            cls._loaded = cls(*(ctypes.CDLL(str(Path(build) / name)) for name in names))
            cls._loaded.cuda.fake_log.restype = ctypes.c_char_p
            cls._loaded.cuda.fake_schedule.restype = ctypes.c_char_p
            cls._loaded.cudart.cudaGetErrorName.restype = ctypes.c_char_p
            cls._loaded.drive.drive_message.restype = ctypes.c_char_p
            names = ("fake_calls", "fake_parameters", "fake_allocations", "fake_list_allocations", "fake_streams",
                     "fake_contexts")  # fmt: skip
            for function in names:
                getattr(cls._loaded.cuda, function).restype = ctypes.c_int64
            cls._loaded.cudart.fake_events.restype = ctypes.c_int64
            cls._loaded.drive.drive_divide.restype = ctypes.c_int64
        return cls._loaded

    @property
    def modules(self) -> dict[str, Modules]:
        """The library's PTX, by architecture."""
        if Sim._modules is None:
            Sim._modules = ptx_of(Path(self.drive._name))
        return Sim._modules

    def has_same_ptx(self, architecture: str, others: Sequence[str], kinds: Iterable[str]) -> bool:
        """Whether the copy kernels of these kinds are the same for one of the others, line by line."""
        mine = self.modules[architecture]
        kernels = [k for k in mine.kernels if k.split("_")[2] in kinds]
        built = [self.modules[o] for o in others if o in self.modules]
        return any(all(mine.text(k) == theirs.text(k) for k in kernels) for theirs in built)

    def use_ptx(self, architecture: str) -> Device:
        """From now on, until the next reset, launches run on the simulator."""
        self.device = Device(self.cuda, self.modules[architecture])
        return self.device

    def reset(self) -> None:
        self.device = None
        self.watched = None
        self.drive.drive_use_host_code()
        self.cuda.fake_reset()
        self._checked(self.drive.drive_free_uploads())
        self.drive.drive_watch(ctypes.c_uint64(0), ctypes.c_int64(0), None)
        for release, address in self.buffers:
            if release == "forget":
                self.cuda.fake_forget(ctypes.c_uint64(address))
            elif release:
                self._runtime(release, ctypes.c_void_p(address))
        self.buffers.clear()
        for stream in self.streams:
            self._runtime("cudaStreamDestroy", ctypes.c_void_p(stream))
        self.streams.clear()
        for event in self.events:
            self._runtime("cudaEventDestroy", ctypes.c_void_p(event))
        self.events.clear()
        self.host_functions.clear()
        self._runtime("cudaSetDevice", 0)
        self.cudart.cudaGetLastError()
        self.cuda.fake_reset()

    def _runtime(self, name: str, *arguments: Any) -> None:
        code = getattr(self.cudart, name)(*arguments)
        if code:
            raise CudaError(f"{name}: {self.cudart.cudaGetErrorName(code).decode()}")

    def _create(self, name: str, *more: Any) -> int:
        out = ctypes.c_void_p()
        self._runtime(name, ctypes.byref(out), *more)
        assert out.value is not None
        return out.value

    def _allocate(self, name: str, release: str, byte_count: int, *more: Any) -> np.ndarray:
        out = ctypes.c_void_p()
        self._runtime(name, ctypes.byref(out), ctypes.c_size_t(byte_count), *more)
        assert out.value is not None
        self.buffers.append((release, out.value))
        return np.frombuffer((ctypes.c_uint8 * byte_count).from_address(out.value), np.uint8)

    def memory(self, kind: int, byte_count: int) -> np.ndarray:
        """Random bytes in memory of a kind."""
        if kind == PAGEABLE:
            buffer = np.empty(byte_count, np.uint8)
        elif kind == PINNED:
            buffer = self._allocate("cudaHostAlloc", "cudaFreeHost", byte_count, 0)
        elif kind == DEVICE:
            buffer = self._allocate("cudaMalloc", "cudaFree", byte_count)
        else:
            buffer = self._allocate("cudaMallocManaged", "cudaFree", byte_count, 1)
        buffer[:] = np.random.default_rng(byte_count + kind).integers(0, 256, byte_count, np.uint8)
        return buffer

    def adopt(self, buffer: np.ndarray, kind: int, device: int = 0, device_offset: int = 0) -> np.ndarray:
        """Declares memory of the test's own to be of a kind."""
        self.cuda.fake_adopt(
            ctypes.c_uint64(address(buffer)), ctypes.c_int64(buffer.nbytes), kind, device, ctypes.c_int64(device_offset)
        )
        self.buffers.append(("forget", address(buffer)))
        return buffer

    def register(self, buffer: np.ndarray, flags: int = 0) -> None:
        self._runtime("cudaHostRegister", ctypes.c_void_p(address(buffer)), ctypes.c_size_t(buffer.nbytes), flags)
        self.buffers.append(("cudaHostUnregister", address(buffer)))

    def stream(self, capturing: bool = False, blocking: bool = False) -> int:
        stream = self._create("cudaStreamCreateWithFlags", 0 if blocking else 1)
        self.streams.append(stream)
        self.capture(stream, capturing)
        return stream

    def capture(self, stream: int, capturing: bool) -> None:
        self.cuda.fake_set_capturing(ctypes.c_void_p(stream), int(capturing))

    def adversarial(self, seed: int) -> None:
        """What is asked for from now on happens when a random scheduler likes; 0: at once, as after a reset."""
        self.cuda.fake_seed(ctypes.c_uint64(0))
        self._checked(self.drive.drive_free_uploads())
        self.clear_log()
        self.cuda.fake_seed(ctypes.c_uint64(seed))

    def schedule(self) -> list[dict[str, Any]]:
        """What the scheduler did since the seed was set, in order."""
        return json.loads(self.cuda.fake_schedule())

    def event(self) -> int:
        event = self._create("cudaEventCreateWithFlags", 0)
        self.events.append(event)
        return event

    def record(self, event: int, stream: int) -> None:
        self._runtime("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def wait(self, stream: int, event: int) -> None:
        self._runtime("cudaStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(event), 0)

    def is_done(self, event: int) -> bool:
        code = self.cudart.cudaEventQuery(ctypes.c_void_p(event))
        if code not in (0, NOT_READY):
            raise CudaError(f"cudaEventQuery: {self.cudart.cudaGetErrorName(code).decode()}")
        return code == 0

    def poll(self, event: int) -> int:
        """Asks until the event is done; how often it was not."""
        for asked in range(10_000):
            if self.is_done(event):
                return asked
        raise AssertionError("asking makes no progress")

    def finish_event(self, event: int) -> None:
        self._runtime("cudaEventSynchronize", ctypes.c_void_p(event))

    def finish_stream(self, stream: int) -> None:
        self._runtime("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def finish_device(self) -> None:
        self._runtime("cudaDeviceSynchronize")

    def fill(self, buffer: np.ndarray, value: int, stream: int) -> None:
        self._runtime(
            "cudaMemsetAsync", ctypes.c_void_p(address(buffer)), value, ctypes.c_size_t(len(buffer)),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def copy(self, dst: np.ndarray, src: np.ndarray, stream: int) -> None:
        self._runtime(
            "cudaMemcpyAsync", ctypes.c_void_p(address(dst)), ctypes.c_void_p(address(src)),
            ctypes.c_size_t(len(dst)), 4, ctypes.c_void_p(stream),
        )  # fmt: skip

    def batch(self, rows: Sequence[tuple[int, int, int]], stream: int, order: int) -> int:
        """The driver's batch function itself, and its code. Rows are source address, destination address and bytes."""
        sources, destinations, sizes = (np.ascontiguousarray(c, np.uint64) for c in zip(*rows, strict=True))
        attributes = np.array([order, 0, 0, 0, 0, 0], np.int32)
        first, failed = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        return self.cuda.fake_cuMemcpyBatchAsync(
            _data(destinations), _data(sources), _data(sizes), ctypes.c_size_t(len(rows)), _data(attributes),
            _data(first), ctypes.c_size_t(1), _data(failed), ctypes.c_void_p(stream),
        )  # fmt: skip

    def call_on_host(self, function: Callable[[], None], stream: int) -> None:
        self.host_functions.append(HOST_FUNCTION(lambda _: function()))
        self._runtime("cudaLaunchHostFunc", ctypes.c_void_p(stream), self.host_functions[-1], None)

    def begin_capture(self, stream: int, mode: int = 0) -> None:
        self._runtime("cudaStreamBeginCapture", ctypes.c_void_p(stream), mode)

    def end_capture(self, stream: int) -> int:
        """An executable graph; nothing else is left of the capture."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._runtime("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self._runtime("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._runtime("cudaGraphDestroy", graph)
        assert executable.value is not None
        return executable.value

    def launch(self, graph: int, stream: int) -> None:
        self._runtime("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def free_graph(self, graph: int) -> None:
        self._runtime("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def counters(self) -> Counters:
        out = np.zeros(len(Counters.__dataclass_fields__), np.int64)
        self.cuda.fake_counters(_data(out))
        return Counters(*out.tolist())

    def set_device(self, device: int) -> None:
        self._runtime("cudaSetDevice", device)

    def contexts(self) -> int:
        """Devices that have one."""
        return self.cuda.fake_contexts()

    def current_context(self) -> int | None:
        """The calling thread's."""
        out = ctypes.c_void_p()
        assert self.cuda.cuCtxGetCurrent(ctypes.byref(out)) == 0
        return out.value

    def set(self, name: str, value: int) -> None:
        self.cuda.fake_set(name.encode(), ctypes.c_int64(value))

    def fail(self, call: str, k: int, code: int) -> None:
        self.cuda.fake_fail(call.encode(), ctypes.c_int64(k), code)

    def fail_no_more(self) -> None:
        """Whatever was to fail and did not."""
        self.cuda.fake_fail_no_more()

    def calls(self, call: str) -> int:
        return self.cuda.fake_calls(call.encode())

    def log(self, call: str = "") -> list[dict[str, Any]]:
        entries = json.loads(self.cuda.fake_log())
        return [entry for entry in entries if call in ("", entry["call"])]

    def clear_log(self) -> None:
        self.cuda.fake_clear_log()

    def parameters(self, index: int) -> bytes:
        out = ctypes.create_string_buffer(LARGE_PARAMETERS)
        size = self.cuda.fake_parameters(ctypes.c_int64(index), out, ctypes.c_int64(LARGE_PARAMETERS))
        return out.raw[:size]

    def watch(self, buffer: np.ndarray) -> np.ndarray:
        """Counts how often kernels write each byte of ``buffer``."""
        writes = np.zeros(len(buffer), np.uint8)
        self.drive.drive_watch(
            ctypes.c_uint64(address(buffer)), ctypes.c_int64(len(buffer)), writes.ctypes.data_as(ctypes.c_void_p)
        )
        self.watched = address(buffer), writes
        return writes

    def _count_simulated(self) -> None:
        """The writes of the launches on the simulator, which finds by itself who writes a byte twice."""
        assert self.device is not None
        for report in self.device.take_reports():
            for area in report.areas.values():
                if self.watched is not None and area.base + area.begin == self.watched[0]:
                    self.watched[1][:] += area.written_map()

    def loads(self) -> tuple[dict[int, int], int]:
        """Loads by width since the last call, and the most that one thread had in flight before a store."""
        widths = (ctypes.c_int64 * 17)()
        deepest = ctypes.c_int64()
        self.drive.drive_loads(widths, ctypes.byref(deepest))
        return {width: count for width, count in enumerate(widths) if count}, deepest.value

    def _checked(self, status: int) -> None:
        if self.device is not None:
            self._count_simulated()
        if status == 0:
            return
        text = self.drive.drive_message().decode()
        raise {1: CudaError, 2: Refused}.get(status, AssertionError)(text)

    def dma(
        self,
        moves: Sequence[Move],
        pairs: Sequence[tuple[int, int]],
        src: np.ndarray,
        dst: np.ndarray,
        stream: int,
        *,
        direction: int = H2D,
        any_order: bool = False,
        plans_only: bool = False,
    ) -> Issued:
        rows = _int64([move.row(address(src), address(dst)) for move in moves])
        segments = _int64(segments_of(pairs))
        out = np.zeros(3, np.int64)
        status = self.drive.drive_dma(
            *_sized(rows), *_sized(segments), direction, int(any_order), int(plans_only),
            ctypes.c_void_p(stream), _data(out),
        )  # fmt: skip
        self._checked(status)
        return Issued(*out.tolist())

    def fragments(
        self, rows: Sequence[tuple[int, int, int]], stream: int, *, any_order: bool = False, plans_only: bool = False
    ) -> Issued:
        """Rows are source address, destination address and bytes."""
        numbers = _int64(rows)
        out = np.zeros(3, np.int64)
        status = self.drive.drive_fragments(
            *_sized(numbers), int(any_order), int(plans_only), ctypes.c_void_p(stream), _data(out)
        )
        self._checked(status)
        return Issued(*out.tolist())

    def kernel(
        self,
        moves: Sequence[Move],
        pairs: Sequence[tuple[int, int]],
        src: np.ndarray,
        dst: np.ndarray,
        stream: int = 0,
        *,
        ids: DeviceIds | None = None,
        direction: int = D2D,
        sm_budget: int = 0,
        max_items: int = 0,
        capturing: bool = False,
        maps: bool | int = False,
        runs: bool = True,
        bulk: bool = False,
    ) -> KernelRun:
        rows = _int64([move.row(address(src), address(dst)) for move in moves])
        segments = _int64([] if ids else segments_of(pairs))
        numbers = _int64(ids.numbers()) if ids else None
        options = _int64([direction, sm_budget, max_items, int(capturing), int(maps), int(runs), int(bulk)])
        out = np.zeros(12, np.int64)
        status = self.drive.drive_kernel(
            *_sized(rows), *_sized(segments), None if numbers is None else _data(numbers), _data(options),
            ctypes.c_void_p(stream), _data(out),
        )  # fmt: skip
        self._checked(status)
        found = out.tolist()
        return KernelRun(*found[:7], bool(found[7]), ("page", "row", "bytes", "bulk")[found[8]], Issued(*found[9:]))

    def staged(
        self,
        moves: Sequence[Move],
        pairs: Sequence[tuple[int, int]],
        src: np.ndarray,
        dst: np.ndarray,
        stream: int = 0,
        *,
        direction: int = D2H,
        sm_budget: int = 0,
        ring_bytes: int = 0,
        plans_only: bool = False,
    ) -> tuple[Issued, int, int]:
        """What was issued, the chunks and the ring's bytes."""
        rows = _int64([move.row(address(src), address(dst)) for move in moves])
        segments = _int64(segments_of(pairs))
        options = _int64([direction, sm_budget, ring_bytes, int(plans_only)])
        out = np.zeros(5, np.int64)
        status = self.drive.drive_staged(
            *_sized(rows), *_sized(segments), _data(options), ctypes.c_void_p(stream), _data(out),
        )  # fmt: skip
        self._checked(status)
        return Issued(*out[:3].tolist()), int(out[3]), int(out[4])

    def take_fault(self, device: int = 0) -> tuple[int, int, int] | None:
        """Count, first row and op."""
        out = np.zeros(4, np.int64)
        self._checked(self.drive.drive_take_fault(device, _data(out)))
        return tuple(out[1:].tolist()) if out[0] else None

    def limits(self, device: int) -> list[int]:
        """Of a device, once: SMs, capability, the code's, shared bytes, if it reads pageable, and by page tables."""
        out = np.zeros(6, np.int64)
        self._checked(self.drive.drive_limits(device, _data(out)))
        return out.tolist()

    def is_capturing(self, stream: int) -> bool:
        out = np.zeros(1, np.int64)
        self._checked(self.drive.drive_is_capturing(ctypes.c_void_p(stream), _data(out)))
        return bool(out[0])

    def find(self, addresses: Sequence[int], has_context: bool = True) -> list[dict[str, int]]:
        numbers = _int64(addresses)
        out = np.zeros((len(addresses), 6), np.int64)
        count = ctypes.c_int64(len(addresses))
        self._checked(self.drive.drive_find(_data(numbers), count, int(has_context), _data(out)))
        keys = ("memory", "begin", "end", "device", "mapped", "device_offset")
        return [dict(zip(keys, row, strict=True)) for row in out.tolist()]

    def divide(self, n: int, divisor: int, wide: bool) -> int:
        return self.drive.drive_divide(ctypes.c_int64(n), ctypes.c_int64(divisor), int(wide))


def address(buffer: np.ndarray) -> int:
    return buffer.ctypes.data


def _int64(numbers: Any) -> np.ndarray:
    return np.ascontiguousarray(numbers, dtype=np.int64)


def _data(numbers: np.ndarray) -> ctypes.c_void_p:
    return numbers.ctypes.data_as(ctypes.c_void_p)


def _sized(numbers: np.ndarray) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _data(numbers), ctypes.c_int64(len(numbers))


def ids_in_column(sim: Sim, ids: Sequence[int], width: int = 8, stride_bytes: int = 8) -> IdColumn:
    """A column of ids in device memory at any stride, with garbage between."""
    buffer = sim.memory(DEVICE, max(1, len(ids) * stride_bytes))
    for row, id_ in enumerate(ids):
        number = int(id_).to_bytes(width, "little", signed=True)
        buffer[row * stride_bytes : row * stride_bytes + width] = np.frombuffer(number, np.uint8)
    return IdColumn(address(buffer), stride_bytes, width)
