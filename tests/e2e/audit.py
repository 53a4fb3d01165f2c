"""Watches a worker from outside: what each job did to every byte of both pools.

From the two lists of ids that vLLM's connector hands over, and vLLM's own list of the layers, it works out page by page
what the destination must look like, and compares all of it: pages asked for, and all others. Of the worker it uses the
host pool, a row a block. It waits for each copy at once, so that nothing else happens meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import kvkernels
from engine import Engine, digest

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
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.enabled = True
        self.findings: list[str] = []
        # Direction, bytes and seconds of each finished job, as the worker reports them.
        self.reported: list[tuple[str, int, float]] = []
        self.expected_bytes = 0
        self.jobs = 0
        self.waits = 0
        # Blocks loaded, with the digests of their layers' pages as of then.
        self.loaded: list[LoadedBlock] = []
        # (tensor, host block) to the digest of what was parked there last.
        self._parked: dict[tuple[int, int], bytes] = {}
        self._unfinished: dict[int, str] = {}
        worker = engine.worker
        self._host = worker.host_worker.host
        self._submit = {"store": worker.submit_store, "load": worker.submit_load}
        self._get_finished, self._wait = worker.get_finished, worker.wait
        worker.submit_store = lambda job, src, dst: self._watch("store", job, src, dst)
        worker.submit_load = lambda job, src, dst: self._watch("load", job, src, dst)
        worker.get_finished, worker.wait = self._finished, self._waited
        kvkernels.reset_counters()

    def _watch(self, direction: str, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._unfinished[job_id] = direction
        device_spec, host_spec = (src_spec, dst_spec) if direction == "store" else (dst_spec, src_spec)
        moves = list(self._moves(device_spec, host_spec))
        self.jobs += 1
        self.expected_bytes += sum(move.ref.page_size_bytes for move in moves)
        if not self.enabled:
            return self._submit[direction](job_id, src_spec, dst_spec)
        device, host = self.engine.device, self._host
        src, dst = (device, host) if direction == "store" else (host, device)
        src_before, expected = [pages.clone() for pages in src], [pages.clone() for pages in dst]
        for move in moves:
            src_id, dst_id = move.device_id, move.host_id
            if direction == "load":
                src_id, dst_id = dst_id, src_id
            page = slice(0, move.ref.page_size_bytes)
            expected[move.ref.tensor_idx][dst_id, page] = src_before[move.ref.tensor_idx][src_id, page]
        submitted = self._submit[direction](job_id, src_spec, dst_spec)
        self._wait({job_id})
        self._compare(f"{direction} {job_id}: destination", dst, expected)
        self._compare(f"{direction} {job_id}: source", src, src_before)
        self._follow(direction, job_id, moves)
        return submitted

    def _moves(self, device_spec: Any, host_spec: Any) -> Iterator[Move]:
        chunk_blocks = self.engine.blocks_per_chunk
        device_ids, chunk_ids = iter(device_spec.block_ids.tolist()), iter(host_spec.block_ids.tolist())
        for group, (count, first) in enumerate(zip(device_spec.group_sizes, device_spec.block_indices, strict=True)):
            chunk_id = -1
            for place in range(first, first + count):
                if place == first or place % chunk_blocks == 0:
                    chunk_id = next(chunk_ids)
                device_id = next(device_ids)
                host_id = chunk_id * chunk_blocks + place % chunk_blocks
                for ref in self.engine.layers[group]:
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
            page = digest(self.engine.device[ref.tensor_idx][device_id, : ref.page_size_bytes])
            if direction == "store":
                self._parked[ref.tensor_idx, host_id] = page
                continue
            loaded.setdefault((group, place, device_id), []).append(page)
            if self._parked.get((ref.tensor_idx, host_id)) != page:
                what = f"tensor {ref.tensor_idx}, block {device_id}"
                self.findings.append(f"job: load {job_id}: {what} is not what was stored")
        self.loaded += [LoadedBlock(*block, pages) for block, pages in loaded.items()]

    def _finished(self) -> list[Any]:
        pools = [*self.engine.device, *self._host] if self.enabled and self._unfinished else []
        before = [pages.clone() for pages in pools]
        results = self._get_finished()
        self._compare("get_finished", pools, before)
        for result in results:
            direction = self._unfinished.pop(result.job_id)
            self.reported.append((direction, result.transfer_size, result.transfer_time))
        return results

    def _waited(self, job_ids: set[int]) -> None:
        self.waits += 1
        self._wait(job_ids)

    def check_counters(self) -> None:
        """The compiled op carried all of it, and exactly it, and the worker says so."""
        info, counters = kvkernels.info(), kvkernels.counters()
        if not info["compiled"]:
            self.findings.append(f"compiled: no: {info['why']}")
        used = sorted(executor for executor, counted in counters.items() if counted["calls"])
        if used != ["cpu"]:
            self.findings.append(f"op calls: by {used or 'no executor'}, expected the compiled cpu executor alone")
        issued, reported = counters["cpu"]["bytes"], sum(size for _, size, _ in self.reported)
        if not issued or {issued, reported} != {self.expected_bytes}:
            asked = f"{self.expected_bytes} were asked for"
            self.findings.append(f"bytes: {issued} copied by the op and {reported} reported by the worker, {asked}")
