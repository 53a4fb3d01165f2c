"""vLLM's KV cache parked in host memory, with kvkernels moving the bytes.

vLLM's OffloadingConnector does the thinking: which blocks to park, where in the host pool they go, when a request gets
them back. A *spec* like those below supplies a *worker*, which owns the host pool and copies. What the connector tells
the worker for each job is ids of blocks on the device and ids of chunks in the host pool:

    device tensor: a row is a block           host tensor: a row is a chunk of blocks_per_chunk blocks

        block 7  ------------------------>  chunk 2, first   = host block 6      (blocks_per_chunk = 3)
        block 4  ------------------------>  chunk 2, second  = host block 7
        block 9  ------------------------>  chunk 2, third   = host block 8

So a job is a mapping of block ids, [[7, 6], [4, 7], [9, 8]] here: the form in which kvkernels takes it. A *group* is
the layers that share one block table; a hybrid model has several, and a job lists the blocks of each in turn.
"""

import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

import kvkernels  # noqa: F401  (registers torch.ops.kvkernels)


def host_block_ids(chunk_ids: np.ndarray, blocks_per_chunk: int, skip: int, count: int) -> np.ndarray:
    """``count`` consecutive blocks of the host pool, from ``skip`` blocks into the first chunk."""
    blocks = chunk_ids[:, None].astype(np.int64) * blocks_per_chunk + np.arange(blocks_per_chunk)
    return blocks.ravel()[skip : skip + count]


