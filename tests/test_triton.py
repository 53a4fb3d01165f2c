"""Who may use the triton executor, what it says otherwise, and what it keeps of ids that a device refused."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kvkernels
from kvkernels import triton
from kvkernels.triton.table import FAULT_OPS, HEAD_COLUMNS, Head

no_interpreter = pytest.mark.skipif(triton.interprets(), reason="TRITON_INTERPRET=1 serves the host")


@no_interpreter
@pytest.mark.parametrize("op", ["gather_blocks", "scatter_blocks", "copy_pages"])
def test_tensors_on_the_host_are_refused(op):
    pool, other = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(1, 32, dtype=torch.uint8)
    run = torch.tensor([[0, 0, 0, 0, 32, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
    arguments = {
        "gather_blocks": ([pool], torch.tensor([3]), other),
        "scatter_blocks": (other, torch.tensor([3]), [pool]),
        "copy_pages": ([pool], [other], torch.tensor([[3, 0]]), run),
    }[op]
    text = rf"^{op}: executor 'triton' cannot serve this call: it needs a tensor on a cuda device$"
    with pytest.raises(ValueError, match=text):
        getattr(torch.ops.kvkernels, op)(*arguments, executor="triton")


def test_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    monkeypatch.setattr(triton, "interprets", lambda: True)
    pool, out = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(1, 32, dtype=torch.uint8)
    text = r"executor 'triton' cannot serve this call: it needs the package triton: pip install kvkernels\[triton\]$"
    with pytest.raises(ValueError, match=text):
        kvkernels.gather_blocks([pool], torch.tensor([3]), out, executor="triton")


@pytest.mark.parametrize("captures", [True, False])
def test_a_captured_graph_is_refused(monkeypatch, captures):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    assert ("captures a CUDA graph" in triton.refusal(0)) == captures


def test_importing_the_package_imports_none_of_the_kernels():
    code = "import sys, kvkernels; sys.exit('kvkernels.triton.kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("units", "sm_budget", "links_host", "programs"),
    [(10**6, 0, 1, 12), (10**6, 0, 0, 132), (10**6, 5, 0, 5), (10**6, 500, 1, 132), (40, 0, 0, 3), (1, 7, 1, 1)],
)
def test_the_grid_keeps_to_the_budget(monkeypatch, units, sm_budget, links_host, programs):
    properties = type("", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    head = Head(*[0] * len(Head._fields))
    head = head._replace(units=units, sm_budget=sm_budget, links_host=links_host, device=0)
    assert triton._programs(head, units_at_once=16) == programs


def test_check_device_reports_what_is_kept_in_python(monkeypatch):
    """A library without CUDA code has no word of its own."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    word = torch.tensor([3, ~17, FAULT_OPS.index("scatter_blocks")])
    monkeypatch.setitem(triton._fault_words, 0, word)
    with pytest.raises(
        IndexError, match=r"^scatter_blocks: 3 pairs had ids out of range on cuda:0, the first in row 17$"
    ):
        kvkernels.check_device(0)
    assert not word.any()
    kvkernels.check_device(0)


def test_the_head_fits_its_row():
    assert len(Head._fields) <= HEAD_COLUMNS


def _python(code: str, path: str = "", **environment: str) -> str:
    """What a new process prints; ``path`` comes first where it looks for packages."""
    everywhere = os.pathsep.join(filter(None, [path, str(Path(kvkernels.__file__).parents[1])]))
    env = {**os.environ, "PYTHONPATH": everywhere, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout


@no_interpreter
@pytest.mark.parametrize("value", ["1", "true", "on"])
def test_the_interpreter_serves_the_host_alone(value):
    """In each way of asking for it; on a device's addresses it would end the process."""
    pytest.importorskip("triton")
    code = "from kvkernels import triton; print(repr(triton.refusal(-1)), repr(triton.refusal(0)))"
    said = _python(code, TRITON_INTERPRET=value)
    assert said == "'' \"TRITON_INTERPRET is set, and Triton's interpreter does not reach a device's memory\"\n"


@no_interpreter
def test_a_package_that_does_not_load_is_a_refusal(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('half of it is missing')")
    said = _python("from kvkernels import triton; print(triton.refusal(0))", path=str(tmp_path))
    assert said == "the package triton does not load: ImportError: half of it is missing\n"


def test_something_else_under_its_name_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert not triton.is_installed()
