#!/usr/bin/env python3
"""Asks a GPU everything that this library's figures and policies depend on, and writes it down as it goes.

Every cell is one kind of call: its bytes are checked first, guard bytes and blocks that no id names included; then it
is timed by the device's clock and by the host's, on a stream of its own, from pages that lie in random order over more
than the device's L2. The output is a file of JSON lines with raw samples (gpu_log.py describes it); gpu_report.py makes
the tables and the charts from it, without a GPU. GB/s is 1e9 bytes of payload a second.

The parts, in this order: ceilings (always), grid, auto, budget, d2d, calls, host-memory, rivals, beside. The run ends
by its own clock: what time is too short for is left out at the end, and listed. The exit status is 1 if a byte was
wrong or a cell raised.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import gpu_attributes
import gpu_beside
import gpu_calls
import gpu_ceilings
import gpu_d2d
import gpu_grid
import gpu_host_memory
import gpu_report
import gpu_rivals
from gpu_bench import NO_TORCH_KERNELS, ON_STAND_IN, Bench, DeviceLost, Step
from gpu_clock import Clock
from gpu_log import Log
from gpu_memory import Checker

Part = Callable[[Bench], Iterator[Step]]
PARTS: dict[str, Part] = {
    "grid": gpu_grid.steps,
    "auto": gpu_grid.auto_steps,
    "budget": gpu_grid.budget_steps,
    "d2d": gpu_d2d.steps,
    "calls": gpu_calls.steps,
    "host-memory": gpu_host_memory.steps,
    "rivals": gpu_rivals.steps,
    "beside": gpu_beside.steps,
}
WARM_SECONDS = 0.2
# Of the run's time, kept for measuring the ceilings once more.
LAST_SHARE = 0.01
# The near side, the check's truth and its expectation; what is left is for torch, Triton and the parts' own buffers.
# Of the host's memory less, since torch rounds a pinned allocation up to a power of two.
DEVICE_STRETCHES = 3
DEVICE_SHARE, HOST_SHARE = 0.8, 0.4
LEAST_BYTES = 1280 << 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), metavar="FILE", help="appended to (gpu.jsonl)")
    parser.add_argument("--parts", type=listed(PARTS), default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=270.0, help="when the run ends by itself (270)")
    parser.add_argument("--scale", type=float, default=1.0, help="of counts, bytes and time; 0.001 is a dry run (1.0)")
    parser.add_argument("--stream", choices=("side", "default"), default="side")
    parser.add_argument("--directions", type=listed(gpu_grid.DIRECTIONS), default=list(gpu_grid.DIRECTIONS))
    parser.add_argument("--executors", type=listed(gpu_grid.EXECUTORS), default=list(gpu_grid.EXECUTORS))
    parser.add_argument("--fragments", type=numbers, default=list(gpu_grid.FRAGMENTS), metavar="BYTES,...")
    parser.add_argument("--counts", type=numbers, default=list(gpu_grid.COUNTS), metavar="N,...")
    parser.add_argument("--lmcache", type=Path, metavar="DIR", help="an unpacked wheel of LMCache 0.5.3")
    parser.add_argument("--sglang", type=Path, metavar="FILE", help="common_ops.abi3.so of sglang-kernel 0.4.3")
    options = parser.parse_args(arguments)
    if not 0 < options.scale <= 1:
        parser.error(f"--scale must be above 0 and at most 1, got {options.scale}")
    if any(fragment % 16 for fragment in options.fragments):
        parser.error(f"--fragments must be multiples of 16 bytes, got {options.fragments}")
    if not torch.cuda.is_available():
        parser.exit(2, f"benchmarks/gpu.py needs a CUDA device, and torch {torch.__version__} sees none\n")
    return options


def listed(known: Sequence[str] | dict[str, Part]) -> Callable[[str], list[str]]:
    """Names separated by commas, in the order in which they are known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"must be among {','.join(known)}, got {','.join(unknown)}")
        return [name for name in known if name in names]

    return read


def numbers(text: str) -> list[int]:
    """Positive numbers separated by commas."""
    values = [int(number) for number in text.split(",")]
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return values


def stretch_bytes(bench_span: int, scale: float) -> int:
    """The bytes of each large stretch of memory: what the cells need, or what this machine has."""
    free_on_device, _ = torch.cuda.mem_get_info()
    on_host = gpu_attributes.host_memory_bytes("MemAvailable")
    most = min(int(free_on_device * DEVICE_SHARE) // DEVICE_STRETCHES, int(on_host * HOST_SHARE))
    if ON_STAND_IN:
        most = int(on_host * HOST_SHARE) // (DEVICE_STRETCHES + 1)  # its device's memory is the host's
    least = max(24 << 20, int(LEAST_BYTES * scale))
    return min(max(bench_span, least), most) // 4096 * 4096


def start(options: argparse.Namespace, log: Log) -> Bench:
    """Describes the machine, allocates the memory and warms the clocks. The bench's stream is current already."""
    device = torch.device("cuda", torch.cuda.current_device())
    log.write(
        {
            "part": "machine",
            "status": "described",
            **gpu_attributes.describe(device),
            "stand_in": ON_STAND_IN,
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        }
    )
    bench = Bench(device, Clock(NO_TORCH_KERNELS if ON_STAND_IN else ""), log, options)
    nbytes = stretch_bytes(gpu_grid.largest_span(bench), options.scale)
    print(f"4 stretches of {nbytes / 1e9:.2f} GB, one of them pinned host memory", flush=True)
    bench.near = torch.empty(nbytes, dtype=torch.uint8, device=device)
    bench.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    bench.checker = Checker(nbytes, torch.device("cpu") if ON_STAND_IN else device)
    half = nbytes // 2
    bench.clock.warm(WARM_SECONDS * options.scale, lambda: bench.near[:half].copy_(bench.near[half : 2 * half]))
    return bench


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    log = Log(options.out)
    stream = torch.cuda.Stream() if options.stream == "side" else torch.cuda.default_stream()
    lost = ""
    with torch.cuda.stream(stream):
        bench = start(options, log)
        bench.until = started + options.seconds - LAST_SHARE * options.seconds
        try:
            bench.run("ceilings", gpu_ceilings.steps(bench, "first"))
            for name in options.parts:
                part_started = time.perf_counter()
                bench.run(name, PARTS[name](bench))
                print(f"{name}: {time.perf_counter() - part_started:.1f} s", flush=True)
            bench.until = started + options.seconds
            bench.run("ceilings", gpu_ceilings.steps(bench, "last"))
        except DeviceLost as error:
            lost = str(error)
    log.write(
        {"part": "end", "status": "lost" if lost else "ended", "error": lost, "seconds": time.perf_counter() - started}
    )
    log.close()
    if lost:
        print(f"The device was lost, and the run with it: {lost}", file=sys.stderr)
    return 1 if log.bad or lost else 0


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    status = run(options)
    print(gpu_report.closing([options.out]))
    sys.exit(status)


if __name__ == "__main__":
    main()
