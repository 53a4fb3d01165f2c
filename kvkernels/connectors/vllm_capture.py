"""Captures that a request asks for: ``kv_transfer_params={"kvkernels_capture": {"points": [...], "layers": [...]}}``.

When the request ends, the scheduler notes where its blocks are. They go with the next step to the worker, which reads
them before anything of that step is written: blocks that were given back are as they were until then.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkernels.capture import CachedLayer, CaptureResult, capture_blocks, save_capture, vllm_layers
from kvkernels.capture.vllm import metadata_of
from kvkernels_records.config import faults_of

FIELD = "kvkernels_capture"
_log = logging.getLogger("kvkernels.connectors")


@dataclass(frozen=True)
class CaptureJob:
    """One file to write.

    Attributes
    ----------
    path : str
    capture_id : str
        What the file says of itself, so that nobody takes another for it.
    tables : sequence of sequence of int
        The request's blocks, a table a group.
    tokens : mapping of str to int
        Each capture point with how many tokens it has.
    layers : sequence of int or None
    token_ids : sequence of int
        The prompt and what was generated.
    prompt_tokens : int
    """

    path: str
    capture_id: str
    tables: Sequence[Sequence[int]]
    tokens: Mapping[str, int]
    layers: Sequence[int] | None
    token_ids: Sequence[int]
    prompt_tokens: int


class CaptureRequests:
    """The scheduler's half: what is asked for, and what is to be written.

    Parameters
    ----------
    folder : str or None
        ``capture_dir`` of ``kv_connector_extra_config``; without it nothing is captured.
    ranks : int
        Workers that have a part of each cache.
    """

    def __init__(self, folder: str | None, ranks: int) -> None:
        self._folder = None if folder is None else Path(folder).resolve()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._ranks = ranks
        self._jobs: list[CaptureJob] = []
        self._local: dict[str, int] = {}
        self._transferred: dict[str, int] = {}

    def on_matched(self, request: Any, local_tokens: int) -> None:
        """vLLM asks what else of a request is cached, after so many tokens of its own."""
        if self._asks(request):
            self._local[request.request_id] = local_tokens

    def on_allocated(self, request: Any, external_tokens: int) -> None:
        """So many tokens will be loaded."""
        if external_tokens and request.request_id in self._local:
            self._transferred[request.request_id] = self._local[request.request_id] + external_tokens

    def on_finished(self, request: Any, tables: Sequence[Sequence[int]]) -> dict[str, Any] | None:
        """What the answer says of the request's capture, or None where it asked for none."""
        self._local.pop(request.request_id, None)
        transferred = self._transferred.pop(request.request_id, 0)
        if not self._asks(request):
            return None
        try:
            job = self._job(request, tables, transferred)
        except (ValueError, TypeError) as error:
            return {FIELD: {"error": str(error)}}
        self._jobs.append(job)
        return {FIELD: {"path": job.path, "id": job.capture_id}}

    def take(self) -> list[CaptureJob]:
        """The jobs that no worker has been told of."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def _asks(self, request: Any) -> bool:
        return bool(request.kv_transfer_params) and FIELD in request.kv_transfer_params

    def _job(self, request: Any, tables: Sequence[Sequence[int]], transferred: int) -> CaptureJob:
        if self._folder is None:
            raise ValueError("kv_connector_extra_config has no capture_dir")
        if self._ranks != 1:
            raise ValueError(f"captures are of one worker, and this engine has {self._ranks}")
        asked = request.kv_transfer_params[FIELD]
        if not isinstance(asked, dict):
            raise TypeError(f"{FIELD} must be an object, got {asked!r}")
        points, layers = asked.get("points", ["after_prefill"]), asked.get("layers")
        for name, given, kind in (("points", points, str), ("layers", layers or [], int)):
            if not isinstance(given, list) or not all(type(one) is kind for one in given):
                raise TypeError(f"{name} must be a list of {kind.__name__}, got {given!r}")
        if faults := faults_of(layers, points, request.max_tokens):
            raise ValueError("; ".join(faults))
        prompt, generated = request.num_prompt_tokens, request.num_output_tokens
        sizes = {
            "after_transfer": transferred,
            "after_prefill": prompt,
            "during_decode": prompt + generated - 1,
        }
        if "after_transfer" in points and not transferred:
            raise ValueError("nothing was transferred, so there is no after_transfer")
        tokens = {point: sizes[point] for point in points}
        if max(tokens.values()) > request.num_computed_tokens:
            raise ValueError(f"the request ended after {request.num_computed_tokens} tokens")
        capture_id = secrets.token_hex(8)
        path = self._folder / f"capture-{capture_id}.safetensors"
        ids = list(request.all_token_ids)
        return CaptureJob(str(path), capture_id, [list(table) for table in tables], tokens, layers, ids, prompt)


class CaptureWriter:
    """The worker's half: reads blocks, and writes files.

    Parameters
    ----------
    vllm_config, kv_cache_config
        vLLM's.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._layers: list[CachedLayer] | None = None

    def write(self, jobs: Sequence[CaptureJob]) -> None:
        """Write every job's file, or beside its place a file ``.error`` that says why there is none."""
        for job in jobs:
            try:
                self._write(job)
            except Exception as error:  # a capture must never end the engine
                _log.warning("capture %s failed: %s", job.capture_id, error)
                partial = Path(f"{job.path}.error.partial")
                try:
                    partial.write_text(" ".join(str(error).split()))
                    os.replace(partial, f"{job.path}.error")
                except OSError as other:
                    _log.warning("capture %s cannot say so: %s", job.capture_id, other)

    def _write(self, job: CaptureJob) -> None:
        if self._layers is None:
            # Their caches are in place by the first step, and stay.
            self._layers = vllm_layers(self._vllm_config, self._kv_cache_config)
        captured = [
            one
            for point, tokens in job.tokens.items()
            for one in capture_blocks(self._layers, job.tables, tokens, point, job.layers)
        ]
        said = metadata_of(self._vllm_config, self._layers, job.token_ids, job.prompt_tokens)
        save_capture(CaptureResult(captured, {**said, "id": job.capture_id}), job.path)
