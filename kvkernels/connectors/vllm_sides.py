"""The two sides of vLLM's OffloadingConnector, changed so that a copy may fail."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kvkernels.connectors.vllm_manager import HostManager
from kvkernels.connectors.vllm_version import (
    KVConnectorTransferResults,
    OffloadingConnectorScheduler,
    OffloadingConnectorWorker,
    OffloadingWorkerMetadata,
    without_expedited_loads,
)
from kvkernels.connectors.worker import HostWorker


@dataclass
class HostWorkerMetadata(OffloadingWorkerMetadata):
    """What a worker tells the scheduler: which jobs are over, as vLLM has it, and which of those failed."""

    failed_jobs: set[int] = field(default_factory=set)

    def aggregate(self, other: Any) -> HostWorkerMetadata:
        """Of two ranks: a job that failed on one has failed."""
        merged = super().aggregate(other)
        both = {one.name: getattr(merged, one.name) for one in fields(OffloadingWorkerMetadata)}
        return HostWorkerMetadata(**both, failed_jobs=self.failed_jobs | getattr(other, "failed_jobs", set()))


class SchedulerSide(OffloadingConnectorScheduler):
    """Drops the keys of jobs that failed, and gives no chunk out again that a copy of before a reset uses.

    Which blocks to load and to store is vLLM's decision.
    """

    manager: HostManager
    config: Any

    def __init__(self, spec: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) > 1:
            # There is no way to say of a model with several groups which blocks a load of this very step spoilt.
            self.config = without_expedited_loads(self.config)
        self._failed: set[int] = set()
        #: Jobs of before a reset that have not ended on every rank.
        self._before_reset: dict[int, Any] = {}

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if meta is not None:
            self._failed |= meta.failed_jobs
            for job_id, count in meta.completed_jobs.items():
                self._end(job_id, count)
        super().update_connector_output(connector_output)

    def _end(self, job_id: int, count: int) -> None:
        """So many ranks are through with a job."""
        job = self._before_reset.get(job_id)
        if job is not None:
            job.pending_count -= count
            if job.pending_count <= 0:
                del self._before_reset[job_id]
                self._failed.discard(job_id)
                self.manager.end_of_before_reset(job.keys, job.is_store)
            return
        job = self._jobs.get(job_id)
        if job is not None and job_id in self._failed and job.pending_count <= count:
            self._failed.discard(job_id)
            self.manager.fail(job.keys, is_store=job.is_store)

    def reset_cache(self) -> None:
        in_flight = dict(self._jobs)
        super().reset_cache()
        self._before_reset.update(in_flight)


class WorkerSide(OffloadingConnectorWorker):
    """Takes note of jobs that failed, which vLLM's own refuses to see."""

    def __init__(self, spec: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        self._connector_worker_meta = HostWorkerMetadata()

    def get_transfer_results(self) -> Any:
        """What is over. A request whose load failed is among the finished ones too, so that it goes on."""
        results = KVConnectorTransferResults()
        meta = self._connector_worker_meta
        for result in self.worker.get_finished():
            is_load = result.job_id in self._load_jobs
            meta.mark_completed(result.job_id)
            # None: the request was not waiting for it.
            request = self._load_jobs.pop(result.job_id, None)
            if request is not None:
                results.finished_recving.add(request)
            if result.success:
                stats = meta.transfer_stats.load if is_load else meta.transfer_stats.store
                stats.record(result.transfer_size, result.transfer_time)
                continue
            meta.failed_jobs.add(result.job_id)
            if request is not None:
                results.failed_recving.add(request)
        return results

    def build_connector_worker_meta(self) -> Any:
        meta = super().build_connector_worker_meta()
        if meta is not None:
            self._connector_worker_meta = HostWorkerMetadata()
        return meta

    def take_bad_blocks(self) -> set[int]:
        """Blocks that this step's model read, and that a load did not fill; of models with one group."""
        return self._host.take_bad_blocks()

    def unbind(self) -> None:
        """The engine's KV cache is about to go."""
        self._host.unbind()

    def bind(self) -> None:
        """It is there again."""
        self._host.bind()

    @property
    def _host(self) -> HostWorker:
        host: HostWorker = self.worker.host_worker
        return host
