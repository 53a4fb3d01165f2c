"""What every part of a GPU run works with: the device's stream, clock and memory, and the log that cells go into."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import kvkernels
from gpu_clock import Clock, Effort
from gpu_log import Log, Record
from gpu_memory import Case, Checker

ON_STAND_IN = "KVKERNELS_STAND_IN" in os.environ
NO_TORCH_KERNELS = "the stand-in for CUDA runs none of torch's own kernels"
NO_TRITON = "the stand-in for CUDA cannot launch Triton's kernels"


@dataclass(frozen=True)
class Step:
    """One cell of a part: what identifies it, and what measures it and writes lines with that key."""

    key: Record
    run: Callable[[Record], Any]
    needs_torch_kernels: bool = False


class CannotRun(Exception):
    """This machine, or what is installed on it, cannot run a cell; the text says why."""


class DeviceLost(Exception):
    """The device answers nothing any more, after an error that a cell met."""


@dataclass
class Bench:
    """The state of a run. ``near`` is the device's large stretch of memory, ``host`` the pinned one."""

    device: torch.device
    clock: Clock
    log: Log
    options: Any
    checker: Checker = field(init=False)
    host: torch.Tensor = field(init=False)
    near: torch.Tensor = field(init=False)
    until: float = float("inf")

    def scaled(self, count: int, least: int = 1) -> int:
        """A count or a number of bytes, as far as --scale says."""
        return max(least, round(count * self.options.scale))

    def sides(self, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The source and the destination of a copy over the link."""
        return (self.host, self.near) if direction == "h2d" else (self.near, self.host)

    def require(self, span_bytes: int, *flats: torch.Tensor) -> None:
        """Raises CannotRun where a stretch of memory, of the two large ones by default, is too short for a cell."""
        there = min(map(len, flats or (self.host, self.near)))
        if span_bytes > there:
            raise CannotRun(f"it needs {span_bytes} bytes on each side, and this run has {there}")

    def effort(self, payload_bytes: int) -> Effort:
        return Effort(seconds=0.12 * min(1.0, max(self.options.scale, 0.01))).for_bytes(payload_bytes)

    def seconds_left(self) -> float:
        return self.until - time.perf_counter()

    def run(self, part: str, steps: Iterator[Step]) -> None:
        """Runs the steps of a part in order; those that time is too short for are listed in one line."""
        dropped = []
        for step in self._made(part, steps):
            if self.seconds_left() <= 0:
                dropped.append(step.key)
                continue
            key = {"part": part, **step.key}
            if step.needs_torch_kernels and ON_STAND_IN:
                self.log.write({**key, "status": "not run", "error": NO_TORCH_KERNELS})
                continue
            with self._recording(key):
                step.run(key)
        if dropped:
            self.log.write({"part": part, "status": "dropped", "cells": dropped, "error": "there was no time left"})

    def _made(self, part: str, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of a part; one that cannot be made ends the part, and not the run."""
        with self._recording({"part": part}):
            yield from steps

    def measure(self, key: Record, case: Case, effort: Effort | None = None) -> Record:
        """Checks a case's bytes, times it, and writes its line, which is returned."""
        record = {**key, "bytes": case.bytes, "calls": len(case.calls), **case.facts}
        try:
            if case.explain is not None:
                record["explained"] = explained(case.explain())
        except (ValueError, IndexError) as refusal:
            return self._write({**record, "status": "refused", "error": str(refusal)})
        if ON_STAND_IN and record.get("explained", {}).get("executor") == "triton":
            return self._write({**record, "status": "not run", "error": NO_TRITON})
        kvkernels.reset_counters()
        wrong = self.checker.check(case)
        if case.explain is not None:
            record["issued"] = {
                name: issued["calls"] for name, issued in kvkernels.counters().items() if issued["calls"]
            }
        if wrong:
            return self._write({**record, "status": "wrong bytes", "checked": True, "error": wrong})
        if case.explain is not None and record["explained"]["executor"] not in record["issued"]:
            raise RuntimeError(f"{record['explained']['executor']} was explained, and {record['issued']} ran")
        samples = self.clock.measure(case.calls, effort or self.effort(case.bytes), case.waits)
        return self._write({**record, "status": "measured", "checked": True, **samples.as_json()})

    def _write(self, record: Record) -> Record:
        self.log.write(record)
        return record

    @contextmanager
    def _recording(self, key: Record) -> Iterator[None]:
        """An error becomes the cell's line, and the run goes on, unless the device is lost with it."""
        try:
            yield
        except CannotRun as reason:
            self.log.write({**key, "status": "not run", "error": str(reason)})
        except Exception as error:
            self.log.write({**key, "status": "failed", "error": f"{type(error).__name__}: {error}"})
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(str(lost)) from error


def explained(explanation: Any) -> Record:
    """What ``kvkernels.explain`` said, without what the cell's key says already."""
    described = {**asdict(explanation), "device": dict(explanation.device)}
    for known in ("op", "direction", "bytes", "lanes", "streaming"):
        described.pop(known)
    return described
