"""Tensors that are conjugated or negated when read: as sources they are what they read as, as destinations an error."""

from __future__ import annotations

import pytest
import torch

import kvkernels
from kvkernels import whole_page_runs
from kvkernels.registration import schemas

ops = torch.ops.kvkernels
PAIR, ID = torch.tensor([[1, 2]]), torch.tensor([1])


def _values() -> torch.Tensor:
    return torch.randn(4, 8, dtype=torch.complex64)


def _words() -> torch.Tensor:
    return torch.full((1, 64), 7, dtype=torch.uint8)


# Each op with a tensor that it writes, and what the error calls it.
WRITES = {
    "swap_blocks": (lambda to: (_values(), to, 64, PAIR), "dst"),
    "scatter_blocks": (lambda to: (_words(), ID, [_values(), to][1:]), r"pools\[0\]"),
    "copy_pages": (lambda to: ([_values()], [_values(), to], PAIR, whole_page_runs([to])), r"dst\[1\]"),
    "concat_tp_shards_out": (lambda to: ([_values()], 0, to), "out"),
    "split_tp_shards": (lambda to: (_values(), 0, [to]), r"out\[0\]"),
}


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize("explained", [False, True])
def test_destinations_are_refused(op, explained):
    base = torch.zeros(4, 8, dtype=torch.complex64)
    arguments, name = WRITES[op]
    call = (lambda *a: kvkernels.explain(op, *a)) if explained else getattr(ops, op)
    with pytest.raises(ValueError, match=rf"^{op}: {name} must hold its values as they are, got one that is conj"):
        call(*arguments(base.conj()))
    assert not base.any()


def test_negated_destinations_and_keywords():
    base = torch.zeros(4, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"^concat_tp_shards_out: out must hold its values as they are"):
        kvkernels.concat_tp_shards_out([torch.ones(4, 8)], 0, base.conj().imag)
    with pytest.raises(ValueError, match=r"^gather_blocks: out must hold its values as they are"):
        words = torch._neg_view(torch.zeros(1, 64, dtype=torch.uint8))
        ops.gather_blocks(pools=[_values()], block_ids=ID, out=words)
    with pytest.raises(ValueError, match=r"^swap_blocks_batch: dst_ptrs must hold its values as they are"):
        ops.swap_blocks_batch(torch.zeros(1, dtype=torch.int64), torch._neg_view(ID), torch.tensor([0]))
    assert not base.any()


def test_sources_are_copied_as_they_read():
    z, out = _values(), torch.zeros(4, 8, dtype=torch.complex64)
    kvkernels.swap_blocks(z.conj(), out, 64, PAIR)
    assert torch.equal(out[2], z[1].conj())
    assert torch.equal(kvkernels.concat_tp_shards([z.conj(), z], 0), torch.cat([z.conj(), z]))
    floats = torch.zeros(4, 8)
    kvkernels.concat_tp_shards_out([z.conj().imag[:1], z.conj().imag[1:]], 0, floats)
    assert torch.equal(floats, z.conj().imag)
    kvkernels.gather_blocks([z.conj()], ID, words := _words())
    assert torch.equal(words.view(torch.complex64), z[1:2].conj())
    parts = [torch.zeros(1, 8, dtype=torch.complex64), torch.zeros(3, 8, dtype=torch.complex64)]
    kvkernels.split_tp_shards(z.conj(), 0, parts)
    assert torch.equal(torch.cat(parts), z.conj())


def test_every_op_that_writes_is_tried():
    tried = {*WRITES, "gather_blocks", "swap_blocks_batch"}
    assert tried == {op for op, schema in schemas.PUBLIC.items() if "(a!)" in schema}


def test_a_new_tensor_would_lack_the_scale_of_quantized_shards():
    q = torch.quantize_per_tensor(torch.arange(8.0).view(2, 4), 0.5, 0, torch.qint8)
    for call in (kvkernels.concat_tp_shards, kvkernels.reference.concat_tp_shards):
        with pytest.raises(ValueError, match=r"^concat_tp_shards: shards must not be quantized, .*, got qint8"):
            call([q, q], 0)
    out = torch.quantize_per_tensor(torch.zeros(4, 4), 0.5, 0, torch.qint8)
    kvkernels.concat_tp_shards_out([q, q], 0, out)
    assert torch.equal(out.dequantize(), torch.cat([q, q]).dequantize())
