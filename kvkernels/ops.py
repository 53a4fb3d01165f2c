"""The ops as typed functions: the same as ``torch.ops.kvkernels.*``, with what their callers need to know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels import registration  # noqa: F401  (the ops exist once it is imported)

_swap_blocks = torch.ops.kvkernels.swap_blocks.default
_swap_blocks_batch = torch.ops.kvkernels.swap_blocks_batch.default
_gather_blocks = torch.ops.kvkernels.gather_blocks.default
_scatter_blocks = torch.ops.kvkernels.scatter_blocks.default
_copy_pages = torch.ops.kvkernels.copy_pages.default
_concat_tp_shards = torch.ops.kvkernels.concat_tp_shards.default
_concat_tp_shards_out = torch.ops.kvkernels.concat_tp_shards_out.default
_split_tp_shards = torch.ops.kvkernels.split_tp_shards.default


def swap_blocks(
    src: Tensor,
    dst: Tensor,
    block_size_in_bytes: int,
    block_mapping: Tensor,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    """Copy blocks from one cache to another: vLLM's call, on CPU tensors too.

    Parameters
    ----------
    src, dst : Tensor
        Any dtype, on the CPU or on a CUDA device. A contiguous tensor of any shape is a row of blocks of
        ``block_size_in_bytes``, which must divide its bytes. A tensor whose rows are padded steps by the stride of
        dimension 0, and its row must be exactly ``block_size_in_bytes``. Inside dimension 0 the others may be in any
        order, such as head-first memory that is shown as token-first, where their bytes are dense; elsewhere
        ``permute`` shows memory as it is.
    block_size_in_bytes : int
        Bytes of one block, positive.
    block_mapping : Tensor
        int64 or int32, shape ``[n, 2]``, on the CPU, any strides: (source block, destination block).
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Raises
    ------
    IndexError
        A block id is out of range; the message names its row, column and limit.
    ValueError
        A wrong shape, dtype, layout, device or executor; one destination from two sources; a block both read and
        written.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and the destination is undefined.

    Notes
    -----
    Nothing is written by a call that raises IndexError or ValueError. An identical pair that comes twice is copied
    once, a source may come often, and ``src`` and ``dst`` may be one tensor.

    With a tensor on a CUDA device the copy is ordered on that device's current stream and the call does not wait for
    it: keep both tensors alive, ``src`` unwritten and ``dst`` unread, until the stream has passed. From the CPU to the
    CPU the copy is done when the call returns and is ordered with no stream.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    A CUDA graph may capture the call and then repeats it with the ids of the capture: they are frozen. The op has the
    tag ``cudagraph_unsafe``, so inductor does not capture it by itself. The schema says of ``src``, too, that it is
    written: only so does inductor keep a clone between the two. A compiled call gives it a new version.

    Examples
    --------
    >>> import torch, kvkernels
    >>> src = torch.arange(8, dtype=torch.uint8).reshape(4, 2)
    >>> dst = torch.zeros(4, 2, dtype=torch.uint8)
    >>> kvkernels.swap_blocks(src, dst, 2, torch.tensor([[3, 0], [0, 2]]))
    >>> dst.tolist()
    [[6, 7], [0, 0], [0, 1], [0, 0]]
    """
    _swap_blocks(src, dst, block_size_in_bytes, block_mapping, executor, sm_budget)


def swap_blocks_batch(
    src_ptrs: Tensor,
    dst_ptrs: Tensor,
    sizes: Tensor,
    is_src_access_order_any: bool = False,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    """Copy between raw addresses: vLLM's call, on the host's addresses too.

    Parameters
    ----------
    src_ptrs, dst_ptrs : Tensor
        int64 or uint64, shape ``[n]``, on the CPU: where each copy reads and writes.
    sizes : Tensor
        int64 or int32, shape ``[n]``, on the CPU: bytes of each copy, 0 for none.
    is_src_access_order_any : bool
        Let a copy engine read host sources before earlier work on the stream is done: for sources that nothing on the
        stream writes. Copies from the device to the host ignore it.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'reference'}
        What carries the copy out; ``cpu`` and ``reference`` take the host's addresses alone. ``kernel`` and ``bulk``
        take at most 8 different sizes, where neighbours that continue each other on both sides count as one or each for
        itself, whichever gives fewer. A named one that cannot serve the call raises, as ``staged`` and ``triton`` do,
        which take tensors; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel`` and ``bulk`` may use; 0 for the policy's default.

    Raises
    ------
    ValueError
        A wrong shape, dtype, device or executor; a negative size; a null address; a range past the end of the address
        space; two destinations that share a byte, or a byte both read and written. An identical row that comes twice is
        copied once.
    RuntimeError
        CUDA failed, with CUDA's name for it; or the compiled library, or its CUDA code, is missing and CUDA has been
        initialised, so that addresses could be the device's.

    Notes
    -----
    Nothing can check that the addresses are valid: a wrong one is a crash or silent damage. Under torch for ROCm all of
    them must be the host's.

    The memory behind raw addresses is unknown to torch. In a compiled graph the call is not removed, because its
    schema says that ``dst_ptrs`` is written, but it is **not ordered** against the graph's other ops on that memory:
    pass tensors (``swap_blocks``, ``copy_pages``) where order matters, or break the graph.

    With a device's address the copies are ordered on the current stream and the call does not wait for them; host to
    host they are done when it returns. A CUDA graph that captures the call repeats it with the addresses of the
    capture. The op has the tag ``cudagraph_unsafe``.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    Examples
    --------
    >>> import torch, kvkernels
    >>> src, dst = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    >>> kvkernels.swap_blocks_batch(
    ...     torch.tensor([src.data_ptr() + 2]), torch.tensor([dst.data_ptr()]), torch.tensor([2])
    ... )
    >>> dst.tolist()
    [2, 3, 0, 0]
    """
    _swap_blocks_batch(src_ptrs, dst_ptrs, sizes, is_src_access_order_any, executor, sm_budget)


def gather_blocks(
    pools: Sequence[Tensor], block_ids: Tensor, out: Tensor, executor: str = "auto", sm_budget: int = 0
) -> None:
    """Copy the same blocks of many pools into the rows of one buffer.

    Parameters
    ----------
    pools : sequence of Tensor
        Any dtypes, on one device. Dimension 0 is the block id; a row must be contiguous, and the stride of dimension 0
        may exceed it. Pools may differ in page and in number of blocks, and may share memory.
    block_ids : Tensor
        int64 or int32, shape ``[n]``, any stride, on the CPU or on the CUDA device of the pools,
        or else of ``out``.
    out : Tensor
        uint8, shape ``[n, sum of page bytes]``; its rows may be padded. Pool t's page starts at the sum of the pages
        before.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Raises
    ------
    IndexError
        A block id on the CPU is out of range of the pool with the fewest blocks.
    ValueError
        A wrong shape, dtype, layout, device or executor; a byte both read and written.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and ``out`` is undefined.

    Notes
    -----
    Nothing is written by a call that raises IndexError or ValueError. A block id may come often.

    With a tensor on a CUDA device the copy is ordered on that device's current stream and the call does not wait for
    it. From the CPU to the CPU it is done when the call returns.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    Ids on a CUDA device are checked there: a row with an id out of range is skipped and recorded, and
    ``kvkernels.check_device`` raises. That ``out`` overlaps no pool is then the caller's promise. A CUDA graph that
    captures the call freezes ids that are on the CPU and reads ids that are on the device anew. The op has the tag
    ``cudagraph_unsafe``.

    Examples
    --------
    >>> import torch, kvkernels
    >>> k = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
    >>> v = torch.tensor([[7], [8], [9]], dtype=torch.uint8)
    >>> out = torch.empty(2, 3, dtype=torch.uint8)
    >>> kvkernels.gather_blocks([k, v], torch.tensor([2, 0]), out)
    >>> out.tolist()
    [[5, 6, 9], [1, 2, 7]]
    """
    _gather_blocks(pools, block_ids, out, executor, sm_budget)


def scatter_blocks(
    buffer: Tensor, block_ids: Tensor, pools: Sequence[Tensor], executor: str = "auto", sm_budget: int = 0
) -> None:
    """Copy the rows of one buffer into the same blocks of many pools: the inverse of ``gather_blocks``.

    Parameters
    ----------
    buffer : Tensor
        uint8, shape ``[n, sum of page bytes]``; its rows may be padded. Pool t's page starts at the sum of the pages
        before.
    block_ids : Tensor
        int64 or int32, shape ``[n]``, any stride, on the CPU or on the CUDA device of ``buffer``, or
        else of the pools.
    pools : sequence of Tensor
        Any dtypes, on one device. Dimension 0 is the block id; a row must be contiguous, and the stride of dimension 0
        may exceed it.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Raises
    ------
    IndexError
        A block id on the CPU is out of range of the pool with the fewest blocks.
    ValueError
        A wrong shape, dtype, layout, device or executor; a block id that comes twice; pools that share bytes where they
        are written; a byte both read and written.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and the pools' blocks are undefined.

    Notes
    -----
    Nothing is written by a call that raises IndexError or ValueError.

    With a tensor on a CUDA device the copy is ordered on that device's current stream and the call does not wait for
    it. From the CPU to the CPU it is done when the call returns.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    Ids on a CUDA device are checked there: a row with an id out of range is skipped and recorded, and
    ``kvkernels.check_device`` raises. That no id comes twice and no memory overlaps is then the caller's promise. A
    CUDA graph that captures the call freezes ids that are on the CPU and reads ids that are on the device anew. The op
    has the tag ``cudagraph_unsafe``.

    Examples
    --------
    >>> import torch, kvkernels
    >>> k, v = torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
    >>> kvkernels.scatter_blocks(torch.tensor([[5, 6, 9]], dtype=torch.uint8), torch.tensor([1]), [k, v])
    >>> k.tolist(), v.tolist()
    ([[0, 0], [5, 6], [0, 0]], [[0], [9], [0]])
    """
    _scatter_blocks(buffer, block_ids, pools, executor, sm_budget)


def copy_pages(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    mapping: Tensor,
    runs: Tensor,
    src_subblocks_per_block: int = 1,
    dst_subblocks_per_block: int = 1,
    skip_negative: bool = False,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    """Copy pages between pools of different layouts: the general op, of which the others are short forms.

    For every pair of ids of ``mapping``, every run copies its nest of fragments from the source's page to the
    destination's.

    Parameters
    ----------
    src, dst : sequence of Tensor
        Pools of any dtypes, each list on one device. Dimension 0 is the block id; a row (page) must be contiguous, and
        the stride of dimension 0 may exceed it.
    mapping : Tensor
        int64 or int32, shape ``[n, 2]``, any strides, on the CPU or on the CUDA device of ``src``, or else of ``dst``:
        (source id, destination id). An id is that of a sub-block: block ``id // subblocks``, sub-block
        ``id % subblocks``.
    runs : Tensor
        int64, shape ``[r, 16]``, on the CPU. In bytes: ``src_pool, dst_pool, src_offset, dst_offset, fragment_bytes,
        src_subblock_stride, dst_subblock_stride``, then three loops ``extent, src_stride, dst_stride``, outermost
        first; an unused loop has extent 1. Offsets count from the start of a page, strides may be negative.
    src_subblocks_per_block, dst_subblocks_per_block : int
        Sub-blocks in a block, 1 where ids name blocks.
    skip_negative : bool
        Skip a pair with a negative id in either column; otherwise a negative id is out of range.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Raises
    ------
    IndexError
        An id on the CPU is out of range of the list's pool with the fewest blocks.
    ValueError
        A wrong shape, dtype, layout, device or executor; a run that leaves its page, overflows int64 or writes a byte
        that it or another run writes, over all sub-blocks; one destination from two sources; ``dst`` pools that share
        bytes where they are written; a byte both read and written.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and the destination is undefined.

    Notes
    -----
    Nothing is written by a call that raises IndexError or ValueError. An identical pair that comes twice is copied
    once. No pair and no run still check the arguments, then do nothing. Overlap is judged on the bytes touched: K and
    V interleaved in one tensor are fine, and so is one tensor as source and destination.

    With a tensor on a CUDA device the copy is ordered on that device's current stream and the call does not wait for
    it. From the CPU to the CPU it is done when the call returns.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    Ids on a CUDA device are checked there: a pair with an id out of range is skipped and recorded, and
    ``kvkernels.check_device`` raises. That no destination comes twice and no memory overlaps is then the caller's
    promise. A CUDA graph that captures the call freezes ids that are on the CPU and reads ids that are on the device
    anew. The op has the tag ``cudagraph_unsafe``.

    Examples
    --------
    Two tokens of two heads, from token-first (NHD) to head-first (HND) pages, one byte a head:

    >>> import torch, kvkernels
    >>> nhd = torch.arange(4, dtype=torch.uint8).reshape(1, 4)
    >>> hnd = torch.zeros(1, 4, dtype=torch.uint8)
    >>> runs = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 2, 2, 1, 2, 1, 2, 1, 0, 0]])
    >>> kvkernels.copy_pages([nhd], [hnd], torch.tensor([[0, 0]]), runs)
    >>> hnd.tolist()
    [[0, 2, 1, 3]]
    """
    _copy_pages(
        src,
        dst,
        mapping,
        runs,
        src_subblocks_per_block,
        dst_subblocks_per_block,
        skip_negative,
        executor,
        sm_budget,
    )


def concat_tp_shards(shards: Sequence[Tensor], dim: int, executor: str = "auto", sm_budget: int = 0) -> Tensor:
    """Join tensor-parallel shards along a dimension into a new tensor.

    Parameters
    ----------
    shards : sequence of Tensor
        At least one, of one dtype (any that torch has, but quantized ones, whose scale the result would lack) and one
        device, any strides, equal in every dimension but ``dim``.
    dim : int
        The dimension of the shards, from ``-ndim`` to ``ndim - 1``.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Returns
    -------
    Tensor
        Contiguous, of the shards' dtype and device; never a view, even of one shard.

    Raises
    ------
    ValueError
        No shards, shards that do not fit together, or a wrong executor.
    RuntimeError
        CUDA failed; the message has CUDA's name for it.

    Notes
    -----
    Bytes are copied, not values: NaN payloads are kept. On a CUDA device the work and the result's memory are ordered
    on the current stream, and a CUDA graph may capture the call.

    Examples
    --------
    >>> import torch, kvkernels
    >>> kvkernels.concat_tp_shards([torch.tensor([[1], [2]]), torch.tensor([[3, 4], [5, 6]])], 1).tolist()
    [[1, 3, 4], [2, 5, 6]]
    """
    result: Tensor = _concat_tp_shards(shards, dim, executor, sm_budget)
    return result


def concat_tp_shards_out(
    shards: Sequence[Tensor], dim: int, out: Tensor, executor: str = "auto", sm_budget: int = 0
) -> None:
    """Join tensor-parallel shards along a dimension into a given tensor.

    Parameters
    ----------
    shards : sequence of Tensor
        At least one, of one dtype (any that torch has) and one device, any strides, equal in every dimension but
        ``dim``.
    dim : int
        The dimension of the shards, from ``-ndim`` to ``ndim - 1``.
    out : Tensor
        Of the shards' dtype and of the joined shape, any strides that do not overlap; may be a view.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Raises
    ------
    ValueError
        No shards, shards that do not fit together or into ``out``, a wrong executor, or ``out`` sharing bytes with
        itself or with a shard; in a compiled graph also where only a clone in the graph keeps them apart, which
        inductor may drop.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and ``out`` is undefined.

    Notes
    -----
    Bytes are copied, not values: NaN payloads are kept. Nothing is written by a call that raises ValueError. With a
    tensor on a CUDA device the copy is ordered on that device's current stream, the call does not wait for it, and a
    CUDA graph may capture it. From the CPU to the CPU it is done when the call returns.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    Examples
    --------
    >>> import torch, kvkernels
    >>> out = torch.zeros(2, 3, dtype=torch.int64)
    >>> kvkernels.concat_tp_shards_out([torch.tensor([[1], [2]]), torch.tensor([[3, 4], [5, 6]])], 1, out)
    >>> out.tolist()
    [[1, 3, 4], [2, 5, 6]]
    """
    _concat_tp_shards_out(shards, dim, out, executor, sm_budget)


def split_tp_shards(input: Tensor, dim: int, out: Sequence[Tensor], executor: str = "auto", sm_budget: int = 0) -> None:
    """Cut a tensor along a dimension into given tensor-parallel shards: the inverse of ``concat_tp_shards_out``.

    Parameters
    ----------
    input : Tensor
        Any dtype that torch has, any strides, on the CPU or on a CUDA device.
    dim : int
        The dimension of the shards, from ``-ndim`` to ``ndim - 1``.
    out : sequence of Tensor
        At least one, of ``input``'s dtype, on one device, any strides that do not overlap; sizes equal ``input``'s but
        for ``dim``, where they add up to it. May be views.
    executor : {'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'}
        What carries the copy out. A named one that cannot serve the call raises; another is never run instead.
    sm_budget : int
        The most SMs that ``kernel``, ``bulk``, ``staged`` and ``triton`` may use; 0 for the policy's default.

    Raises
    ------
    ValueError
        No shards, shards that do not fit ``input``, a wrong executor, or shards that share bytes with each other or
        with ``input``; in a compiled graph also where only a clone in the graph keeps them apart, which inductor may
        drop.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and ``out`` is undefined.

    Notes
    -----
    Bytes are copied, not values: NaN payloads are kept. Nothing is written by a call that raises ValueError. With a
    tensor on a CUDA device the copy is ordered on that device's current stream, the call does not wait for it, and a
    CUDA graph may capture it. From the CPU to the CPU it is done when the call returns.

    From one CUDA device to another the copy runs on the source's device, in its current stream, if that device can
    access the other's memory (else ValueError). It begins after what the destination's current stream had to do, and
    what follows there waits for it, as with torch's own copies. Not yet run on hardware.

    Examples
    --------
    >>> import torch, kvkernels
    >>> left, right = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    >>> kvkernels.split_tp_shards(torch.tensor([[1, 3, 4], [2, 5, 6]]), 1, [left, right])
    >>> left.tolist(), right.tolist()
    ([[1], [2]], [[3, 4], [5, 6]])
    """
    _split_tp_shards(input, dim, out, executor, sm_budget)
