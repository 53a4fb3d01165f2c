"""Every error: its type, its text, and that nothing was written.

Each is raised through the reference, through ``torch.ops`` and, where no values are looked at, through the fake
kernels: all three must say the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import kvkernels
from kvkernels import reference

U8 = torch.uint8
PAGE = [0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]


def bytes_of(t: torch.Tensor) -> np.ndarray:
    """All of a tensor's storage, shared."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()


def run(src_pool, dst_pool, src_offset, dst_offset, size, *loops, sub=(0, 0)):
    padded = [*loops, *[(1, 0, 0)] * (3 - len(loops))]
    return [src_pool, dst_pool, src_offset, dst_offset, size, *sub, *itertools.chain(*padded)]


def assert_storages(tensors, expected):
    for t, bytes_wanted in zip(tensors, expected, strict=True):
        np.testing.assert_array_equal(bytes_of(t), bytes_wanted)


def pool(*shape, dtype=U8):
    return torch.zeros(shape, dtype=dtype)


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@dataclass
class Refusal:
    """A call and what it must raise; `values` where it takes the ids' or runs' values to see it."""

    op: str
    make: object
    error: type[Exception]
    text: str
    values: bool = False
    kwargs: dict = field(default_factory=dict)


def swap(text, make, error=ValueError, values=False):
    return Refusal("swap_blocks", make, error, text, values)


def gather(text, make, error=ValueError, values=False, **kwargs):
    return Refusal("gather_blocks", make, error, text, values, kwargs)


def scatter(text, make, error=ValueError, values=False):
    return Refusal("scatter_blocks", make, error, text, values)


def pages(text, make, error=ValueError, values=False, **kwargs):
    return Refusal("copy_pages", make, error, text, values, kwargs)


def runs_refused(text, *rows, page=4, **kwargs):
    def make():
        return [pool(3, page)] * 2, [pool(3, page), pool(3, page)], ids([0, 1]), torch.tensor(rows)

    return pages(text, make, ValueError, True, **kwargs)


def batch(text, src=(64,), dst=(128,), sizes=(4,), values=True):
    """Addresses that are never reached: every row is refused."""

    def column(value, dtype):
        return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)

    def make():
        return column(src, torch.int64), column(dst, torch.int64), column(sizes, torch.int64)

    return Refusal("swap_blocks_batch", make, ValueError, text, values)


def concat(text, make):
    return Refusal("concat_tp_shards", make, ValueError, text)


def concat_out(text, make, values=False):
    return Refusal("concat_tp_shards_out", make, ValueError, text, values)


def split(text, make, values=False):
    return Refusal("split_tp_shards", make, ValueError, text, values)


def same(t, *, rows=slice(None)):
    return t, t[rows]


def shared_halves():
    t = pool(8, 4)
    return t[:5], t[3:]


