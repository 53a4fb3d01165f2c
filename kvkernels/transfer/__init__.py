"""Transfers beside the model: submitted now, carried out later in order of urgency, by threads without Python."""

from kvkernels.transfer.jobs import (
    ConvertJob,
    CopyPagesJob,
    GatherJob,
    GroupsJob,
    Job,
    PreparedJob,
    ScatterJob,
    SwapJob,
)
from kvkernels.transfer.metrics import MoverCollector
from kvkernels.transfer.mover import Mover
from kvkernels.transfer.transfer import Result, Transfer, TransferCancelled, TransferFailed

__all__ = [
    "ConvertJob",
    "CopyPagesJob",
    "GatherJob",
    "GroupsJob",
    "Job",
    "Mover",
    "MoverCollector",
    "PreparedJob",
    "Result",
    "ScatterJob",
    "SwapJob",
    "Transfer",
    "TransferCancelled",
    "TransferFailed",
]
