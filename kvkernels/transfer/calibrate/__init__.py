"""Measures this machine, and writes by which table copies go: ``python -m kvkernels tune``."""

from kvkernels.transfer.calibrate.command import add_arguments, measure, run

__all__ = ["add_arguments", "measure", "run"]
