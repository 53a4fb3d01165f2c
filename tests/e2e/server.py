"""vLLM's own HTTP server with the connector: fifty chats at once, and SIGTERM while more are under way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from capture import compare_with_forward
from kvkernels_records import CaptureConfig, save_capture
from kvkernels_records.check import Limits, compare
from kvkernels_records.server import CaptureServerError, capture_from_server
from kvkernels_records.sources import open_source

CHATS = 50
START_SECONDS = 600
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def run(model: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        return run_with(model, Path(name).resolve())


def run_with(model: Path, captures: Path) -> dict[str, Any]:
    findings: list[str] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transfer = {
        "kv_connector": "KVKernelsConnector", "kv_connector_module_path": "kvkernels.connectors.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 26, "verify": True, "capture_dir": str(captures)},
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve()),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024",
        "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "60", "--kv-cache-memory-bytes",
        str(1 << 28), "--max-num-seqs", "8", "--dtype", "float32", "--chat-template", TEMPLATE,
        "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base, server)
        findings += captured(base, captures, model)
        first = asyncio.run(chats(base, CHATS))
        second = asyncio.run(chats(base, CHATS))
        wrong = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b or not a]
        if wrong:
            findings.append(f"chats: {wrong} were answered otherwise the second time")
        text = urllib.request.urlopen(f"{base}/metrics").read().decode()
        found = re.search(r"^vllm:external_prefix_cache_hits_total\{[^}]*\} ([0-9.e+]+)", text, re.M)
        hits = float(found[1]) if found else 0.0
        if not hits:
            findings.append("metrics: no token came back from the host")
        failed = re.search(r"^kvkernels:kv_offload_failed_loads_total\{[^}]*\} ([0-9.e+]+)", text, re.M)
        if failed and float(failed[1]):
            findings.append(f"metrics: {failed[1]} loads failed")
        asyncio.run(stopped_in_mid_flight(base, server))
        code = server.wait(60)
        if code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            findings.append(f"sigterm: the server ended with {code}")
    except subprocess.TimeoutExpired:
        findings.append("sigterm: the server did not end")
    finally:
        server.kill()
        server.wait()
    return {"findings": findings, "hits": hits}


def captured(base: str, captures: Path, model: Path) -> list[str]:
    """A capture by URL holds what a plain forward of the weights computes, and says where two prompts part."""
    prompt = [f"w{i * 7 % 500 + 3}" for i in range(150)]
    other = [*prompt[:96], "w400", *prompt[97:]]
    config = CaptureConfig(base, " ".join(prompt), "unused")
    first = capture_from_server(config)
    second = capture_from_server(CaptureConfig(base, " ".join(other), "unused"))
    findings = compare_with_forward(model, first)
    paths = [save_capture(result, captures / name) for result, name in ((first, "a"), (second, "b"))]
    report = compare(open_source(paths[:1]), open_source(paths[1:]), Limits())
    if report.first is None or (report.first["layer"], report.first["token"]) != (0, 96):
        findings.append(f"capture: the prompts part at {report.first}")
    for wrong, text in (
        ({"layers": [9]}, "layers must be of 0 to 3"),
        ({"capture_points": ["after_transfer"]}, "nothing"),
    ):
        try:
            capture_from_server(CaptureConfig(base, "w3 w4", "unused", **wrong))
            findings.append(f"capture: {wrong} was not refused")
        except CaptureServerError as refusal:
            if text not in str(refusal):
                findings.append(f"capture: {refusal}")
    return findings


def wait_until_ready(base: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"{base}/health").read()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server was not ready in time")


def words(number: int) -> str:
    """A chat of one of five subjects, so that prefixes are shared."""
    subject = " ".join(f"w{(number % 5 * 97 + i * 31) % 500 + 3}" for i in range(250))
    return f"{subject} " + " ".join(f"w{(number * 13 + i * 7) % 500 + 3}" for i in range(40))


async def chats(base: str, count: int) -> list[str]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{base}/v1", api_key="none", timeout=240, max_retries=0) as client:

        async def chat(number: int) -> str:
            answer = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": words(number)}], max_tokens=12, temperature=0
            )
            return answer.choices[0].message.content or ""

        return await asyncio.gather(*(chat(number) for number in range(count)))


async def stopped_in_mid_flight(base: str, server: subprocess.Popen[bytes]) -> None:
    running = asyncio.gather(chats(base, CHATS), return_exceptions=True)
    await asyncio.sleep(0.7)
    server.send_signal(signal.SIGTERM)
    await running
