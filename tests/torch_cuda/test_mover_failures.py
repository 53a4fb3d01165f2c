"""Calls of CUDA that fail under a mover: which transfer fails, what is left, and that the next one works."""

from __future__ import annotations

import gc
import itertools
import re
import time
from pathlib import Path

import pytest
import torch
from simgpu.sim import ILLEGAL_ADDRESS, OUT_OF_MEMORY, Sim
from torch_cuda.transfers import LONG, PAGE, device, host, is_all, is_moved, swap

from kvkernels.transfer import Mover, Transfer, TransferFailed

pytestmark = pytest.mark.cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FUNCTIONS = sorted(
    {
        name
        for folder in ("core", "cuda", "ops")
        for path in (CSRC / folder).rglob("*.*")
        for name in re.findall(r"\b(cu(?:da)?[A-Z]\w+)[(\"]", path.read_text())
    }
)
# How often the thread looks at what is on its way is a matter of time, and so is how often it makes a device current.
ASKED_AT_ANY_TIME = {"cuCtxGetCurrent", "cuCtxSetCurrent", "cudaGetDevice", "cudaThreadExchangeStreamCaptureMode",
                     "cudaEventQuery"}  # fmt: skip
MOST_TRIED = 4  # of each of those
# These fail nothing: the bytes are there, and what could not be told or given back is nobody's.
HARMLESS = {"cudaEventElapsedTime", "cudaEventDestroy", "cudaStreamDestroy"}
# As in test_every_failure.py: what only asks whether CUDA is in use, and guards' destructors, which tell nobody.
MAY_BE_HARMLESS = {"cuCtxGetCurrent", "cuCtxSetCurrent", "cudaGetDevice", "cudaThreadExchangeStreamCaptureMode"}
# Torch's guards ask, too, and have words of their own.
TORCHS_TOO = {"cudaGetDevice"}
SIDES = {"h2d": (host, device), "d2h": (device, host), "d2d": (device, device)}
CASES = [
    *itertools.product(("h2d",), ("kernel", "dma", "staged")),
    *itertools.product(("d2h",), ("dma", "staged")),
    ("d2d", "kernel"),
]


def held(sim: Sim) -> tuple[int, int, int]:
    """What would leak: memory, streams and events."""
    return torch.cuda.memory_allocated(), sim.cuda.fake_streams(), sim.cudart.fake_events()


@pytest.mark.parametrize(("direction", "executor"), CASES)
def test_every_call_at_every_k(stand_in, direction, executor):
    """Of a mover's first transfer, which makes streams, of two chunks; and of what follows it."""
    make_src, make_dst = SIDES[direction]
    src, dst, far = make_src(), make_dst(255), device()
    poison = dst.cpu()
    # What a process has only once is there, such as a ring for each of four streams.
    movers = [Mover("cuda:0", chunk_bytes=4 * PAGE) for _ in range(5)]
    for mover in movers:
        before = [stand_in.calls(function) for function in FUNCTIONS]
        assert mover.submit(swap(src, dst, executor=executor), priority="store").result(LONG).state == "done"
        made = {f: stand_in.calls(f) - count for f, count in zip(FUNCTIONS, before, strict=True)}
    for mover in movers:
        mover.close()
    del mover, movers
    gc.collect()
    leaves = held(stand_in)
    most = {f: min(count, MOST_TRIED) if f in ASKED_AT_ANY_TIME else count for f, count in made.items()}
    tried = [(f, k) for f, count in most.items() for k in range(1, count + 1)]
    assert {"cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventQuery", "cudaStreamWaitEvent",
            "cudaStreamCreateWithPriority", "cudaEventSynchronize"} <= {f for f, _ in tried}  # fmt: skip
    failed_in: dict[str, set[str]] = {"submit": set(), "transfer": set()}
    for function, k in tried:
        dst.copy_(poison)
        torch.cuda.synchronize()
        with Mover("cuda:0", chunk_bytes=4 * PAGE) as mover:
            stand_in.fail(function, k, OUT_OF_MEMORY)
            error, transfer = None, None
            try:
                transfer = mover.submit(swap(src, dst, executor=executor), priority="store")
            except RuntimeError as raised:
                error = raised
                failed_in["submit"].add(function)
            if transfer is not None:
                result = transfer.result(LONG)
                error = result.error
                if error is None:
                    assert result.state == "done" and is_moved(src, dst), (function, k)
                else:
                    failed_in["transfer"].add(function)
                    assert result.state == "failed" and isinstance(error, RuntimeError)
                    is_untouched = torch.equal(dst.cpu(), poison)
                    assert [t.data_ptr() for t in result.undefined] in ([], [dst.data_ptr()])
                    assert result.undefined or is_untouched, (function, k, error)
            else:
                assert torch.equal(dst.cpu(), poison), (function, k)
            if error is not None:
                words = (
                    rf"(swap_blocks|Mover): {function}( \(copy 0 of its batch\))? failed: cudaErrorMemoryAllocation \("
                )
                if function in TORCHS_TOO:
                    words += r"|(swap_blocks: )?(CUDA error: |aoti_torch\w+ failed in torch)"
                assert re.match(words, str(error)), (function, k, str(error))
                assert function not in HARMLESS, (function, k)
            stand_in.fail_no_more()
            assert stand_in.cudart.cudaPeekAtLastError() == 0
            del transfer, error
            after = mover.submit(swap(src, dst, executor=executor))
            assert after.result(LONG).state == "done" and is_moved(src, dst), (function, k)
            assert mover.submit(swap(dst, far)).result(LONG).state == "done"
            assert mover.stats()["queued"] == mover.stats()["running"] == 0
        del mover, after
        assert held(stand_in) == leaves, (function, k)
    assert {"cudaEventRecord", "cudaEventCreateWithFlags"} <= failed_in["submit"] & failed_in["transfer"]
    assert {"cudaEventQuery", "cudaStreamWaitEvent", "cudaStreamCreateWithPriority"} <= failed_in["transfer"]
    never = set(made) - failed_in["submit"] - failed_in["transfer"] - HARMLESS - MAY_BE_HARMLESS
    assert {f for f in never if made[f]} == set()


