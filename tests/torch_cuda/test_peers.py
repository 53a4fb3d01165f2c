"""From one device to another: who carries it out, in which order with both devices' streams, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import IDS_AT, assert_issued
from torch_cuda.calls import BULK, OPS, issued, make, on, pageable, pinned

import kvkernels

pytestmark = pytest.mark.cuda(devices=2)

WAYS = [(0, 1), (1, 0)]
PAGE_BYTES = 1024
SEEDS = range(1, 101)
OLD, NEW = 3, 250


def _needs_access(way) -> None:
    if not torch.cuda.can_device_access_peer(*way):
        pytest.skip("the device cannot access the other's memory")


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]} to {way[1]}")
def way(request) -> tuple[int, int]:
    _needs_access(request.param)
    return request.param


@pytest.mark.parametrize("executor", ["auto", "kernel", BULK, "dma"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "concat"])  # its fragments are too short for bulk
def test_every_op_and_executor(sim, op, executor, way):
    """On the source's device and its current stream, which is put back, as is the current device."""
    src, dst = way
    call, wanted = make(op, on(src), on(dst), PAGE_BYTES), make(op, pageable, pageable, PAGE_BYTES)
    wanted.run()
    streams = torch.cuda.Stream(src), torch.cuda.Stream(dst)
    for stream in streams:
        torch.cuda.set_stream(stream)
    torch.cuda.set_device(0)
    options = {} if executor == "auto" else {"executor": executor}
    explained = kvkernels.explain(call.op, *call.arguments, **options)
    assert explained.executor == ("kernel" if executor == "auto" else executor)
    assert (explained.direction, explained.device["index"], explained.device["peer"]) == ("d2d", src, dst)
    call.run(**options)  # the first may enable access
    torch.cuda.synchronize(dst)
    kvkernels.reset_counters()
    if sim is not None:
        sim.clear_log()
    call.run(**options)
    if sim is not None:
        assert {(e["device"], e["stream"]) for e in issued(sim)} == {(src, streams[0].cuda_stream)}
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(dst)
    assert_issued(explained)
    assert call.bytes() == wanted.bytes()


def _in_order(stand_in, executor, seed: int, forgotten: int = 0) -> bool:
    """Writes and reads of both devices round a copy, each in its device's stream: whether all saw what they must."""
    streams = torch.cuda.Stream(0), torch.cuda.Stream(1)
    new, old, before, after = (
        pinned(torch.full((64, PAGE_BYTES), value, dtype=torch.uint8)) for value in (NEW, OLD, 0, 0)
    )
    src, dst = (on(device)(torch.zeros(64, PAGE_BYTES, dtype=torch.uint8)) for device in (0, 1))
    pairs = torch.arange(64)[:, None].expand(64, 2)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    stand_in.adversarial(seed)
    with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
        dst.copy_(old, non_blocking=True)
        before.copy_(dst, non_blocking=True)
        with torch.cuda.device(0):
            src.copy_(new, non_blocking=True)
        if forgotten:
            stand_in.set("forgotten_wait", stand_in.calls("cudaStreamWaitEvent") + forgotten)
        kvkernels.swap_blocks(src, dst, PAGE_BYTES, pairs, executor=executor)
        stand_in.set("forgotten_wait", 0)
        after.copy_(dst, non_blocking=True)
        with torch.cuda.device(0):
            src.copy_(old, non_blocking=True)
    for device in (seed % 2, 1 - seed % 2):  # the other may be as late as it likes meanwhile
        torch.cuda.synchronize(device)
    return bool((before == OLD).all() and (after == NEW).all() and (dst.cpu() == NEW).all())


@pytest.mark.parametrize("executor", ["kernel", "dma"])
def test_the_order_of_both_devices_streams(stand_in, executor):
    _in_order(stand_in, executor, 0)  # enables access
    assert all(_in_order(stand_in, executor, seed) for seed in SEEDS)
    for forgotten in (1, 2):
        assert not all(_in_order(stand_in, executor, seed, forgotten) for seed in SEEDS), "a wait that is not needed"


@pytest.mark.parametrize("op", IDS_AT)
def test_ids_are_on_the_device_that_is_copied_from(sim, op, way):
    src, dst = way
    call, wanted = make(op, on(src), on(dst)), make(op, pageable, pageable)
    wanted.run()
    at, arguments = IDS_AT[op], list(call.arguments)
    ids = arguments[at]
    arguments[at] = ids.to(f"cuda:{dst}")
    name = "mapping" if op == "copy_pages" else "block_ids"
    text = rf"^{op}: {name} must be on the cpu or on the source's cuda device, got cuda:{dst}$"
    for run in (getattr(kvkernels, op), lambda *a: kvkernels.explain(op, *a)):
        with pytest.raises(ValueError, match=text):
            run(*arguments)
    arguments[at] = ids.to(f"cuda:{src}")
    getattr(kvkernels, op)(*arguments)
    torch.cuda.synchronize(dst)
    assert call.bytes() == wanted.bytes()
    arguments[at] = torch.full_like(ids, 9).to(f"cuda:{src}")
    getattr(kvkernels, op)(*arguments)
    kvkernels.check_device(dst)
    with pytest.raises(IndexError, match=rf"^{op}: 2 pairs had ids out of range on cuda:{src}"):
        kvkernels.check_device(src)


