"""Statistics of what a cache's blocks are used for, and how they are told to others.

``AccessStatsCollector`` needs neither torch nor an engine; ``kvkernels_records.access`` has it without them.
"""

from kvkernels.observe.prometheus import AccessCollector, serve_metrics
from kvkernels_records.access import AccessStatsCollector

__all__ = ["AccessCollector", "AccessStatsCollector", "serve_metrics"]