REFUSALS = [
    swap("src must be on the cpu or a cuda device, got meta",
         lambda: (pool(4, 4).to("meta"), pool(4, 4), 4, ids([0, 0]))),
    swap("block_mapping must be on the cpu or a cuda device, got meta",
         lambda: (pool(4, 4), pool(4, 4), 4, ids([0, 0]).to("meta"))),
    swap("src must be a strided tensor, got layout torch.sparse_coo",
         lambda: (torch.zeros(4, 4).to_sparse(), pool(4, 4), 4, ids([0, 0]))),
    swap("block_mapping must be int64 or int32, got float32", lambda: (pool(4, 4), pool(4, 4), 4, torch.zeros(1, 2))),
    swap("block_mapping must have shape [n, 2], got [3]", lambda: (pool(4, 4), pool(4, 4), 4, ids(0, 1, 2))),
    swap("block_size_in_bytes must be positive, got 0", lambda: (pool(4, 4), pool(4, 4), 0, ids([0, 0]))),
    swap("src must hold a whole number of blocks of 64 bytes, got 100 bytes",
         lambda: (pool(100), pool(64), 64, ids([0, 0]))),
    swap("dst must be contiguous or have rows of 64 bytes at a larger stride, got shape [4, 32] and strides [80, 1]",
         lambda: (pool(64), pool(4, 80)[:, :32], 64, ids([0, 0]))),
    swap("dst must be contiguous or have rows of 4 bytes at a larger stride, got shape [4, 4] and strides [1, 4]",
         lambda: (pool(4, 4), pool(4, 4).t(), 4, ids([0, 0]))),
    swap("dst must be contiguous or have rows of 4 bytes at a larger stride, got shape [3, 4] and strides [0, 1]",
         lambda: (pool(4, 4), pool(1, 4).expand(3, 4), 4, ids([0, 0]))),
    swap("block_mapping[17, 1] = 4096 is out of range for dst with 1024 blocks",
         lambda: (pool(20, 4), pool(1024, 4), 4, torch.tensor([[i, i] for i in range(17)] + [[3, 4096], [99, 0]])),
         IndexError, True),
    swap("block_mapping[1, 0] = -1 is out of range for src with 4 blocks",
         lambda: (pool(4, 4), pool(4, 4), 4, ids([0, 0], [-1, 7])), IndexError, True),
    swap("block_mapping must name each destination once, got two sources for destination 2",
         lambda: (pool(4, 4), pool(4, 4), 4, ids([0, 2], [1, 1], [1, 2])), values=True),
    swap("block_mapping must not write what it reads, got destination 2 overlapping source 2",
         lambda: (*same(pool(4, 4)), 4, ids([0, 2], [2, 3])), values=True),
    swap("block_mapping must not write what it reads, got destination 0 overlapping source 3",
         lambda: (*shared_halves(), 4, ids([3, 0])), values=True),
    gather("executor must be one of 'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference', got 'foo'",
           lambda: ([pool(4, 4)], ids(0), pool(1, 4)), executor="foo"),
    gather("sm_budget must not be negative, got -1", lambda: ([pool(4, 4)], ids(0), pool(1, 4)), sm_budget=-1),
    gather("pools must not be empty", lambda: ([], ids(0), pool(1, 4))),
    gather("pools[1] must have at least one dimension, got shape []",
           lambda: ([pool(4, 4), pool()], ids(0), pool(1, 5))),
    gather("pools[0] must have contiguous rows, got shape [4, 2, 3] and strides [6, 1, 2]",
           lambda: ([pool(4, 3, 2).transpose(1, 2)], ids(0), pool(1, 6))),
    gather("pools[0] must have a row stride of at least its page of 12 bytes, got 4 bytes",
           lambda: ([torch.zeros(8).as_strided((4, 3), (1, 1))], ids(0), pool(1, 12))),
    gather("pools[0] must have pages of at least one byte, got shape [4, 0]",
           lambda: ([pool(4, 0)], ids(0), pool(1, 0))),
    gather("block_ids must be int64 or int32, got int16",
           lambda: ([pool(4, 4)], ids(0, dtype=torch.int16), pool(1, 4))),
    gather("block_ids must have shape [n], got [3, 1]", lambda: ([pool(4, 4)], ids([0], [1], [2]), pool(3, 4))),
    gather("out must be uint8 of shape [3, 128], got float32 of shape [3, 32]",
           lambda: ([pool(4, 128)], ids(0, 1, 2), torch.zeros(3, 32))),
    gather("out must be uint8 of shape [3, 9], got uint8 of shape [9, 3]",
           lambda: ([pool(4, 4), pool(4, 5)], ids(0, 1, 2), pool(9, 3))),
    gather("out must have contiguous rows, got shape [3, 4] and strides [1, 3]",
           lambda: ([pool(4, 4)], ids(0, 1, 2), pool(4, 3).t())),
    gather("block_ids[3] = 99 is out of range for pools[1] with 10 blocks",
           lambda: ([pool(12, 4), pool(10, 4), pool(10, 4)], ids(0, 11 - 2, 2, 99), pool(4, 12)), IndexError, True),
    gather("block_ids must not write what it reads, got destination 1 overlapping source 1",
           lambda: ([(t := pool(4, 4))], ids(3, 1), t[:2]), values=True),
    scatter("buffer must be uint8 of shape [1, 8], got uint8 of shape [1, 9]",
            lambda: (pool(1, 9), ids(0), [pool(4, 8)])),
    scatter("block_ids[0] = -1 is out of range for pools[0] with 4 blocks",
            lambda: (pool(1, 8), ids(-1), [pool(4, 8)]), IndexError, True),
    scatter("block_ids must name each destination once, got two sources for destination 3",
            lambda: (pool(3, 8), ids(3, 1, 3), [pool(4, 8)]), values=True),
    scatter("pools must not overlap where they are written, got pools[0] and pools[2] sharing bytes",
            lambda: (pool(1, 12), ids(2), [(t := pool(4, 4)), pool(4, 4), t]), values=True),
    pages("src must not be empty", lambda: ([], [pool(3, 4)], ids([0, 0]), torch.tensor([PAGE]))),
    pages("dst must not be empty", lambda: ([pool(3, 4)], [], ids([0, 0]), torch.tensor([PAGE]))),
    pages("mapping must have shape [n, 2], got [1, 3]",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 0, 0]), torch.tensor([PAGE]))),
    pages("runs must be int64 of shape [r, 16] on the cpu, got int32 of shape [1, 16] on cpu",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 0]), torch.tensor([PAGE], dtype=torch.int32))),
    pages("runs must be int64 of shape [r, 16] on the cpu, got int64 of shape [16] on cpu",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 0]), torch.tensor(PAGE))),
    pages("src_subblocks_per_block must be positive, got 0",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 0]), torch.tensor([PAGE])), src_subblocks_per_block=0),
    pages("dst_subblocks_per_block must leave dst's ids in int64, got 9223372036854775807 for 3 blocks",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 0]), torch.tensor([PAGE])),
          dst_subblocks_per_block=(1 << 63) - 1),
    pages("mapping[0, 1] = 160 is out of range for dst[0] with 10 blocks of 16 sub-blocks",
          lambda: ([pool(3, 4)], [pool(10, 64)], ids([0, 160]), torch.tensor([run(0, 0, 0, 0, 4, sub=(0, 4))])),
          IndexError, True, dst_subblocks_per_block=16),
    pages("mapping[1, 0] = -1 is out of range for src[0] with 3 blocks",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 0], [-1, 1]), torch.tensor([PAGE])), IndexError, True),
    pages("mapping must name each destination once, got two sources for destination 1",
          lambda: ([pool(3, 4)], [pool(3, 4)], ids([0, 1], [2, 1]), torch.tensor([PAGE])), values=True),
    pages("dst must not overlap where they are written, got dst[0] and dst[1] sharing bytes",
          lambda: ([pool(3, 4)], [(t := pool(4, 4))[:3], t[1:]], ids([0, 1], [1, 0]),
                   torch.tensor([PAGE, [0, 1, *PAGE[2:]]])), values=True),
    pages("mapping must not write what it reads, got destination 1 overlapping source 1",
          lambda: ([(t := pool(3, 4))], [t], ids([1, 1]), torch.tensor([run(0, 0, 0, 1, 2)])), values=True),
    runs_refused("runs[1] src_pool must be below 2 and not negative, got 7", run(0, 0, 0, 0, 4), run(7, 0, 0, 0, 4)),
    runs_refused("runs[0] dst_pool must be below 2 and not negative, got -1", run(0, -1, 0, 0, 4)),
    runs_refused("runs[0] fragment_bytes must be positive, got 0", run(0, 0, 0, 0, 0)),
    runs_refused("runs[0] extent 1 must be positive, got -3", run(0, 0, 0, 0, 4, (1, 0, 0), (-3, 0, 0))),
    runs_refused("runs[0] must fit in int64, got an offset that overflows", run(0, 0, 0, 0, 1, (1 << 40, 1 << 40, 0))),
    runs_refused("runs[0] must fit in int64, got an offset that overflows", run(0, 0, 0, (1 << 63) - 1, 1)),
    runs_refused("runs[0] must stay inside src[1]'s page of 4 bytes, got bytes -2 to 5",
                 run(1, 0, 2, 0, 1, (5, -1, 0), (3, 1, 0))),
    runs_refused("runs[0] must stay inside src[0]'s page of 4 bytes, got bytes -2 to 3",
                 run(0, 0, 2, 0, 1, (5, -1, 0))),
    runs_refused("runs[0] must stay inside dst[0]'s page of 4 bytes, got bytes 0 to 6",
                 run(0, 0, 0, 0, 2, sub=(0, 2)), dst_subblocks_per_block=3),
    runs_refused("runs must write each byte once, got runs[0] and runs[2] sharing bytes of dst[1]",
                 run(0, 1, 0, 0, 2), run(0, 0, 0, 0, 4), run(0, 1, 0, 1, 2)),
    runs_refused("runs must write each byte once, got runs[0] and runs[0] sharing bytes of dst[0]",
                 run(0, 0, 0, 0, 2, (3, 0, 1))),
    runs_refused("runs must write each byte once, got runs[0] and runs[0] sharing bytes of dst[0]",
                 run(0, 0, 0, 0, 1, (1 << 30, 0, 0))),
    runs_refused("runs must write each byte once, got runs[0] and runs[0] sharing bytes of dst[0]",
                 run(0, 0, 0, 0, 4), dst_subblocks_per_block=2),
    batch("src_ptrs must be int64 or uint64, got int32", src=torch.tensor([64], dtype=torch.int32), values=False),
    batch("sizes must be int64 or int32, got uint64", sizes=torch.tensor([4], dtype=torch.uint64), values=False),
    batch("src_ptrs must have shape [n], got [1, 1]", src=torch.tensor([[64]]), values=False),
    batch("dst_ptrs must have shape [4], got [3]",
          src=(8, 16, 24, 32), dst=(64, 72, 80), sizes=(4, 4, 4, 4), values=False),
    batch("sizes[2] must not be negative, got -1", src=(8, 16, 24), dst=(64, 72, 80), sizes=(4, 0, -1)),
    batch("src_ptrs[1] must not be null, got 0", src=(8, 0), dst=(64, 72), sizes=(4, 4)),
    batch("dst_ptrs[0] must not be null, got 0", src=(8, 0), dst=(0, 72), sizes=(4, 0)),
    batch("dst_ptrs[0] + sizes[0] must fit in the address space, got an overflow", dst=(-3,)),
    batch("dst_ptrs must name each destination once, got rows 0 and 2 sharing bytes",
          src=(8, 16, 24), dst=(66, 96, 64), sizes=(4, 4, 4)),
    batch("dst_ptrs must name each destination once, got rows 0 and 1 sharing bytes",
          src=(8, 16), dst=((1 << 63) - 2, -(1 << 63)), sizes=(4, 4)),
    batch("dst_ptrs must not write what src_ptrs read, got rows 1 and 0 sharing bytes",
          src=(8, 128), dst=(64, 11), sizes=(4, 4)),
    concat("shards must not be empty", lambda: ([], 0)),
    concat("shards[0] must have at least one dimension, got shape []", lambda: ([pool()], 0)),
    concat("dim must be in [-2, 2), got 5", lambda: ([pool(2, 3)], 5)),
    concat("shards[1] must have 3 dimensions, got 2", lambda: ([pool(2, 3, 4), pool(2, 3)], 0)),
    concat("shards[1] must have size 4 in dimension 0, got 5", lambda: ([pool(4, 2), pool(5, 2)], 1)),
    concat("shards[1] must be float32, got float16", lambda: ([torch.zeros(2), torch.zeros(2).half()], 0)),
    concat("shards[1] must be on the cpu or a cuda device, got meta", lambda: ([pool(2), pool(2).to("meta")], 0)),
    concat_out("out must have shape [4, 2], got [2, 4]", lambda: ([pool(2, 2), pool(2, 2)], 0, pool(2, 4))),
    concat_out("out must be float32, got float16", lambda: ([torch.zeros(2)], 0, torch.zeros(2, dtype=torch.float16))),
    concat_out("out must not overlap itself, got shape [2, 4] and strides [0, 1]",
               lambda: ([pool(1, 4), pool(1, 4)], 0, pool(1, 4).expand(2, 4))),
    concat_out("out must not overlap itself, got shape [2, 4] and strides [3, 1]",
               lambda: ([pool(1, 4), pool(1, 4)], 0, pool(7).as_strided((2, 4), (3, 1))), values=True),
    concat_out("out must not write what it reads, got destination 0 overlapping source 0",
               lambda: ([(t := pool(5, 4))[:1], t[4:]], 0, t[:2]), values=True),
    split("out must not be empty", lambda: (pool(8), 0, [])),
    split("out must add up to size 8 in dimension 1, got 7", lambda: (pool(2, 8), 1, [pool(2, 3), pool(2, 4)])),
    split("input must be uint8, got float32", lambda: (torch.zeros(2), 0, [pool(2)])),
    split("out must not overlap themselves, got a tensor that writes a byte twice",
          lambda: (pool(2, 4), 1, [pool(2, 1).expand(2, 4)])),
    split("out must not overlap where they are written, got out[0] and out[1] sharing bytes",
          lambda: (pool(2, 4), 0, [(t := pool(2, 4))[:1], t[:1]]), values=True),
    split("out must not write what it reads, got destination 0 overlapping source 0",
          lambda: ((t := pool(2, 4)), 0, [pool(1, 4), t[:1]]), values=True),
]  # fmt: skip


