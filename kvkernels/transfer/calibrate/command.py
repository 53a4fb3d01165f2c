"""``python -m kvkernels tune``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from kvkernels import policy
from kvkernels.policy import cpu
from kvkernels.registration import LIBRARY
from kvkernels.transfer.calibrate import device, host
from kvkernels.transfer.calibrate.settle import RUNS, Settled
from kvkernels.version import __version__

SECONDS = 60.0
_STREAM_BYTES = "KVKERNELS_STREAM_BYTES"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--seconds", type=float, default=SECONDS, help="about how long to measure (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="measure, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the file's content instead of words")


def run(
    options: argparse.Namespace, *, host_timer: host.Timer | None = None, device_timer: device.Timer | None = None
) -> int:
    """Measure, write the file, and return the exit status; the timers are this machine's by default."""
    path = _target()
    why = _refusal(options.seconds, path)
    if why or path is None:
        print(f"kvkernels tune: {why}", file=sys.stderr)
        return 1
    lines: list[str] = []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"kvkernels tune: the machine is busy (load {load:.1f}, {cores} cores): measure again", file=sys.stderr)

    def told(settled: Settled) -> None:
        lines.append(settled.in_words())
        if sys.stderr.isatty():
            print(lines[-1], file=sys.stderr, flush=True)

    table = measure(options.seconds, told, host_timer, device_timer)
    if not options.dry_run:
        try:
            policy.write(path, table)
        except OSError as error:
            print(f"kvkernels tune: {path} must be writable, got {error}", file=sys.stderr)
            return 1
    if options.json:
        print(policy.text_of(table))
        return 0
    if not sys.stderr.isatty():
        print("\n".join(lines))
    print("nothing was written" if options.dry_run else f"written to {path}, for processes that start from now on")
    return 0


def measure(
    seconds: float, told: Callable[[Settled], None], host_timer: host.Timer | None = None,
    device_timer: device.Timer | None = None, clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:  # fmt: skip
    """A table for this machine, as ``kvkernels.policy.write`` takes it.

    Parameters
    ----------
    seconds : float
        For all of it; each setting has an equal part of what the ones before it left.
    told : callable
        Is given each setting once it is settled.
    host_timer, device_timer : callable, optional
        Seconds of a case and of a cell; by default they are timed here, those of a GPU where there is one.
    clock : callable
        Seconds, by which time is up.
    """
    settings: dict[str, Any] = {}
    until = clock() + seconds

    def keep(settled: Settled) -> None:
        settings[settled.name] = {"value": settled.value, "stable": settled.is_stable, "answers": settled.answers}
        told(settled)

    def shares() -> Callable[[int], bool]:
        ends: dict[int, float] = {}

        def has_time(left: int) -> bool:
            now = clock()
            return now < ends.setdefault(left, now + (until - now) / left)

        return has_time

    has_gpu = device_timer is not None or torch.cuda.is_available()
    if has_gpu:
        until = clock() + seconds / 2
    with host.as_compiled_in() as threads:
        timer = host_timer or host.HostTimer()
        numbers = host.tune_host(timer, cpu.in_force(), threads, shares(), keep)
    table: dict[str, Any] = {"cpu": numbers}
    if has_gpu:
        until = clock() + seconds / 2
        timed = device_timer or device.DeviceTimer()
        copies = timed.copies() if isinstance(timed, device.DeviceTimer) else "batched"
        table["rows"] = device.tune_device(timed, copies, policy.default()["rows"], shares(), keep)
    measured = {
        "at": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "by": f"python -m kvkernels tune, kvkernels {__version__}, torch {torch.__version__}",
        "how": f"a value counts where {RUNS} runs one after the other agree; lower quartiles of turns",
        "seconds": seconds,
        "load": round(os.getloadavg()[0], 2),
        "settings": settings,
    }
    return {"format": 1, "machine": policy.machine(), "measured": measured, **table}


def _target() -> Path | None:
    named = os.environ.get(policy.VARIABLE)
    return Path(named) if named and named != policy.DEFAULT else policy.cache_path()


def _refusal(seconds: float, path: Path | None) -> str:
    if not LIBRARY.compiled:
        return f"the compiled library must be there, got the reference: {LIBRARY.why}"
    if not 0 < seconds < 86_400:
        return f"--seconds must be from 0 to 86400, got {seconds}"
    if _STREAM_BYTES in os.environ:
        return f"{_STREAM_BYTES} must not be set, since it replaces what is measured, got {os.environ[_STREAM_BYTES]!r}"
    if path is None:
        return f"a folder to write to must be named by {policy.VARIABLE} or XDG_CACHE_HOME, got no home"
    return ""