def wait_for_looks(sim: Sim, transfer: Transfer) -> None:
    """Until the mover's thread has looked some more, or the transfer has ended."""
    looks, until = sim.calls("cudaEventQuery") + 8, time.monotonic() + LONG
    while sim.calls("cudaEventQuery") < looks and not transfer.done() and time.monotonic() < until:
        time.sleep(0.001)


def test_a_failure_in_the_middle_leaves_the_rest_unasked_and_the_destination_undefined(stand_in):
    src, dst, far, fresh = host(), device(255), host(255), host()
    with Mover("cuda:0", chunk_bytes=PAGE) as mover:
        with mover.held():
            stand_in.fail("cudaMemcpyAsync", 4, OUT_OF_MEMORY)
            torn = mover.submit(swap(src, dst, executor="dma"))
            reads = mover.submit(swap(dst, far))
            overwrites = mover.submit(swap(fresh, dst))
            named = mover.submit(swap(fresh, device()), after=[torn])
        result = torn.result(LONG)
        assert result.state == "failed" and [t.data_ptr() for t in result.undefined] == [dst.data_ptr()]
        assert str(result.error).startswith("swap_blocks: cudaMemcpyAsync failed: cudaErrorMemoryAllocation")
        for one in (reads, named):
            assert isinstance(one.result(LONG).error, TransferFailed)
            assert f"transfer {torn.ticket}, which this one needs, failed: swap_blocks: cuda" in str(one.result().error)
        assert overwrites.result(LONG).state == "done" and is_moved(fresh, dst) and is_all(far, 255)
        rows = {row["priority"]: row for row in mover.stats()["transfers"] if row["direction"] == "h2d"}
        assert rows["load"]["failed"] >= 1 and mover.drain(timeout=LONG)


def test_a_failure_inside_a_chunk_ends_when_what_is_on_its_way_has(stand_in):
    """Until then its tensors are kept, and whoever writes there next waits."""
    src, dst, fresh = host(), device(255), host()
    with Mover("cuda:0") as mover:
        stand_in.set("batch_refuses", 1)
        stand_in.set("time_stands_still", 1)
        with mover.held():
            stand_in.fail("cudaMemcpyAsync", 4, OUT_OF_MEMORY)
            torn = mover.submit(swap(src, dst, executor="dma"))
            overwrites = mover.submit(swap(fresh, dst, executor="dma"))
        wait_for_looks(stand_in, torn)
        assert torn.state == "running" and overwrites.state == "queued"
        stand_in.set("time_stands_still", 0)
        result = torn.result(LONG)
        assert str(result.error).endswith("; the destination is undefined") and result.undefined
        assert overwrites.result(LONG).state == "done" and is_moved(fresh, dst)