def call_reference(op, args, kwargs):
    return getattr(reference, op)(*args, **kwargs)


def call_torch_ops(op, args, kwargs):
    return getattr(torch.ops.kvkernels, op)(*args, **kwargs)


def call_fake(op, args, kwargs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = tree_map_only(torch.Tensor, mode.from_tensor, args)
        return getattr(torch.ops.kvkernels, op)(*args, **kwargs)


def tensors_of(args):
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from tensors_of(value)


@pytest.mark.parametrize("call", [call_reference, call_torch_ops, call_fake])
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r.op}: {r.text}")
def test_refused_calls_say_why_and_write_nothing(refusal, call):
    args = refusal.make()
    inputs = [t for t in tensors_of(args) if t.device.type == "cpu" and t.layout == torch.strided]
    if call is call_fake and refusal.values:
        return  # a fake has no values to refuse
    for t in inputs:  # bytes that a copy would change
        if t.dtype == U8:
            bytes_of(t)[:] = np.random.default_rng(0).integers(0, 256, bytes_of(t).size, dtype=np.uint8)
    before = [bytes_of(t).copy() for t in inputs]
    with pytest.raises(refusal.error) as raised:
        call(refusal.op, args, refusal.kwargs)
    assert str(raised.value) == f"{refusal.op}: {refusal.text}"
    assert_storages(inputs, before)


