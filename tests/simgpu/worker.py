"""Runs test functions in a process of their own, where the stand-in for CUDA can be loaded.

The session's own process has torch, which may have brought a real CUDA runtime of the same name, and its op library
asks whether a CUDA driver is loaded. Neither must meet the stand-in.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

_pool: ProcessPoolExecutor | None = None


def _new_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _load(path: str) -> Any:
    name = "in_worker_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _run(path: str, name: str, build: str, arguments: dict[str, Any]) -> None:
    from simgpu.sim import Sim

    sim = Sim.of(build)
    sim.reset()
    try:
        getattr(_load(path), name).__wrapped__(sim, **arguments)
    except BaseException:
        # As text: not every exception can cross to the other process.
        raise AssertionError(traceback.format_exc()) from None
    finally:
        sim.reset()


def on_stand_in(test: Callable[..., None] | None = None, *, fresh: bool = False) -> Any:
    """Decorates a test whose first parameter is the ``Sim``: runs it in the worker, or in a fresh one.

    A fresh worker is for what happens once a process.
    """
    if test is None:
        return functools.partial(on_stand_in, fresh=fresh)

    @functools.wraps(test)
    def outside(simgpu_build: Path, **arguments: Any) -> None:
        global _pool
        job = (_run, inspect.getfile(test), test.__name__, str(simgpu_build), arguments)
        if fresh:
            with _new_pool() as pool:
                return pool.submit(*job).result()
        _pool = _pool or _new_pool()
        try:
            _pool.submit(*job).result()
        except BrokenProcessPool:
            _pool = None
            raise

    signature = inspect.signature(test)
    parameters = list(signature.parameters.values())
    outside.__signature__ = signature.replace(parameters=[parameters[0].replace(name="simgpu_build"), *parameters[1:]])
    return outside
