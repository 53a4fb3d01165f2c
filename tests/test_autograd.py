"""Autograd learns of every write: backward raises where an op overwrote what it needs, and gives no wrong gradient."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from test_info import copy_package

import kvkernels
from kvkernels import reference
from kvkernels.registration.library import FILE_NAME, LIBRARY, PACKAGE

PAIR, IDS = torch.tensor([[0, 1]]), torch.tensor([1, 0])
RUN = torch.tensor([[0, 0, 0, 0, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
REFUSED = r"{}: {} must not require a gradient where gradients are recorded, got a tensor that does; torch.no_grad\(\)"


def floats(rows: int = 2) -> torch.Tensor:
    return torch.ones(rows, 4)


def words() -> torch.Tensor:
    return torch.zeros(2, 32, dtype=torch.uint8)


# Each op: what it is given, with a tensor of floats to write; what that is called, and where else it is written to.
CALLS = {
    "swap_blocks": (lambda to, _: (floats(), to, 16, PAIR), "dst"),
    "scatter_blocks": (lambda to, other: (words(), IDS, [other, to]), r"pools\[1\]"),
    "copy_pages": (lambda to, other: ([floats()], [to, other], PAIR, RUN), r"dst\[0\]"),
    "concat_tp_shards_out": (lambda to, _: ([floats(1), floats(1)], 0, to), "out"),
    "split_tp_shards": (lambda to, other: (floats(4), 0, [other, to]), r"out\[1\]"),
}
each_op = pytest.mark.parametrize("op", CALLS)
NAMESPACES = {"ops": torch.ops.kvkernels, "reference": reference}


@pytest.fixture(params=NAMESPACES)
def call(request):
    """A call of an op with a tensor to write."""

    def run(op: str, to: torch.Tensor, other: torch.Tensor | None = None) -> None:
        arguments, _ = CALLS[op]
        getattr(NAMESPACES[request.param], op)(*arguments(to, floats() if other is None else other))

    return run


@each_op
def test_backward_raises_where_a_saved_tensor_was_overwritten(call, op):
    leaf, saved = torch.ones(2, 4, requires_grad=True), floats()
    loss = (leaf * saved).sum()
    call(op, saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_op
def test_a_write_is_one_new_version_of_each_tensor_and_of_its_views(call, op):
    whole, other = floats(4), floats()
    view = whole[1:3]
    call(op, view, other)
    assert whole._version == view._version == 1
    assert other._version == ("[" in CALLS[op][1])


@each_op
@pytest.mark.parametrize("is_leaf", [True, False])
def test_what_requires_a_gradient_is_refused_before_a_byte_moves(call, op, is_leaf):
    leaf = torch.full((2, 4), 3.0, requires_grad=True)
    to = leaf if is_leaf else leaf * 1
    before = to.detach().clone()
    with pytest.raises(ValueError, match=REFUSED.format(op, CALLS[op][1])):
        call(op, to)
    assert torch.equal(to.detach(), before) and to._version == 0
    with torch.no_grad():
        call(op, to)
    assert to._version == 1 and not torch.equal(to.detach(), before)


@each_op
def test_inference_tensors_have_no_version(call, op):
    with torch.inference_mode():
        tensor, other = torch.full((2, 4), 3.0), floats()
        call(op, tensor, other)
    failures = []

    def elsewhere() -> None:
        try:
            call(op, tensor, other)
        except Exception as error:
            failures.append(error)

    call(op, tensor, other)
    worker = threading.Thread(target=elsewhere)
    worker.start()
    worker.join()
    assert not failures
    assert not (tensor == 3.0).all()


@each_op
def test_a_call_that_is_refused_or_explained_writes_nothing(op):
    to, other = floats(), floats()
    arguments, _ = CALLS[op]
    kvkernels.explain(op, *arguments(to, other))
    assert (to._version, other._version) == (0, 0)
    with pytest.raises((ValueError, IndexError)):
        getattr(torch.ops.kvkernels, op)(*arguments(floats()[:, ::2], other))


def test_the_named_reference_executor_tells_autograd_once():
    pool = floats()
    torch.ops.kvkernels.scatter_blocks(words()[:, :16], IDS, [pool], executor="reference")
    assert pool._version == 1


@each_op
def test_compiled_calls_bump_too(op, fresh_compiler):
    arguments, _ = CALLS[op]

    def step(to, other):
        getattr(torch.ops.kvkernels, op)(*arguments(to, other))
        return to + 1

    to, eager = floats(), floats()
    compiled = torch.compile(step, fullgraph=True)(to, floats())
    assert torch.equal(compiled, step(eager, floats()))
    assert to._version > 0


WITHOUT_SYMBOLS = """
import torch, kvkernels
to, leaf = torch.ones(2, 4), torch.ones(2, 4, requires_grad=True)
pair = torch.tensor([[0, 1]])
loss = (leaf * to).sum()
kvkernels.swap_blocks(torch.zeros(2, 4), to, 16, pair)
assert to._version == 1 and to.tolist() == [[1] * 4, [0] * 4]
with torch.inference_mode():
    tensor = torch.ones(2, 4)
kvkernels.swap_blocks(torch.zeros(2, 4), tensor, 16, pair)
for expected, run in ((RuntimeError, loss.backward), (ValueError, lambda: kvkernels.swap_blocks(to, leaf, 16, pair))):
    try:
        run()
    except expected as error:
        print(str(error)[:60])
    else:
        raise SystemExit("not refused")
"""


@pytest.mark.skipif(not LIBRARY.compiled, reason="no compiled library to change")
@pytest.mark.parametrize("symbol", [b"bump_versionERKN2", b"is_inferenceERKNS", b"TensorImpl13requires_grad"])
def test_a_torch_without_the_functions_is_asked_through_python(tmp_path, symbol):
    built = (PACKAGE / FILE_NAME).read_bytes()
    assert built.count(symbol) == 1
    copy_package(tmp_path, built.replace(symbol, symbol[:-1] + b"_"))
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SYMBOLS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "swap_blocks: dst must not require a gradient" in done.stdout
