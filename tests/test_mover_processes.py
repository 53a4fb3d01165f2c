"""Movers at the ends of processes: exits with transfers in flight, forks, interrupts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest

from kvkernels.registration import LIBRARY

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")

START = """
    import os, signal, sys, threading, time, torch, kvkernels
    from kvkernels.transfer import Mover, SwapJob

    src, dst = (torch.zeros(256, 1 << 20, dtype=torch.uint8) for _ in range(2))
    every = torch.arange(256).repeat(2, 1).T

    def job():
        return SwapJob(src, dst, 1 << 20, every)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(START) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


ENDS = {
    "falls off its end": "",
    "sys.exit": "sys.exit(0)",
    "with another thread that waits": "threading.Thread(target=sent[-1].wait, daemon=True).start(); time.sleep(0.05)",
    "with a thread that submits": """
def submits():
    try:
        while True:
            mover.submit(job(), priority="store").cancel()
    except RuntimeError as error:  # once the process ends
        assert str(error) == "Mover: the mover must be open, got a closed one"
threading.Thread(target=submits, daemon=True).start()
time.sleep(0.05)
""",
    "held": "mover._owner.hold(True)",
    "in a cycle of references": "mover.me = mover; del mover",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_exits_with_transfers_in_flight_neither_hangs_nor_crashes(end):
    body = "mover = Mover(lanes=2)\nsent = [mover.submit(job(), priority='store') for _ in range(40)]\n" + ENDS[end]
    began = time.monotonic()
    done = run(body)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 60


def test_fork_after_start_is_an_error_that_says_so():
    done = run("""
        mover = Mover(lanes=2)
        one = mover.submit(job())
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            def error_of(call):
                try:
                    call()
                except RuntimeError as error:
                    return str(error)
            calls = [lambda: mover.submit(job()), mover.poll, mover.drain, mover.close, one.wait, one.cancel, one.done]
            for call in calls:
                assert "must be of this process, got one from before a fork" in error_of(call), call
            mine = Mover(lanes=1)
            small = SwapJob(src[:1], dst[:1], 1 << 20, every[:1])
            assert mine.submit(small).result(20).state == "done"
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), one.result(60).state)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 done\n", "")


def test_threads_that_cannot_be_started_are_an_error():
    done = run("""
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
        try:
            Mover(lanes=256)
        except RuntimeError as error:
            print(str(error).partition(", got ")[0])
        with Mover(lanes=1) as mover:
            print(mover.submit(SwapJob(src[:1], dst[:1], 1 << 20, every[:1])).result(20).state)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Mover: 512 threads must be startable\ndone\n", "")


def test_importing_starts_no_thread_and_a_wait_can_be_interrupted():
    done = run("""
        assert not any("kvk" in open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task"))
        mover = Mover(lanes=1)
        mover._owner.hold(True)
        one = mover.submit(job())
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        began = time.monotonic()
        try:
            one.wait()
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - began < 5)
    """)
    assert (done.returncode, done.stdout) == (0, "interrupted True\n")
