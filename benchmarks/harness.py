"""Buffers, interleaved timing and the ceiling: what swap.py and pages.py share.

A figure in GB/s is payload: copying n bytes in t seconds is n / t / 1e9, however often memory is touched for it.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    from kvkernels import _host
except ImportError as error:
    raise SystemExit(
        f"The benchmarks need the compiled library, and it is not there ({error}). "
        "Build it with `make build`, or see `python -m kvkernels info`."
    ) from error

CEILING_LOOPS = ("one stream", "two pages", "two halves")


class HostMemory:
    """Uninitialised bytes on the host, on huge pages where the system gives them."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = _host.huge_pages(nbytes)
        self.flat = torch.frombuffer(self._buffer, dtype=torch.uint8)[:nbytes]

    def huge_page_share(self) -> float:
        """The part of the touched memory that the system put on huge pages."""
        return min(1.0, _host.huge_page_bytes(self._buffer) / self.flat.numel())


class PlainMemory:
    """Uninitialised bytes that torch allocates: pinned host memory or a device's."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        host = device.type == "cpu"
        self.flat = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=host)

    def huge_page_share(self) -> None:
        return None


def fill_random(flat: torch.Tensor, seed: int) -> None:
    """Random bytes, so that no two pages are alike and NaN payloads occur."""
    generator = torch.Generator(flat.device).manual_seed(seed)
    whole = flat.numel() // 8 * 8
    flat[:whole].view(torch.int64).random_(generator=generator)
    flat[whole:].random_(0, 256, generator=generator)


@dataclass
class Side:
    """One of the contestants: ``run`` moves ``bytes`` of payload."""

    name: str
    run: Callable[[], Any]
    bytes: int


@dataclass
class Times:
    """The seconds that one side took, a sample a round."""

    bytes: int
    samples_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.median_s / 1e9

    def quartiles_s(self) -> tuple[float, float]:
        if len(self.samples_s) < 2:
            return self.median_s, self.median_s
        low, _, high = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return low, high

    def as_json(self) -> dict[str, Any]:
        low, high = self.quartiles_s()
        return {
            "bytes": self.bytes,
            "rounds": len(self.samples_s),
            "median_ms": self.median_s * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "gb_per_s": self.gb_per_s,
        }


def host_seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def event_seconds(run: Callable[[], Any]) -> float:
    """Times by the device's clock, from the point in the current stream before ``run`` to the one after it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Budget:
    """How long to measure: until ``seconds`` have passed, but at least and at most so many rounds."""

    seconds: float
    min_rounds: int = 3
    max_rounds: int = 51


def measure(
    sides: Iterable[Side],
    budget: Budget,
    clock: Callable[[Callable[[], Any]], float] = host_seconds,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Times]:
    """Runs every side once a round, in an order shuffled anew each round, after one round that is not counted.

    A shared machine drifts by more than most sides differ. Sides that take turns drift together, so that the ratio of
    their medians holds where neither median does.
    """
    sides = list(sides)
    times = {side.name: Times(side.bytes) for side in sides}
    if len(times) != len(sides):
        raise ValueError(f"measure: sides must have names of their own, got {[side.name for side in sides]}")
    order = random.Random(0)
    for side in sides:
        clock(side.run)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for share in _rounds(budget):
            order.shuffle(sides)
            for side in sides:
                times[side.name].samples_s.append(clock(side.run))
            progress(share)
    finally:
        if collecting:
            gc.enable()
    return times


def _rounds(budget: Budget) -> Iterator[float]:
    """Yields once a round how much of the budget will be used when that round is over."""
    started = time.perf_counter()
    for done in range(1, budget.max_rounds + 1):
        spent = time.perf_counter() - started
        if done > budget.min_rounds and spent >= budget.seconds:
            return
        yield min(1.0, max(spent / budget.seconds if budget.seconds else 1.0, done / budget.max_rounds))


def ceiling_sides(dst: torch.Tensor, src: torch.Tensor, nbytes: int, threads: int) -> list[Side]:
    """The machine's limit for ``nbytes`` of payload: what moves them fastest as contiguous bytes.

    On the host these are three loops of streaming stores on ``threads`` threads, of which the fastest counts: which
    one it is differs between processors. With a device on either side it is one contiguous copy.
    """
    if src.is_cuda or dst.is_cuda:
        source, target = src[:nbytes], dst[:nbytes]
        return [Side("ceiling: one memcpy", lambda: target.copy_(source, non_blocking=True), nbytes)]
    return [
        Side(
            f"ceiling: {loop}",
            lambda loop=loop: _host.stream_copy(dst.data_ptr(), src.data_ptr(), nbytes, threads, loop),
            nbytes,
        )
        for loop in CEILING_LOOPS
    ]


def fastest_ceiling(times: dict[str, Times]) -> tuple[str, Times]:
    """The name and the times of the fastest of the ceiling's sides."""
    ceilings = [(name, side) for name, side in times.items() if name.startswith("ceiling: ")]
    return max(ceilings, key=lambda named: named[1].gb_per_s)
