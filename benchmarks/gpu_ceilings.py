"""The limits that every figure is a share of, measured in the same run: one long copy a way, and both ways at once.

On the device the limit is the better of a memcpy and an addition, which is a kernel that reads and writes vectors; a
copy of n bytes moves n bytes of payload and 2 n through the device's memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_bench import Bench, Step
from gpu_clock import Effort
from gpu_log import Record

CEILING_BYTES = 256 << 20
DEVICE_BYTES = 512 << 20  # as many as part d2d copies
EFFORT = Effort(least=5, most=15, seconds=0.25)


def steps(bench: Bench, when: str) -> Iterator[Step]:
    """``when`` tells the run's first measurement from its last: what lies between is the machine's drift."""
    half = len(bench.near) // 2
    nbytes = min(bench.scaled(CEILING_BYTES, 1 << 20), half)
    device_bytes = min(bench.scaled(DEVICE_BYTES, 1 << 20), half) // 8 * 8
    host, near = bench.host[:nbytes], bench.near[:nbytes]
    other_host, other_near = bench.host[nbytes : 2 * nbytes], bench.near[nbytes : 2 * nbytes]
    bench.checker.forget(bench.host)
    bench.checker.forget(bench.near)
    from_here, to_here = bench.near[:device_bytes], bench.near[half : half + device_bytes]
    words, other_words = from_here.view(torch.int64), to_here.view(torch.int64)

    def step(direction: str, name: str, payload_bytes: int, call: Callable[[], Any], kernels: bool = False) -> Step:
        def run(key: Record) -> None:
            samples = bench.clock.measure([call], EFFORT)
            bench.log.write({**key, "status": "measured", "bytes": payload_bytes, **samples.as_json()})

        return Step({"direction": direction, "name": name, "when": when}, run, needs_torch_kernels=kernels)

    yield step("h2d", "memcpy", nbytes, lambda: near.copy_(host, non_blocking=True))
    yield step("d2h", "memcpy", nbytes, lambda: host.copy_(near, non_blocking=True))
    yield step("both", "memcpy each way", 2 * nbytes, both_ways(near, host, other_host, other_near))
    yield step("d2d", "memcpy", device_bytes, lambda: to_here.copy_(from_here, non_blocking=True))
    yield step("d2d", "add", device_bytes, lambda: torch.add(words, 1, out=other_words), kernels=True)


def both_ways(
    near: torch.Tensor, host: torch.Tensor, other_host: torch.Tensor, other_near: torch.Tensor
) -> Callable[[], None]:
    """A copy each way on a stream each, between two points of the current stream."""
    there, back = torch.cuda.Stream(), torch.cuda.Stream()

    def run() -> None:
        current = torch.cuda.current_stream()
        for stream in (there, back):
            stream.wait_stream(current)
        with torch.cuda.stream(there):
            near.copy_(host, non_blocking=True)
        with torch.cuda.stream(back):
            other_host.copy_(other_near, non_blocking=True)
        for stream in (there, back):
            current.wait_stream(stream)

    return run
