"""Watches a worker from outside: what each job did to every byte of both pools.

It knows nothing of the worker's mappings. From the two lists of ids that the connector hands over it works out, page by
page, what the destination must look like afterwards, and compares all of it: pages asked for, and all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from engine import digest

Pages = list[torch.Tensor]


class Move(NamedTuple):
    """One page of a job. ``place`` is the block's in its request."""

    group: int
    place: int
    device_id: int
    host_id: int
    ref: Any


class LoadedBlock(NamedTuple):
    group: int
    place: int
    device_id: int
    pages: list[bytes]


class Audit:
    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.enabled = True
        self.findings: list[str] = []
        # Direction, bytes and seconds of each finished job, as the worker reports them.
        self.reported: list[tuple[str, int, float]] = []
        self.expected_bytes = 0
        self.jobs = 0
        # Blocks loaded, with the digests of their layers' pages as of then.
        self.loaded: list[LoadedBlock] = []
        # (tensor, host block) to the digest of what was parked there last.
        self._parked: dict[tuple[int, int], bytes] = {}
        self._directions: dict[int, str] = {}
        self._submit = {"store": worker.submit_store, "load": worker.submit_load}
        self._get_finished = worker.get_finished
        worker.submit_store = lambda job, src, dst: self._watch("store", job, src, dst)
        worker.submit_load = lambda job, src, dst: self._watch("load", job, src, dst)
        worker.get_finished = self._finished

    def _watch(self, direction: str, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._directions[job_id] = direction
        device_spec, host_spec = (src_spec, dst_spec) if direction == "store" else (dst_spec, src_spec)
        moves = list(self._moves(device_spec, host_spec))
        self.jobs += 1
        self.expected_bytes += sum(move.ref.page_size_bytes for move in moves)
        if not self.enabled:
            return self._submit[direction](job_id, src_spec, dst_spec)
        device, host = self.worker.device, self.worker.host
        src, dst = (device, host) if direction == "store" else (host, device)
        src_before, expected = [pages.clone() for pages in src], [pages.clone() for pages in dst]
        for move in moves:
            src_id, dst_id = move.device_id, move.host_id
            if direction == "load":
                src_id, dst_id = dst_id, src_id
            page = slice(0, move.ref.page_size_bytes)
            expected[move.ref.tensor_idx][dst_id, page] = src_before[move.ref.tensor_idx][src_id, page]
        submitted = self._submit[direction](job_id, src_spec, dst_spec)
        self._compare(f"{direction} {job_id}: destination", dst, expected)
        self._compare(f"{direction} {job_id}: source", src, src_before)
        self._follow(direction, job_id, moves)
        return submitted

    def _moves(self, device_spec: Any, host_spec: Any) -> Iterator[Move]:
        chunk_blocks = self.worker.blocks_per_chunk
        device_ids, chunk_ids = iter(device_spec.block_ids.tolist()), iter(host_spec.block_ids.tolist())
        for group, (count, first) in enumerate(zip(device_spec.group_sizes, device_spec.block_indices, strict=True)):
            chunk_id = -1
            for place in range(first, first + count):
                if place == first or place % chunk_blocks == 0:
                    chunk_id = next(chunk_ids)
                device_id = next(device_ids)
                host_id = chunk_id * chunk_blocks + place % chunk_blocks
                for ref in self.worker.groups[group]:
                    yield Move(group, place, device_id, host_id, ref)

    def _compare(self, what: str, pages: Pages, expected: Pages) -> None:
        for index, (got, want) in enumerate(zip(pages, expected, strict=True)):
            if not torch.equal(got, want):
                wrong = (got != want).any(dim=1).nonzero().flatten().tolist()
                self.findings.append(f"job: {what}: tensor {index}, blocks {wrong[:8]} of {len(got)} are wrong")

    def _follow(self, direction: str, job_id: int, moves: list[Move]) -> None:
        """Keeps the digest of what is parked, and compares what comes back with it."""
        loaded: dict[tuple[int, int, int], list[bytes]] = {}
        for group, place, device_id, host_id, ref in moves:
            page = digest(self.worker.device[ref.tensor_idx][device_id, : ref.page_size_bytes])
            if direction == "store":
                self._parked[ref.tensor_idx, host_id] = page
                continue
            loaded.setdefault((group, place, device_id), []).append(page)
            if self._parked.get((ref.tensor_idx, host_id)) != page:
                self.findings.append(
                    f"job: load {job_id}: tensor {ref.tensor_idx}, block {device_id} is not what was stored"
                )
        self.loaded += [LoadedBlock(*block, pages) for block, pages in loaded.items()]

    def _finished(self) -> list[Any]:
        results = self._get_finished()
        for result in results:
            direction = self._directions.pop(result.job_id)
            self.reported.append((direction, result.transfer_size, result.transfer_time))
        return results