def group_mappings(device: GPULoadStoreSpec, host: CPULoadStoreSpec, blocks_per_chunk: int) -> list[torch.Tensor]:
    """Each group's (device block, host block) pairs, int64 ``[n, 2]``.

    A group's first block may stand in the middle of a chunk: ``block_indices`` has its place in the request.
    """
    mappings = []
    first_block = first_chunk = 0
    for count, block_index in zip(device.group_sizes, device.block_indices, strict=True):
        skip = block_index % blocks_per_chunk if count else 0
        chunks = -(-(skip + count) // blocks_per_chunk)
        device_ids = device.block_ids[first_block : first_block + count]
        host_ids = host_block_ids(host.block_ids[first_chunk : first_chunk + chunks], blocks_per_chunk, skip, count)
        mappings.append(torch.from_numpy(np.stack([device_ids, host_ids], axis=1)))
        first_block, first_chunk = first_block + count, first_chunk + chunks
    if (first_block, first_chunk) != (len(device.block_ids), len(host.block_ids)):
        raise ValueError(
            f"a job of {len(device.block_ids)} blocks and {len(host.block_ids)} chunks has groups that hold "
            f"{first_block} blocks in {first_chunk} chunks"
        )
    return mappings


class Job(NamedTuple):
    """One transfer. ``start`` and ``end`` are CUDA events, or seconds where the copy is done when the call returns."""

    job_id: int
    transfer_bytes: int
    start: torch.cuda.Event | float
    end: torch.cuda.Event | float


class SwapBlocksWorker(OffloadingWorker):
    """Owns the host pool and copies with one ``swap_blocks`` a tensor."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int, blocks_per_chunk: int) -> None:
        self.blocks_per_chunk = blocks_per_chunk
        self.groups = kv_caches.group_data_refs
        self.device = [cache.tensor for cache in kv_caches.tensors]
        on_gpu = self.device[0].is_cuda
        # One row a block, so that one mapping serves both sides whatever blocks_per_chunk is.
        self.host = [
            torch.zeros(num_chunks * blocks_per_chunk, pages.shape[1], dtype=torch.int8, pin_memory=on_gpu)
            for pages in self.device
        ]
        # A stream of its own: the model goes on computing while pages move. One for both directions keeps the jobs in
        # order; two, with an event from each job to the next, could use both ways of the link at once.
        self.stream = torch.cuda.Stream(self.device[0].device) if on_gpu else None
        self.jobs: deque[Job] = deque()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        mappings = group_mappings(src_spec, dst_spec, self.blocks_per_chunk)
        self._run(job_id, self.device, self.host, mappings)
        return True

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        mappings = group_mappings(dst_spec, src_spec, self.blocks_per_chunk)
        self._run(job_id, self.host, self.device, [mapping.flip(1) for mapping in mappings])
        return True

    def copy(self, src: list[torch.Tensor], dst: list[torch.Tensor], mappings: list[torch.Tensor]) -> int:
        """Copies every group's pages and returns their bytes."""
        # Groups may share a tensor, in which each has blocks of its own; their pages may differ in length.
        mappings_of: dict[tuple[int, int], list[torch.Tensor]] = {}
        for refs, mapping in zip(self.groups, mappings, strict=True):
            for ref in refs if len(mapping) else ():
                mappings_of.setdefault((ref.tensor_idx, ref.page_size_bytes), []).append(mapping)
        copied = 0
        for (index, page_bytes), parts in mappings_of.items():
            mapping = torch.cat(parts)
            torch.ops.kvkernels.swap_blocks(src[index][:, :page_bytes], dst[index][:, :page_bytes], page_bytes, mapping)
            copied += len(mapping) * page_bytes
        return copied

    def _run(self, job_id: int, src: list[torch.Tensor], dst: list[torch.Tensor], mappings: list[torch.Tensor]) -> None:
        if self.stream is None:
            start = time.perf_counter()
            copied = self.copy(src, dst, mappings)
            self.jobs.append(Job(job_id, copied, start, time.perf_counter()))
            return
        # Pages must not be read before the model has written them, nor overwritten while it reads them.
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            copied = self.copy(src, dst, mappings)
            end.record()
        self.jobs.append(Job(job_id, copied, start, end))

    def get_finished(self) -> list[TransferResult]:
        finished = []
        while self.jobs and (self.stream is None or self.jobs[0].end.query()):
            job = self.jobs.popleft()
            seconds = job.end - job.start if self.stream is None else job.start.elapsed_time(job.end) / 1e3
            finished.append(TransferResult(job.job_id, True, job.transfer_bytes, seconds))
        return finished

    def wait(self, job_ids: set[int]) -> None:
        if self.stream is not None:
            for job in self.jobs:
                if job.job_id in job_ids:
                    job.end.synchronize()

    def shutdown(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        self.jobs.clear()
        self.device, self.host = [], []


class CopyPagesWorker(SwapBlocksWorker):
    """The same with one ``copy_pages`` a group: all its layers at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int, blocks_per_chunk: int) -> None:
        super().__init__(kv_caches, num_chunks, blocks_per_chunk)
        # A run is what is copied of a page. Here: all of layer i's. Pools i and i, offsets 0 and 0, bytes; no loops.
        self.runs = [
            torch.tensor([[i, i, 0, 0, ref.page_size_bytes, 0, 0] + [1, 0, 0] * 3 for i, ref in enumerate(refs)])
            for refs in self.groups
        ]

    def copy(self, src: list[torch.Tensor], dst: list[torch.Tensor], mappings: list[torch.Tensor]) -> int:
        copied = 0
        for refs, runs, mapping in zip(self.groups, self.runs, mappings, strict=True):
            if len(mapping):
                layers = [ref.tensor_idx for ref in refs]
                torch.ops.kvkernels.copy_pages([src[i] for i in layers], [dst[i] for i in layers], mapping, runs)
                copied += len(mapping) * sum(ref.page_size_bytes for ref in refs)
        return copied


class SwapBlocksSpec(CPUOffloadingSpec):
    """What ``spec_name`` names. The scheduler's half, ``get_manager``, is vLLM's own."""

    worker_class = SwapBlocksWorker

    def _uses_shared_region(self) -> bool:
        """No: each rank has a host pool of its own, so each must store what it will load."""
        return False

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self.num_chunks == 0:
            bytes_to_use, chunk_bytes = self.extra_config["cpu_bytes_to_use"], self.kv_bytes_per_chunk
            raise ValueError(f"cpu_bytes_to_use must hold a chunk of {chunk_bytes} bytes, got {bytes_to_use}")
        if self._worker is None:
            self._worker = self.worker_class(kv_caches, self.num_chunks, self.blocks_per_chunk)
        return self._worker


class CopyPagesSpec(SwapBlocksSpec):
    worker_class = CopyPagesWorker
