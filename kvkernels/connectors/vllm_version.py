"""All that depends on vLLM's version: its names that the connector is made of, and what differs between versions."""

from __future__ import annotations

from typing import Any

SUPPORTED = ("0.32", "0.33")

try:
    from vllm import __version__ as VERSION
except ImportError:
    raise ImportError(
        "kvkernels.connectors.vllm needs vLLM, which is not installed: pip install kvkernels[vllm]"
    ) from None

if ".".join(VERSION.split(".")[:2]) not in SUPPORTED:
    raise ImportError(f"kvkernels.connectors.vllm supports vLLM {' and '.join(SUPPORTED)}, got {VERSION}")

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (  # noqa: E402
    build_offloading_config,
    get_offloading_group_ids,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (  # noqa: E402
    OffloadingConnectorStats,
    OffloadPromMetrics,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (  # noqa: E402
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    RequestOffloadingContext,
    TransferResult,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec  # noqa: E402
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy  # noqa: E402
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402

__all__ = [
    "SUPPORTED",
    "VERSION",
    "CPULoadStoreSpec",
    "CacheHitSource",
    "CachePolicy",
    "KVConnectorRole",
    "KVConnectorTransferResults",
    "LookupResult",
    "Medium",
    "OffloadPromMetrics",
    "OffloadingConnector",
    "OffloadingConnectorScheduler",
    "OffloadingConnectorStats",
    "OffloadingConnectorWorker",
    "OffloadingCounterMetadata",
    "OffloadingEvent",
    "OffloadingGaugeMetadata",
    "OffloadingManager",
    "OffloadingSpec",
    "OffloadingWorker",
    "OffloadingWorkerMetadata",
    "PrepareStoreOutput",
    "RequestOffloadingContext",
    "TransferResult",
    "build_offloading_config",
    "get_offload_group_idx",
    "get_offloading_group_ids",
    "without_expedited_loads",
]


def without_expedited_loads(config: Any) -> Any:
    """A scheduler's configuration by which no load is waited for in its own step, which 0.32 has none of."""
    return config._replace(sync_load_budget_bytes=0) if hasattr(config, "sync_load_budget_bytes") else config