def test_what_was_handed_over_before_a_failure_was_seen_fails_with_it(stand_in):
    """The mark behind the first says an error once, when the second is on its way already."""
    src, mid, far = host(), device(255), host(255)
    with Mover("cuda:0") as mover:
        stand_in.set("time_stands_still", 1)
        with mover.held():
            first = mover.submit(swap(src, mid, executor="dma"))
            second = mover.submit(swap(mid, far, executor="dma"))
            third = mover.submit(swap(host(), mid, executor="dma"))
        third.block_stream()  # so all of them are
        stand_in.fail("cudaEventQuery", 1, OUT_OF_MEMORY)
        while stand_in.log("cudaEventQuery") == []:
            pass
        wait_for_looks(stand_in, first)
        assert first.state == "running"  # what the call said is not what became of the bytes
        stand_in.set("time_stands_still", 0)
        results = [one.result(LONG) for one in (first, second, third)]
        assert [result.state for result in results] == ["failed", "failed", "done"]
        assert str(results[0].error).startswith("swap_blocks: cudaEventQuery failed: cudaErrorMemoryAllocation")
        assert str(results[0].error).endswith("; the destination is undefined") and results[0].undefined
        assert isinstance(results[1].error, TransferFailed)
        assert [t.data_ptr() for t in results[1].undefined] == [far.data_ptr()]


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaEventQuery", "cudaEventRecord", "cudaStreamWaitEvent"])
@pytest.mark.parametrize("finish", [True, False])
def test_a_device_that_is_broken_fails_everything_and_close_does_not_hang(stand_in, function, finish):
    src, pools = host(), [device(255) for _ in range(6)]
    mover = Mover("cuda:0", chunk_bytes=PAGE)
    sent: list[Transfer] = []
    with mover.held():
        for pool in pools:
            sent.append(mover.submit(swap(src, pool, executor="dma"), priority="store"))
        stand_in.fail(function, 1, ILLEGAL_ADDRESS)
    mover.close(finish=finish) if not finish else None
    for one in sent:
        result = one.result(LONG)
        assert result.state in (("failed",) if finish else ("failed", "cancelled"))
        if result.state == "failed":
            assert re.match(r"swap_blocks: \w+ failed: cudaErrorIllegalAddress", str(result.error)), result.error
    with pytest.raises(RuntimeError, match=r"cudaErrorIllegalAddress|closed"):
        mover.submit(swap(src, pools[0]))
    mover.close()
    assert mover.poll() == [] and mover.stats()["running"] == 0
    stand_in.reset()
    with Mover("cuda:0") as another:
        assert another.submit(swap(src, pools[0])).result(LONG).state == "done"


def test_nothing_is_left_of_a_mover(stand_in):
    src, dst = host(), device()
    sides = [make() for make in (host, device, device, host, device, device) for _ in range(3)]
    jobs = [
        swap(a, b)
        for a, b in zip(sides[:3] + sides[6:9] + sides[12:15], sides[3:6] + sides[9:12] + sides[15:], strict=True)
    ]
    for _ in range(2):
        gc.collect()
        before = held(stand_in)
        with Mover("cuda:0", chunk_bytes=PAGE) as mover:
            sent = [mover.submit(job, priority=("expedited", "load", "store")[i % 3]) for i, job in enumerate(jobs)]
            with mover.held():
                assert mover.submit(swap(host(), device())).cancel()
            event = torch.cuda.Event()
            event.record()
            sent.append(mover.submit(swap(src, dst), after=[event, sent[4]]))
            assert mover.drain(timeout=LONG)
            assert stand_in.cuda.fake_streams() == before[1] + 10  # nine, and one for the clock
        del mover, sent, event
        gc.collect()
        assert held(stand_in) == before


def test_a_mover_that_is_dropped_with_work_on_its_way_gives_everything_back(stand_in):
    src, dst = host(), device()
    gc.collect()
    before = held(stand_in)
    mover = Mover("cuda:0", chunk_bytes=PAGE)
    for _ in range(20):
        mover.submit(swap(src, dst), priority="store")
    del mover
    gc.collect()
    assert held(stand_in) == before


def test_tensors_are_let_go_of_once_their_transfer_has_ended(stand_in):
    with Mover("cuda:0") as mover:
        dst = device()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            one = mover.submit(swap(device(), dst))
            one.wait(LONG)
            del one
            mover.poll()
        assert torch.cuda.memory_allocated() == before
