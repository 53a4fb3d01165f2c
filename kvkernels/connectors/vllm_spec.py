"""What vLLM's OffloadingConnector asks of a place to offload to: ours is a host pool."""

from __future__ import annotations

from typing import Any

from kvkernels.connectors.books import HostBooks
from kvkernels.connectors.rows import num_chunks
from kvkernels.connectors.vllm_manager import METRICS, HostManager
from kvkernels.connectors.vllm_version import OffloadingSpec, OffloadingWorker, TransferResult
from kvkernels.connectors.worker import HostWorker


class KVKernelsOffloadingSpec(OffloadingSpec):
    """A host pool for vLLM's own OffloadingConnector; ``KVKernelsConnector`` makes one for itself.

    Under vLLM's own connector **a job that fails ends the engine**, with an assertion: the only other thing it knows is
    to go on with a request's wrong KV. ``KVKernelsConnector`` has a third way.

    In ``kv_connector_extra_config``, beside what vLLM itself reads there:

    - ``cpu_bytes_to_use``: the pool's bytes, those of all ranks together;
    - ``eviction_policy``: ``lru`` by default, or another name that ``kvkernels.memory.make_policy`` takes;
    - ``verify``: whether each block has a checksum, false by default;
    - ``lanes``: cores that copies may use, as ``kvkernels.transfer.Mover`` takes it.

    Raises
    ------
    ValueError
        One of these is missing, or makes no sense.
    """

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return dict(METRICS)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        extra = self.extra_config
        if "cpu_bytes_to_use" not in extra:
            raise ValueError("KVKernelsOffloadingSpec: kv_connector_extra_config must have cpu_bytes_to_use")
        self.verify = extra.get("verify", False)
        if not isinstance(self.verify, bool):
            raise ValueError(f"KVKernelsOffloadingSpec: verify must be true or false, got {self.verify!r}")
        ranks = config.parallel.world_size
        #: Ranks that have the same bytes share one pool. vLLM's name for that would have rank 0 alone store.
        self.is_shared = bool(config.replicated_layout) and ranks > 1
        self.num_chunks = num_chunks(
            int(extra["cpu_bytes_to_use"]), config.worker_kv_bytes_per_block, self.blocks_per_chunk,
            1 if self.is_shared else ranks, verify=self.verify,
        )  # fmt: skip
        #: vLLM's ids of the groups in which a chunk is worth nothing without those before it; the connector knows.
        self.chained: tuple[int, ...] = ()
        #: Positions of the groups that are restored before the others, likewise.
        self.states: tuple[int, ...] = ()
        self._manager: HostManager | None = None
        self._worker: SpecWorker | None = None

    def get_manager(self) -> HostManager:
        if self._manager is None:
            tokens = {
                group.group_id: group.tokens_per_block * self.blocks_per_chunk
                for group in self.config.groups if group.group_id in self.chained
            }  # fmt: skip
            books = HostBooks(self.num_chunks, self.extra_config.get("eviction_policy", "lru"))
            self._manager = HostManager(books, tokens, self.kv_events_config.enable_kv_cache_events)
        return self._manager

    def get_worker(self, kv_caches: Any) -> SpecWorker:
        if self._worker is None:
            block_bytes = sum(cache.page_size_bytes for cache in kv_caches.tensors)
            if block_bytes > self.config.worker_kv_bytes_per_block:
                raise ValueError(
                    f"KVKernelsOffloadingSpec: kv_caches must have blocks of the "
                    f"{self.config.worker_kv_bytes_per_block} bytes that vLLM planned, got {block_bytes}"
                )
            parallel = self.config.parallel
            host = HostWorker(
                kv_caches, self.num_chunks, self.blocks_per_chunk, states=self.states, verify=self.verify,
                lanes=self.extra_config.get("lanes"), rank=parallel.rank, ranks=parallel.world_size,
                shared=f"kvkernels:{self.config.engine_id}"[:64] if self.is_shared else None,
            )  # fmt: skip
            self._worker = SpecWorker(host)
        return self._worker


class SpecWorker(OffloadingWorker):
    """``HostWorker`` in vLLM's words."""

    def __init__(self, host: HostWorker) -> None:
        self.host_worker = host

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.host_worker.submit_store(
            job_id, src_spec.block_ids, dst_spec.block_ids, src_spec.group_sizes, src_spec.block_indices
        )
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        self.host_worker.submit_load(
            job_id, src_spec.block_ids, dst_spec.block_ids, dst_spec.group_sizes, dst_spec.block_indices,
            expedited=expedited,
        )  # fmt: skip
        return True

    def get_finished(self) -> list[Any]:
        return [
            TransferResult(one.job_id, one.error is None, one.bytes, one.seconds)
            for one in self.host_worker.finished()
        ]  # fmt: skip

    def wait(self, job_ids: set[int]) -> None:
        self.host_worker.wait(job_ids)

    def shutdown(self) -> None:
        self.host_worker.close()
