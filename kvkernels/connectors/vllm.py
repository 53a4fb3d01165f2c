"""vLLM's KV cache in host memory, moved and kept by this library: see docs/vllm.md.

--kv-transfer-config '{"kv_connector": "KVKernelsConnector", "kv_connector_module_path": "kvkernels.connectors.vllm",
    "kv_role": "kv_both", "kv_connector_extra_config": {"cpu_bytes_to_use": 1073741824}}'
"""

from __future__ import annotations

import copy
from typing import Any

from kvkernels.connectors.groups import choose_groups
from kvkernels.connectors.vllm_capture import CaptureRequests, CaptureWriter
from kvkernels.connectors.vllm_sides import SchedulerSide, WorkerSide
from kvkernels.connectors.vllm_spec import KVKernelsOffloadingSpec
from kvkernels.connectors.vllm_version import (
    KVConnectorRole,
    OffloadingConnector,
    OffloadPromMetrics,
    build_offloading_config,
    get_offloading_group_ids,
)

__all__ = ["KVKernelsConnector", "KVKernelsOffloadingSpec"]


class KVKernelsConnector(OffloadingConnector):
    """vLLM's OffloadingConnector with a pool, books and copies of this library, which a failed copy does not end.

    A load that fails costs its request the cached prefix: it is computed anew, or fails, by vLLM's
    ``kv_load_failure_policy``. Its chunks leave the pool, and so do those of a store that failed.

    ``kv_connector_extra_config`` has what ``KVKernelsOffloadingSpec`` says, and

    - ``attention_group``: the KV cache group that is attention, where the model leaves that open;
    - ``capture_dir``: the folder for captures that requests ask for; without it there are none.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # Not OffloadingConnector's own, which would make vLLM's spec and sides.
        super(OffloadingConnector, self).__init__(vllm_config, role, kv_cache_config)
        config = build_offloading_config(vllm_config, kv_cache_config)
        self._canonical_layout = config.canonical_layout
        spec = KVKernelsOffloadingSpec(config)
        group_ids = get_offloading_group_ids(kv_cache_config)
        groups = [kv_cache_config.kv_cache_groups[group_id] for group_id in group_ids]
        choice = choose_groups(groups, config.extra_config.get("attention_group"))
        spec.chained = tuple(group_ids[group] for group in choice.chained)
        spec.states = choice.states
        ranks = vllm_config.parallel_config.world_size
        self._captures = CaptureRequests(config.extra_config.get("capture_dir"), ranks)
        self._capture_writer = CaptureWriter(vllm_config, kv_cache_config)
        self.connector_scheduler: SchedulerSide | None = None
        self.connector_worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = SchedulerSide(spec, vllm_config, kv_cache_config)
        else:
            self.connector_worker = WorkerSide(spec, vllm_config, kv_cache_config)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        self._captures.on_matched(request, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> Any:
        self._captures.on_allocated(request, num_external_tokens)
        return super().update_state_after_alloc(request, blocks, num_external_tokens)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        keeps_blocks, said = super().request_finished_all_groups(request, block_ids)
        captured = self._captures.on_finished(request, block_ids)
        return keeps_blocks, said if captured is None else {**(said or {}), **captured}

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        meta.kvkernels_captures = self._captures.take()
        return meta

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        # The step's first call, before anything writes to blocks that were given back.
        self._capture_writer.write(getattr(kv_connector_metadata, "kvkernels_captures", ()))
        super().handle_preemptions(kv_connector_metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        return self._worker_side.get_transfer_results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker_side.take_bad_blocks()

    def unregister_kv_caches(self) -> None:
        """Before the engine sleeps."""
        self._worker_side.unbind()

    def restore_kv_caches(self) -> None:
        """After it woke."""
        self._worker_side.bind()

    @property
    def _worker_side(self) -> WorkerSide:
        if self.connector_worker is None:
            raise RuntimeError("KVKernelsConnector: this must be asked of a worker, got the scheduler's side")
        return self.connector_worker

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        """vLLM looks up by name which spec has which metrics."""
        ours = copy.copy(vllm_config)
        ours.kv_transfer_config = copy.copy(vllm_config.kv_transfer_config)
        ours.kv_transfer_config.kv_connector_extra_config = {
            **vllm_config.kv_transfer_config.kv_connector_extra_config,
            "spec_name": KVKernelsOffloadingSpec.__name__,
            "spec_module_path": __name__,
        }
        return OffloadPromMetrics(ours, metric_types, labelnames, per_engine_labelvalues)
