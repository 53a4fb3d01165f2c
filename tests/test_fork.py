"""A process that was forked from one with threads has none of them, and OpenMP waits for them: it copies alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def _run(body: str) -> str:
    program = f"""
        import os, signal, sys, threading, torch, kvkernels
        torch.set_num_threads(2)
        pool, ids = torch.randint(0, 255, (64, 1 << 20), dtype=torch.uint8), torch.arange(32)
        out = torch.empty(32, 1 << 20, dtype=torch.uint8)

        def copy(executor="auto"):
            out[31, 7] = 0 if pool[31, 7] else 1
            kvkernels.gather_blocks([pool], ids, out, executor)
            assert bytes(out[31].numpy()) == bytes(pool[31].numpy())

        def lanes():
            return kvkernels.explain("gather_blocks", [pool], ids, out).lanes

        def in_child(work):
            child = os.fork()
            if child:
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            signal.alarm(20)  # a child that hangs must not outlive the test
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        {textwrap.indent(textwrap.dedent(body), " " * 8)}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_a_child_of_threads_copies_on_one_lane():
    body = """
        copy()
        assert lanes() == 2
        def child():
            copy()
            assert lanes() == 1
            batch = [torch.tensor([t.data_ptr()]) for t in (pool, out)]
            kvkernels.swap_blocks_batch(*batch, torch.tensor([32 << 20]))
            assert in_child(lambda: copy()) == 0  # and so does a child of that child
        print(in_child(child))
        copy()
        assert lanes() == 2
    """
    assert _run(body) == "0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_a_child_of_a_process_without_threads_has_its_own():
    body = """
        single = len(os.listdir("/proc/self/task")) == 1
        def child():
            copy()
            assert not single or lanes() == 2
        print(in_child(child))
    """
    assert _run(body) == "0\n"
