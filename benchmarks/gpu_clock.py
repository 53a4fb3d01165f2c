"""How long a call keeps the device busy, and how long it keeps its caller.

Two passes over the same calls. In the first the device is idle: the host's clock says when the call returned
(``host_us``) and when its bytes had arrived (``elapsed_us``). In the second a kernel that only spins is put on the
stream before the first event, for longer than the call takes its caller; so the time between the events
(``device_us``) is the device's alone, whatever the host needed to hand the work out.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

Call = Callable[[], Any]

SPIN_SHARE = 1.5
SPIN_ABOVE_US = 30.0
# A stream's queue has some thousand places. A call that fills it waits for the spin, and a longer spin hides no more.
MOST_SPIN_US = 60_000.0
CALIBRATION_CYCLES = 2_000_000


@dataclass(frozen=True)
class Effort:
    """Repetitions: as many as fit into ``seconds``, within these bounds."""

    least: int = 3
    most: int = 15
    seconds: float = 0.12

    def for_bytes(self, payload_bytes: int) -> "Effort":
        """Fewer for larger calls, whose times vary less: 3 from 350 MiB on."""
        most = max(self.least, min(self.most, (1 << 30) // max(payload_bytes, 1)))
        return Effort(self.least, most, self.seconds)


@dataclass(frozen=True)
class Samples:
    device_us: list[float]
    host_us: list[float]
    elapsed_us: list[float]
    spin_us: float
    hidden: bool  # whether every call returned while the spin was still running

    def as_json(self) -> dict[str, Any]:
        rounded = {
            name: [round(us, 3) for us in getattr(self, name)] for name in ("device_us", "host_us", "elapsed_us")
        }
        return {**rounded, "spin_us": round(self.spin_us, 1), "hidden": self.hidden}


class Clock:
    """Times on the current stream. ``why_no_spin`` says why this machine cannot hide the host's time, or is empty."""

    def __init__(self, why_no_spin: str) -> None:
        self.why_no_spin = why_no_spin
        self._cycles_per_us = 0.0

    def warm(self, seconds: float, busy: Call) -> None:
        """Keeps the device busy until its clocks are up, then learns how fast the spinning kernel counts."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            busy()
            torch.cuda.current_stream().synchronize()
        if not self.why_no_spin:
            spans = [_between_events(lambda: torch.cuda._sleep(CALIBRATION_CYCLES))[0] for _ in range(3)]
            self._cycles_per_us = CALIBRATION_CYCLES / statistics.median(spans)

    def spin(self, microseconds: float) -> None:
        if self._cycles_per_us:
            torch.cuda._sleep(int(microseconds * self._cycles_per_us))

    def measure(self, calls: Sequence[Call], effort: Effort, waits: bool = False) -> Samples:
        """Times ``calls`` in turns. A call that ``waits`` for the device itself gets no spin: it would count as its."""
        turns = cycle(calls)
        with _no_collection():
            rounds = Effort(2, max(2, effort.most // 2), effort.seconds / 2)
            idle = [_idle_us(call) for call in _rounds(turns, rounds)]
            host_us = [host for host, _ in idle]
            spins = self._cycles_per_us > 0 and not waits
            spin_us = min(SPIN_SHARE * max(host_us) + SPIN_ABOVE_US, MOST_SPIN_US) if spins else 0.0
            before = (lambda: self.spin(spin_us)) if spins else (lambda: None)
            busy = [_between_events(call, before) for call in _rounds(turns, effort)]
        hidden = spins and all(host < spin_us for _, host in busy)
        return Samples([device for device, _ in busy], host_us, [elapsed for _, elapsed in idle], spin_us, hidden)


def _rounds(turns: Iterator[Call], effort: Effort) -> Iterator[Call]:
    started = time.perf_counter()
    for done, call in enumerate(islice(turns, effort.most)):
        if done >= effort.least and time.perf_counter() - started > effort.seconds:
            return
        yield call


def _idle_us(call: Call) -> tuple[float, float]:
    """Until the call returns, and until its work is done, from an idle device on."""
    stream = torch.cuda.current_stream()
    stream.synchronize()
    started = time.perf_counter_ns()
    call()
    returned = time.perf_counter_ns()
    stream.synchronize()
    return (returned - started) / 1e3, (time.perf_counter_ns() - started) / 1e3


def _between_events(call: Call, before: Call = lambda: None) -> tuple[float, float]:
    """By the device's clock, from the point in the stream before the call to the one after; and the host's time."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before()
    first.record()
    started = time.perf_counter_ns()
    call()
    host_us = (time.perf_counter_ns() - started) / 1e3
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3, host_us


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