@pytest.mark.parametrize("call", [call_reference, call_torch_ops])
def test_a_tensor_beyond_its_storage_is_refused(call):
    src = pool(4, 4)
    src.untyped_storage().resize_(15)
    with pytest.raises(ValueError) as raised:
        call("swap_blocks", (src, pool(4, 4), 4, ids([0, 0])), {})
    assert str(raised.value) == (
        "swap_blocks: src must lie inside its storage, got shape [4, 4] and strides [4, 1] on a smaller storage"
    )


def on(device, *shape, dtype=U8):
    return torch.empty(shape, dtype=dtype, device=device)


MIXED = [
    ("swap_blocks", lambda: (on("cuda:0", 4, 4), on("cpu", 4, 4), 4, on("cuda:0", 1, 2, dtype=torch.int64)),
     "block_mapping must be on the cpu, got cuda:0"),
    ("swap_blocks", lambda: (on("xpu:0", 4, 4), on("cpu", 4, 4), 4, on("cpu", 1, 2, dtype=torch.int64)),
     "src must be on the cpu or a cuda device, got xpu:0"),
    ("gather_blocks", lambda: ([on("cpu", 4, 4)], on("cuda:0", 1, dtype=torch.int64), on("cpu", 1, 4)),
     "block_ids must be on the cpu or on the pools' cuda device, got cuda:0"),
    ("gather_blocks", lambda: ([on("cpu", 4, 4), on("cuda:0", 4, 4)], on("cpu", 1, dtype=torch.int64), on("cpu", 1, 8)),
     "pools must be on one device, got cpu and cuda:0"),
    ("copy_pages", lambda: ([on("cuda:1", 4, 4)], [on("cuda:1", 4, 4), on("cuda:0", 4, 4)],
                            on("cpu", 1, 2, dtype=torch.int64), on("cpu", 1, 16, dtype=torch.int64)),
     "tensors must be on one cuda device, got cuda:1 and cuda:0"),
    ("copy_pages", lambda: ([on("cpu", 4, 4)], [on("cuda:0", 4, 4)],
                            on("cpu", 1, 2, dtype=torch.int64), on("cuda:0", 1, 16, dtype=torch.int64)),
     "runs must be int64 of shape [r, 16] on the cpu, got int64 of shape [1, 16] on cuda:0"),
    ("swap_blocks_batch", lambda: tuple(on("cuda:0", 1, dtype=torch.int64) for _ in range(3)),
     "src_ptrs must be on the cpu, got cuda:0"),
    ("concat_tp_shards", lambda: ([on("cpu", 2), on("cuda:0", 2)], 0), "shards[1] must be on cpu, got cuda:0"),
    ("split_tp_shards", lambda: (on("cuda:0", 2), 0, [on("cuda:1", 1), on("cuda:0", 1)]),
     "out[1] must be on cuda:1, got cuda:0"),
    ("copy_pages", lambda: ([on("cuda:0", 4, 4)], [on("cuda:1", 4, 4)],
                            on("cuda:1", 1, 2, dtype=torch.int64), on("cpu", 1, 16, dtype=torch.int64)),
     "mapping must be on the cpu or on the source's cuda device, got cuda:1"),
]  # fmt: skip


