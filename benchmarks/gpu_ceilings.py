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
EFFORT = Effort(least=5, most=15, seconds=0.25)


def steps(bench: Bench, when: str) -> Iterator[Step]:
    """``when`` tells the run's first measurement from its last: what lies between is the machine's drift."""
    nbytes = min(bench.scaled(CEILING_BYTES, 1 << 20), len(bench.host) // 2, len(bench.near) // 2) // 8 * 8
    host, near = bench.host[:nbytes], bench.near[:nbytes]
    other_host, other_near = bench.host[nbytes : 2 * nbytes], bench.near[nbytes : 2 * nbytes]
    bench.checker.forget(bench.host)
    bench.checker.forget(bench.near)
    far = torch.empty_like(bench.near[:nbytes])
    words, far_words = near.view(torch.int64), far.view(torch.int64)

    def step(direction: str, name: str, payload_bytes: int, call: Callable[[], Any], kernels: bool = False) -> Step:
        def run(key: Record) -> None:
            samples = bench.clock.measure([call], EFFORT)
            bench.log.write({**key, "status": "measured", "bytes": payload_bytes, **samples.as_json()})

        return Step({"direction": direction, "name": name, "when": when}, run, needs_torch_kernels=kernels)

    yield step("h2d", "memcpy", nbytes, lambda: near.copy_(host, non_blocking=True))
    yield step("d2h", "memcpy", nbytes, lambda: host.copy_(near, non_blocking=True))
    yield step("both", "memcpy each way", 2 * nbytes, both_ways(near, host, other_host, other_near))
    yield step("d2d", "memcpy", nbytes, lambda: far.copy_(near, non_blocking=True))
    yield step("d2d", "add", nbytes, lambda: torch.add(words, 1, out=far_words), kernels=True)


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
