"""Captures that requests ask the connector for: what the answer says, and what the worker writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvkernels.capture import CachedLayer, load_capture
from kvkernels.connectors.vllm_capture import FIELD, CaptureJob, CaptureRequests, CaptureWriter


def request(asked: object = None, **changed: object) -> SimpleNamespace:
    """As much of vLLM's as a capture looks at: 5 tokens of a prompt, 3 generated, the last of them not computed."""
    given = {
        "request_id": "r", "kv_transfer_params": {FIELD: {} if asked is None else asked}, "max_tokens": 3,
        "num_prompt_tokens": 5, "num_output_tokens": 3, "num_computed_tokens": 7, "all_token_ids": list(range(8)),
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changed})


def test_who_does_not_ask_gets_nothing(tmp_path):
    requests = CaptureRequests(str(tmp_path), 1)
    for params in (None, {}, {"other": 1}):
        assert requests.on_finished(request(kv_transfer_params=params), [[1]]) is None
    assert requests.take() == []


def test_a_job_has_the_blocks_and_how_many_tokens_each_point_has(tmp_path):
    requests = CaptureRequests(str(tmp_path / "new"), 1)
    tables = ([4, 2], [0, 9])
    said = requests.on_finished(request({"points": ["after_prefill", "during_decode"], "layers": [1]}), tables)[FIELD]
    (job,) = requests.take()
    assert said == {"path": job.path, "id": job.capture_id}
    assert Path(job.path).parent == tmp_path / "new" and Path(job.path).parent.is_dir()
    assert job.tokens == {"after_prefill": 5, "during_decode": 7}
    assert (job.tables, job.layers, job.token_ids, job.prompt_tokens) == ([[4, 2], [0, 9]], [1], list(range(8)), 5)
    assert requests.take() == []


def test_after_prefill_is_the_default_and_ids_differ(tmp_path):
    requests = CaptureRequests(str(tmp_path), 1)
    said = [requests.on_finished(request(), [[1]])[FIELD] for _ in range(2)]
    assert said[0]["id"] != said[1]["id"] and said[0]["path"] != said[1]["path"]
    assert [job.tokens for job in requests.take()] == [{"after_prefill": 5}] * 2


def test_what_was_transferred_is_counted_with_what_the_engine_had(tmp_path):
    requests = CaptureRequests(str(tmp_path), 1)
    asked = request({"points": ["after_transfer"]})
    requests.on_matched(asked, 2)
    requests.on_allocated(asked, 0)
    requests.on_allocated(asked, 3)
    requests.on_finished(asked, [[1]])
    assert requests.take()[0].tokens == {"after_transfer": 5}
    assert requests.on_finished(asked, [[1]])[FIELD] == {
        "error": "nothing was transferred, so there is no after_transfer"
    }


@pytest.mark.parametrize(
    "asked,text",
    [
        ([], "must be an object, got []"),
        ({"points": "after_prefill"}, "points must be a list of str"),
        ({"points": ["soon"]}, "capture_points must be of"),
        ({"points": []}, "capture_points must name at least one"),
        ({"layers": [-1]}, "layers must be from 0 on, got -1"),
        ({"layers": [True]}, "layers must be a list of int, got [True]"),
    ],
)
def test_what_makes_no_sense_is_an_error_in_the_answer(tmp_path, asked, text):
    requests = CaptureRequests(str(tmp_path), 1)
    assert text in requests.on_finished(request(asked), [[1]])[FIELD]["error"]
    assert requests.take() == []


@pytest.mark.parametrize(
    "folder,ranks,changed,text",
    [
        (None, 1, {}, "kv_connector_extra_config has no capture_dir"),
        ("x", 2, {}, "captures are of one worker, and this engine has 2"),
        ("x", 1, {"num_computed_tokens": 4}, "the request ended after 4 tokens"),
    ],
)
def test_what_cannot_be_captured_is_an_error_in_the_answer(tmp_path, folder, ranks, changed, text):
    requests = CaptureRequests(folder and str(tmp_path / folder), ranks)
    assert requests.on_finished(request(**changed), [[1]])[FIELD] == {"error": text}


def writer(layers: list[CachedLayer]) -> CaptureWriter:
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="tiny", dtype=torch.float32),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    found = CaptureWriter(config, None)
    found._layers = layers
    return found


def test_the_worker_writes_what_the_blocks_hold(tmp_path):
    latent = torch.randn(6, 4, 5)
    job = CaptureJob(str(tmp_path / "x.safetensors"), "7", [[5, 2]], {"after_prefill": 5}, None, list(range(8)), 5)
    writer([CachedLayer(3, "mla", 0, 4, [latent])]).write([job])
    found = load_capture(job.path)
    wanted = latent[[5, 2]].flatten(0, 1)[:5].numpy()
    assert (found.get(3).parts["latent"][0] == wanted).all()
    assert found.metadata["id"] == "7" and found.metadata["mock"] is False
    assert found.metadata["prompt_token_ids"] == [0, 1, 2, 3, 4]
    assert found.metadata["generated_token_ids"] == [5, 6, 7]


def test_a_capture_that_fails_says_why_beside_its_place_and_ends_nothing(tmp_path):
    jobs = [
        CaptureJob(str(tmp_path / f"{i}.safetensors"), "7", [[5]], {"after_prefill": tokens}, None, [0] * 9, 5)
        for i, tokens in enumerate((9, 4))
    ]
    writer([CachedLayer(3, "mla", 0, 4, [torch.zeros(6, 4, 5)])]).write(jobs)
    assert (tmp_path / "0.safetensors.error").read_text().startswith("capture: layer 3 must hold 9 tokens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors.error", "1.safetensors"]
    gone = CaptureJob(str(tmp_path / "gone" / "x"), "7", [[5]], {"after_prefill": 4}, None, [0] * 9, 5)
    writer([]).write([gone])