@pytest.mark.parametrize("op,make,text", MIXED, ids=[f"{op}: {text}" for op, _, text in MIXED])
def test_devices_that_do_not_go_together_are_refused(op, make, text):
    """Through the fakes, which stand for devices that need not be there."""
    with FakeTensorMode(), pytest.raises(ValueError) as raised:
        getattr(torch.ops.kvkernels, op)(*make())
    assert str(raised.value) == f"{op}: {text}"


def test_fakes_take_what_the_ops_take():
    with FakeTensorMode():
        cpu, cuda = on("cpu", 4, 8), on("cuda:0", 4, 8)
        kvkernels.swap_blocks(cuda, cpu, 8, on("cpu", 3, 2, dtype=torch.int32))
        kvkernels.gather_blocks([cuda, cuda], on("cuda:0", 3, dtype=torch.int64), on("cpu", 3, 16))
        peer = on("cuda:1", 4, 8)
        kvkernels.swap_blocks(cuda, peer, 8, on("cpu", 3, 2, dtype=torch.int32))
        kvkernels.scatter_blocks(cuda, on("cuda:0", 4, dtype=torch.int64), [peer])
        kvkernels.concat_tp_shards_out([cuda], 0, peer)
        kvkernels.split_tp_shards(peer, 0, [cuda])
        kvkernels.scatter_blocks(on("cpu", 3, 16), on("cpu", 3, dtype=torch.int64), [cuda, cuda])
        joined = kvkernels.concat_tp_shards([cuda, cuda], -1)
        assert joined.shape == (4, 16) and joined.device == cuda.device and joined.is_contiguous()
        kvkernels.split_tp_shards(joined, 1, [cpu, cpu])
