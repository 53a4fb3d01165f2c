"""Where the commands begin."""

from __future__ import annotations

import importlib
import sys


def kvkernels() -> None:
    """Run ``kvkernels``."""
    _run("house", "kvkernels")


def capture_kv() -> None:
    """Run ``capture-kv``."""
    _run("capture_kv", "capture-kv")


def check_kv() -> None:
    """Run ``check-kv``."""
    _run("check_kv", "check-kv")


def kv_stats() -> None:
    """Run ``kv-stats``."""
    _run("kv_stats", "kv-stats")


def _run(module: str, name: str) -> None:
    try:
        import click  # noqa: F401
    except ModuleNotFoundError:
        sys.exit(f"{name} needs click, which is not installed: pip install kvkernels[cli]")
    running = importlib.import_module("kvkernels_cli.running")
    command = importlib.import_module(f"kvkernels_cli.{module}").COMMAND
    sys.exit(running.run(command, name))
