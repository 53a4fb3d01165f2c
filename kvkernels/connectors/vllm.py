"""vLLM's KV cache in host memory, moved and kept by this library: see docs/vllm.md.

--kv-transfer-config '{"kv_connector": "KVKernelsConnector", "kv_connector_module_path": "kvkernels.connectors.vllm",
    "kv_role": "kv_both", "kv_connector_extra_config": {"cpu_bytes_to_use": 1073741824}}'
"""

from __future__ import annotations

import copy
from typing import Any

from kvkernels.connectors.groups import choose_groups
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

    ``kv_connector_extra_config`` has what ``KVKernelsOffloadingSpec`` says, and ``attention_group``: the KV cache group
    that is attention, where the model leaves that open.
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
        self.connector_scheduler: SchedulerSide | None = None
        self.connector_worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = SchedulerSide(spec, vllm_config, kv_cache_config)
        else:
            self.connector_worker = WorkerSide(spec, vllm_config, kv_cache_config)

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
