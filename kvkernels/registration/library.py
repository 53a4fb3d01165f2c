"""Loads the compiled ops, or gives the reference their names where none were built."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from kvkernels import reference, triton
from kvkernels.common import autograd, peers
from kvkernels.common.text import tensor_of
from kvkernels.reference import ledger, prepared
from kvkernels.registration import schemas

FILE_NAME = "libkvkernels_ops.so"
PACKAGE = Path(__file__).resolve().parents[1]

_PYTHON_KERNELS: dict[str, Callable[..., Any]] = {
    "_copy_pages_reference": reference.copy_pages_checked,
    "_swap_blocks_reference": reference.swap_blocks_checked,
    "_swap_blocks_batch_reference": reference.swap_blocks_batch_checked,
    "_concat_tp_shards_reference": reference.concat_tp_shards_checked,
    "_split_tp_shards_reference": reference.split_tp_shards_checked,
    "_first_requiring_grad": autograd.first_requiring_grad,
    "_note_writes": autograd.note_writes,
    "_peer_refusal": lambda device, peer, enables: tensor_of(peers.refusal(device, peer, enables)),
    "_triton_refusal": lambda device: tensor_of(triton.refusal(device)),
    "_triton_copy": triton.copy,
}
_ALL_SCHEMAS = {**schemas.PUBLIC, **schemas.PRIVATE}


@dataclass(frozen=True)
class Library:
    """What the ops of this process are served by."""

    path: Path | None
    why: str
    registrations: torch.library.Library  # the ops end with it

    @property
    def compiled(self) -> bool:
        return self.path is not None


def load() -> Library:
    """Register every op of ``schemas`` under ``torch.ops.kvkernels``.

    Raises
    ------
    ImportError
        The library is there but does not load or was built for other schemas, or this copy of the package has none but
        shadows an installed one that does.
    """
    path = PACKAGE / FILE_NAME
    if path.exists():
        _load_compiled(path)
        return Library(path, "the compiled library loaded", _define(_PYTHON_KERNELS))
    if os.environ.get("KVKERNELS_ALLOW_REFERENCE") != "1":
        _refuse_to_shadow()
    return Library(None, _why_not_built(), _define(_reference_kernels()))


def _load_compiled(path: Path) -> None:
    remedy = (
        "rebuild it beside this torch (pip install --force-reinstall --no-deps . in kvkernels' sources), or delete the "
        "file to run on the reference"
    )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # torch's own error has the path alone
        raise ImportError(
            f"kvkernels: {path} does not load with torch {torch.__version__}: {reason}; {remedy}"
        ) from error
    differing = _schemas_of(path) ^ {op + schema for op, schema in _ALL_SCHEMAS.items()}
    if differing:
        ops = ", ".join(sorted({schema.partition("(")[0] for schema in differing}))
        raise ImportError(
            f"kvkernels: {path} was built from other sources than this package, they differ in {ops}; {remedy}"
        )


def _schemas_of(path: Path) -> set[str]:
    """What the library's functions were written for; nothing where it is too old to say."""
    ask = getattr(ctypes.CDLL(str(path)), "kvkernels_schemas", None)
    if ask is None:
        return set()
    ask.restype = ctypes.c_char_p
    return set(ask().decode().splitlines())


def _define(kernels: Mapping[str, Callable[..., Any]]) -> torch.library.Library:
    """Defines every op and implements those that Python has kernels for; the library has registered the others."""
    library = torch.library.Library(schemas.NAMESPACE, "DEF")
    for op, schema in _ALL_SCHEMAS.items():
        library.define(op + schema, tags=schemas.tags(op))
    for op, kernel in kernels.items():
        # Also the key of a call without tensors, such as one with an empty list.
        library.impl(op, kernel, "CompositeExplicitAutograd")
    return library


def _reference_kernels() -> dict[str, Callable[..., Any]]:
    return {
        **{op: getattr(reference, op) for op in schemas.PUBLIC},
        "_prepare": prepared.prepare,
        "_run_prepared": prepared.run_prepared,
        "_release_prepared": prepared.release_prepared,
        "_explain_begin": ledger.explain_begin,
        "_explain_end": lambda: tensor_of(ledger.explain_end()),
        "_counters": lambda: tensor_of(ledger.counters()),
        "_reset_counters": ledger.reset_counters,
        "_build_info": lambda: tensor_of(json.dumps(build_record())),
        "_check_device": lambda device: tensor_of("{}"),  # the reference checks ids before it moves anything
        "_policy": lambda is_default: tensor_of("[]"),  # there is nothing to choose from
        "_set_policy": lambda rows, source: None,
        "_cpu_numbers": lambda: tensor_of("{}"),
        "_set_cpu_numbers": lambda numbers, source: None,
        **_PYTHON_KERNELS,
    }


def build_record() -> dict[str, Any]:
    """What the build wrote beside the package; empty where there is no record."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _why_not_built() -> str:
    record = build_record()
    if record.get("compiled"):
        return f"the build made a compiled library, but {PACKAGE / FILE_NAME} is gone"
    return str(record.get("reason") or f"no compiled library was built: there is no {FILE_NAME} in {PACKAGE}")


def _refuse_to_shadow() -> None:
    """ImportError where Python found this copy although another one, with a library, is installed."""
    for package in _other_packages():
        if (package / FILE_NAME).exists():  # not so of this copy, which is one of them
            raise ImportError(
                f"kvkernels: the copy in {PACKAGE} has no compiled library and shadows the installed one in {package}; "
                "run Python from another directory, or build in place with "
                "pip install -e . (KVKERNELS_ALLOW_REFERENCE=1 accepts the reference)"
            )


def _other_packages() -> Iterator[Path]:
    for entry in sys.path:
        yield (Path(entry) / "kvkernels").resolve()
    try:
        distribution = importlib.metadata.distribution("kvkernels")
    except importlib.metadata.PackageNotFoundError:
        return
    # An editable install may be known to an import hook only, not to sys.path.
    url = urlparse(json.loads(distribution.read_text("direct_url.json") or "{}").get("url", ""))
    if url.scheme == "file":
        yield (Path(unquote(url.path)) / "kvkernels").resolve()


LIBRARY = load()
