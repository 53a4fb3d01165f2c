"""Try eviction policies on traces of requests, before one is trusted: ``python -m kvkernels replay``."""

from kvkernels.memory.replay.belady import optimal_hits
from kvkernels.memory.replay.generate import generate, write_trace
from kvkernels.memory.replay.simulate import Simulation, replay
from kvkernels.memory.replay.trace import BLOCK_TOKENS, Request, TraceError, read_trace

__all__ = [
    "BLOCK_TOKENS",
    "Request",
    "Simulation",
    "TraceError",
    "generate",
    "optimal_hits",
    "read_trace",
    "replay",
    "write_trace",
]
