"""Captures from a running vLLM server whose connector is kvkernels'."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kvkernels_records.capture import CaptureResult
from kvkernels_records.config import CaptureConfig
from kvkernels_records.errors import CaptureFileError
from kvkernels_records.files import load_capture

#: What the request and the answer have under ``kv_transfer_params``.
FIELD = "kvkernels_capture"
_POLL_S = 0.02


class CaptureServerError(OSError):
    """A server cannot be reached, refuses, or has no connector that captures."""


def capture_from_server(config: CaptureConfig, deadline_s: float = 60.0) -> CaptureResult:
    """Have a server run a prompt, and read the capture that its connector writes.

    The connector decides where the file is; it must be a folder that this machine sees.

    Parameters
    ----------
    config : CaptureConfig
        ``tp_size`` is the server's own.
    deadline_s : float
        How long answer and file may take together.

    Raises
    ------
    ValueError
        The configuration is wrong.
    CaptureServerError
        There is no such server, or none that captures.
    TimeoutError
        The file did not appear.
    CaptureFileError
        It is damaged.
    """
    config.check()
    if not 0 < deadline_s < math.inf:
        raise ValueError(f"capture_from_server: deadline_s must be above 0, got {deadline_s}")
    end = time.monotonic() + deadline_s
    wanted: dict[str, Any] = {"points": list(config.capture_points)}
    if config.layers is not None:
        wanted["layers"] = list(config.layers)
    url = config.url.rstrip("/")
    model = _model_of(url, deadline_s)
    answer = _ask(
        f"{url}/v1/completions", deadline_s,
        {"model": model, "prompt": config.prompt, "max_tokens": config.max_tokens, "temperature": 0,
         "ignore_eos": True, "kv_transfer_params": {FIELD: wanted}},
    )  # fmt: skip
    said = (answer.get("kv_transfer_params") or {}).get(FIELD)
    if not isinstance(said, dict):
        raise CaptureServerError(
            f"{url}: the server has no kvkernels connector with a capture_dir, so it cannot capture"
        )
    if "error" in said:
        raise CaptureServerError(f"{url}: the server did not capture: {said['error']}")
    path = Path(str(said.get("path", "")))
    failure = Path(f"{path}.error")
    while not path.is_file():
        if failure.is_file():
            raise CaptureServerError(f"{url}: the server did not capture: {failure.read_text()[:300]}")
        if not path.parent.is_dir():
            raise CaptureFileError(f"{path}: the server's capture_dir cannot be seen from this machine")
        if time.monotonic() > end:
            raise TimeoutError(f"{path}: the server's capture did not appear within {deadline_s:g} s")
        time.sleep(_POLL_S)
    result = load_capture(path)
    if (capture_id := said.get("id")) is not None and result.metadata.get("id") != capture_id:
        raise CaptureFileError(f"{path}: is the capture of another request")
    return result


def _model_of(url: str, timeout_s: float) -> str:
    found = _ask(f"{url}/v1/models", timeout_s)
    try:
        return str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise CaptureServerError(f"{url}: is no server of models") from None


def _ask(url: str, timeout_s: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise CaptureServerError(f"{url}: must begin with http:// or https://")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise CaptureServerError(f"{url}: the server refuses: {_reason(error)}") from None
    except urllib.error.URLError as error:
        raise CaptureServerError(f"{url}: no server answers: {error.reason}") from None
    except (ValueError, OSError) as error:
        raise CaptureServerError(f"{url}: no server of models answers: {error}") from None
    if not isinstance(found, dict):
        raise CaptureServerError(f"{url}: is no server of models")
    return found


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own words, if they are short."""
    try:
        said = json.loads(error.read(4096))
        text = said.get("message") or said["error"]["message"]
        return f"{error.code} {str(text)[:300]}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{error.code} {error.reason}"
