"""Captures over HTTP: what is asked, what is waited for, and what every wrong server is told apart by."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvkernels_records import CaptureConfig, CaptureFileError, CaptureResult, capture_kv_mock, save_capture
from kvkernels_records.server import CaptureServerError, capture_from_server

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


class Server:
    """A server of one model, whose completions a test answers."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: Answer = lambda body: (200, b"{}")
        self.models: tuple[int, bytes] = 200, json.dumps({"data": [{"id": "tiny"}]}).encode()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(*(server.models if self.path == "/v1/models" else (404, b"no")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                self.reply(*(server.answer(body) if self.path == "/v1/completions" else (404, b"no")))

            def reply(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def config(server: Server, **changed: Any) -> CaptureConfig:
    return CaptureConfig(**{"url": server.url + "/", "prompt": "a b", "output": "unused", **changed})


def says(**said: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"kv_transfer_params": {"kvkernels_capture": said}}).encode()


def capture(**metadata: Any) -> CaptureResult:
    return CaptureResult(capture_kv_mock("a b", layers=[0]).layers, metadata)


def test_the_request_has_the_prompt_the_points_and_the_layers(server, tmp_path):
    path = save_capture(capture(id="7"), tmp_path / "x.npz")
    server.answer = lambda body: says(path=str(path), id="7")
    points = ("after_prefill", "during_decode")
    result = capture_from_server(config(server, layers=[0, 3], capture_points=points, max_tokens=3))
    assert result.metadata["id"] == "7" and result.get(0).key.shape == (32, 2, 128)
    (body,) = server.asked
    assert body["kv_transfer_params"] == {"kvkernels_capture": {"points": list(points), "layers": [0, 3]}}
    assert (body["model"], body["prompt"], body["max_tokens"], body["temperature"]) == ("tiny", "a b", 3, 0)
    capture_from_server(config(server))
    assert server.asked[1]["kv_transfer_params"] == {"kvkernels_capture": {"points": ["after_prefill"]}}


def test_a_file_that_comes_later_is_waited_for(server, tmp_path):
    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        threading.Thread(target=lambda: (time.sleep(0.1), save_capture(capture(), tmp_path / "x.npz"))).start()
        return says(path=str(tmp_path / "x.npz"))

    server.answer = answer
    assert capture_from_server(config(server)).get(0).layer_index == 0


def test_a_file_that_never_comes_is_a_timeout(server, tmp_path):
    server.answer = lambda body: says(path=str(tmp_path / "x.npz"))
    with pytest.raises(TimeoutError, match=r"x\.npz: the server's capture did not appear within 0.2 s"):
        capture_from_server(config(server), deadline_s=0.2)


def test_the_file_of_another_request_is_refused(server, tmp_path):
    path = save_capture(capture(id="7"), tmp_path / "x.npz")
    server.answer = lambda body: says(path=str(path), id="8")
    with pytest.raises(CaptureFileError, match="is the capture of another request"):
        capture_from_server(config(server))


def test_a_damaged_file_is_refused(server, tmp_path):
    path = save_capture(capture(), tmp_path / "x.npz")
    data = bytearray(path.read_bytes())
    data[4000] ^= 1
    path.write_bytes(data)
    server.answer = lambda body: says(path=str(path))
    with pytest.raises(CaptureFileError, match="is damaged"):
        capture_from_server(config(server))


@pytest.mark.parametrize(
    "answer,text",
    [
        ((200, b"{}"), "the server has no kvkernels connector with a capture_dir, so it cannot capture"),
        ((200, b'{"kv_transfer_params": {"other": 1}}'), "has no kvkernels connector"),
        (says(error="nothing was transferred"), "the server did not capture: nothing was transferred"),
        ((400, b'{"error": {"message": "too long"}}'), "the server refuses: 400 too long"),
        ((500, b"oh"), "the server refuses: 500 Internal Server Error"),
        ((200, b"[]"), "is no server of models"),
        ((200, b"<html>"), "no server of models answers"),
    ],
)
def test_servers_that_do_not_capture_are_one_sentence(server, answer, text):
    server.answer = lambda body: answer
    with pytest.raises(CaptureServerError) as raised:
        capture_from_server(config(server))
    assert text in str(raised.value) and str(raised.value).startswith(server.url) and "\n" not in str(raised.value)


def test_a_folder_that_cannot_be_seen_is_named(server, tmp_path):
    server.answer = lambda body: says(path=str(tmp_path / "gone" / "x.npz"))
    with pytest.raises(CaptureFileError, match="the server's capture_dir cannot be seen from this machine"):
        capture_from_server(config(server))


@pytest.mark.parametrize("models", [(200, b"{}"), (200, b'{"data": []}'), (404, b"no")])
def test_servers_of_something_else_are_told(server, models):
    server.models = models
    with pytest.raises(CaptureServerError, match=server.url):
        capture_from_server(config(server))


def test_no_server_is_told():
    for url, text in (("http://127.0.0.1:9", "no server answers"), ("localhost:80", "must begin with http")):
        with pytest.raises(CaptureServerError, match=text):
            capture_from_server(CaptureConfig(url, "a", "x"))


def test_a_wrong_configuration_asks_nobody(server):
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        capture_from_server(config(server, max_tokens=0))
    with pytest.raises(ValueError, match="deadline_s must be above 0"):
        capture_from_server(config(server), deadline_s=0)
    assert server.asked == []
