"""An executor is a file and a row: a new one is built into a copy of the sources, and serves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvkernels.registration import LIBRARY

ROOT = Path(__file__).resolve().parents[1]

ROOM = """
#include "cpu/copy.h"
#include "ops/executors/room.h"

namespace kvkernels {
namespace {

struct BackwardsPlan : Plan {
  explicit BackwardsPlan(const Work& work) : work(work) {}
  void describe(Explanation& explanation) const override { explanation.launches = work.pairs; }
  Issued run() override {
    Issued issued = cpu::copy(work, nullptr);
    issued.launches = work.pairs;
    return issued;
  }
  const Work& work;
};

std::string refusal(const Job& job, Site& site) {
  if (!site.is_host()) return "it is for the host";
  return job.work.pairs % 2 == 0 ? "" : "it takes pairs of pairs";
}

std::unique_ptr<Plan> plan(const Job& job, Site&) { return std::make_unique<BackwardsPlan>(job.work); }

}  // namespace

const Room backwards_room{refusal, plan};

}  // namespace kvkernels
"""

SCRIPT = """
import torch, kvkernels
pool, out = torch.arange(8, dtype=torch.uint8).reshape(4, 2), torch.zeros(2, 4, dtype=torch.uint8)[:, :2].clone()
arguments = [pool], torch.tensor([3, 1]), out
explained = kvkernels.explain("gather_blocks", *arguments, executor="backwards")
assert (explained.executor, explained.reason, explained.launches) == ("backwards", "named by the caller", 2), explained
assert kvkernels.explain("gather_blocks", *arguments).executor == "cpu"
kvkernels.gather_blocks(*arguments, executor="backwards")
assert out.tolist() == [[6, 7], [2, 3]]
assert kvkernels.counters()["backwards"] == {"calls": 1, "launches": 2, "descriptors": 2, "bytes": 4}
prepared = kvkernels.prepare([pool], [torch.zeros(4, 2, dtype=torch.uint8)], executor="backwards")
prepared.run(torch.tensor([[0, 1], [2, 3]]))
for call, wrong in (
    (lambda: prepared.run(torch.tensor([[0, 1]])), "cannot serve this call: it takes pairs of pairs"),
    (lambda: kvkernels.gather_blocks(*arguments, executor="sideways"), "'reference', 'backwards', got 'sideways'"),
):
    try:
        call()
    except ValueError as error:
        assert wrong in str(error), error
    else:
        raise AssertionError(wrong)
"""


@pytest.mark.skipif(not LIBRARY.compiled or shutil.which("c++") is None, reason="builds the library")
def test_a_file_and_a_row_are_an_executor(tmp_path):
    for name in ("csrc", "kvkernels", "CMakeLists.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc" / "ops" / "executors" / "backwards.cpp").write_text(ROOM)
    with (tmp_path / "csrc" / "core" / "executors.inc").open("a") as rows:
        rows.write("KVKERNELS_EXECUTOR(kBackwards, backwards)\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    build = str(tmp_path / "build")
    options = ("-DKVKERNELS_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O0 -g0")
    run("cmake", "-G", "Ninja", "-S", str(tmp_path), "-B", build, f"-DPython_EXECUTABLE={sys.executable}", *options)
    run("cmake", "--build", build, "--target", "kvkernels_ops")
    shutil.copy(tmp_path / "build" / "libkvkernels_ops.so", tmp_path / "kvkernels")
    environment["PYTHONPATH"] = str(tmp_path)
    run(sys.executable, "-c", SCRIPT)