def test_one_side_is_on_one_device(sim):
    pools = [on(device)(torch.zeros(4, 8, dtype=torch.uint8)) for device in (0, 1)]
    out = on(0)(torch.zeros(1, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^gather_blocks: tensors must be on one cuda device, got cuda:0 and cuda:1$"):
        kvkernels.gather_blocks(pools, torch.tensor([1]), out)
    addresses = torch.tensor([pool.data_ptr() for pool in pools])
    sizes = torch.tensor([8, 8])
    message = r"^swap_blocks_batch: tensors must be on one cuda device, got cuda:[01] and cuda:[01]$"
    with pytest.raises(ValueError, match=message):
        kvkernels.swap_blocks_batch(addresses, torch.tensor([out.data_ptr(), out.data_ptr() + 8]), sizes)
    host = pinned(torch.zeros(8, dtype=torch.uint8))
    sources = torch.tensor([pools[0].data_ptr(), host.data_ptr()])
    with pytest.raises(ValueError, match=message):
        kvkernels.swap_blocks_batch(sources, torch.tensor([pools[1].data_ptr(), pools[1].data_ptr() + 8]), sizes)


@pytest.mark.parametrize(
    ("executor", "why"),
    [
        ("staged", "no side is in host memory"),
        ("triton", "its tensors are on two devices"),
        ("cpu", "a tensor is on a cuda device"),
    ],
)
def test_executors_that_do_not_serve_two_devices(sim, executor, why, way):
    call = make("gather_blocks", *(on(device) for device in way))
    with pytest.raises(ValueError, match=rf"^gather_blocks: executor '{executor}' cannot serve this call: {why}$"):
        call.run(executor=executor)


def test_a_graph_of_both_streams(sim):
    _needs_access((0, 1))
    streams = torch.cuda.Stream(0), torch.cuda.Stream(1)
    call, wanted = make("swap_blocks", on(0), on(1)), make("swap_blocks", pageable, pageable)
    before = call.bytes()
    wanted.run()
    make("swap_blocks", on(0), on(1)).run()  # enables access
    torch.cuda.synchronize(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(streams[1]), torch.cuda.graph(graph, stream=streams[0]):
        text = (
            r"^swap_blocks: the current streams of cuda:0 and cuda:1 must both be captured or neither, got one that is$"
        )
        with pytest.raises(RuntimeError, match=text):
            call.run()
        streams[1].wait_stream(streams[0])
        call.run()
        streams[0].wait_stream(streams[1])
    assert call.bytes() == before
    graph.replay()
    torch.cuda.synchronize(0)
    assert call.bytes() == wanted.bytes()


SCRIPT = """
import json, os, sys
sys.path.append({tests!r})
import torch, kvkernels
from simgpu.sim import Sim
from torch_cuda.calls import OPS, make, on
sim = Sim.of(os.environ["KVKERNELS_STAND_IN"])
for name, value in {settings!r}.items():
    sim.set(name, value)


def told(run):
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__ + ": " + str(error)
    return ""


{body}
print(json.dumps(found))
"""


def answer(body: str, **settings: int) -> Any:
    """What the body sets ``found`` to, in a process whose devices have not met."""
    script = SCRIPT.format(tests=str(Path(__file__).resolve().parents[1]), settings=settings, body=body)
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_devices_that_cannot_access_each_other(stand_in):
    found = answer(
        """
found = []
for op in OPS:
    call = make(op, on(1), on(0))
    before = call.bytes()
    found.append([call.op, told(call.run), told(lambda: kvkernels.explain(call.op, *call.arguments))])
    assert call.bytes() == before
""",
        no_peer_access=1,
    )
    for op, *messages in found:
        assert messages == 2 * [
            f"ValueError: {op}: tensors must be on one cuda device, or on two of which the source's can access the "
            "other, got cuda:1 and cuda:0: cuda:1 cannot access the memory of cuda:0"
        ]


def test_access_is_enabled_once_and_not_for_an_explanation_or_in_a_capture(stand_in):
    explained, captured, first, second = answer("""
call = make("swap_blocks", on(0), on(1))
enabled = lambda: sim.calls("cudaDeviceEnablePeerAccess")
kvkernels.explain(call.op, *call.arguments)
explained = enabled()
streams = torch.cuda.Stream(0), torch.cuda.Stream(1)
with torch.cuda.stream(streams[1]), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=streams[0]):
    streams[1].wait_stream(streams[0])
    captured = told(call.run)
    streams[0].wait_stream(streams[1])
call.run()
first = enabled()
call.run()
found = [explained, captured, first, enabled()]
""")
    assert (explained, first, second) == (0, 1, 1)
    assert captured == (
        "RuntimeError: swap_blocks: cuda:0 and cuda:1 must have met in a call before one that is captured, "
        "got their first"
    )
