"""``capture-kv``."""

from __future__ import annotations

import sys

import click

from kvkernels_cli.running import integer

EPILOG = """\b
Examples:
  capture-kv --url http://localhost:8000 --prompt "The sky is" --output sky.safetensors
  capture-kv --url http://localhost:8000 --prompt "The sky is" --output sky \\
      --layers 0,1 --capture-points after_prefill,during_decode --max-tokens 8
  capture-kv --mock --url mock --prompt "three words here" --output mock.npz --tp-size 2
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", required=True, help="The server: vLLM with the kvkernels connector.")
@click.option("--prompt", required=True, help="The text whose KV cache is captured.")
@click.option("--output", required=True, metavar="FILE", help="What to write: .npz, or .safetensors (bfloat16, fp8).")
@click.option("--layers", metavar="0,1", help="Which layers; all by default.")
@click.option("--capture-points", default="after_prefill", show_default=True, metavar="A,B",
              help="Of after_prefill, after_transfer, during_decode.")  # fmt: skip
@click.option("--tp-size", default="1", show_default=True, help="With --mock: tensor-parallel ranks that are joined.")
@click.option("--max-tokens", default="1", show_default=True, help="Tokens to generate; 2 or more for during_decode.")
@click.option("--deadline", default="60", show_default=True, metavar="SECONDS", help="How long the file may take.")
@click.option("--mock", is_flag=True, help="Make numbers up and ask no server; the file says so.")
@click.option("--seed", default="0", show_default=True, help="Of --mock.")
@click.option("--json", "json_path", metavar="PATH", help="Write what was captured as JSON; - is standard output.")
def COMMAND(
    url: str, prompt: str, output: str, layers: str | None, capture_points: str, tp_size: str, max_tokens: str,
    deadline: str, mock: bool, seed: str, json_path: str | None,
) -> int:  # fmt: skip
    """Save what an engine's KV cache holds of a prompt.

    The server runs the prompt and writes the file where its connector's capture_dir is, which must be a folder that
    this machine sees, too; it is checked and then saved as --output. Exit status 1 says that nothing was captured.
    """
    from kvkernels_records import CaptureConfig, capture_kv_mock, save_capture

    points = tuple(part.strip() for part in capture_points.split(",") if part.strip())
    config = CaptureConfig(
        url, prompt, output, _integers(layers), points,
        integer(tp_size, "capture-kv: --tp-size"), integer(max_tokens, "capture-kv: --max-tokens"),
    )  # fmt: skip
    if faults := config.faults():
        raise ValueError(f"capture-kv: {'; '.join(faults)}")
    if mock:
        result = capture_kv_mock(
            prompt, layers=config.layers, capture_points=config.capture_points, tp_size=config.tp_size,
            max_tokens=config.max_tokens, seed=integer(seed, "capture-kv: --seed", 0),
        )  # fmt: skip
    else:
        from kvkernels_cli.running import number
        from kvkernels_records.server import capture_from_server

        result = capture_from_server(config, deadline_s=number(deadline, "capture-kv: --deadline"))
    path = save_capture(result, output)
    said = {
        "output": str(path),
        "metadata": result.metadata,
        "layers": [
            {
                "layer": one.layer_index, "capture_point": one.capture_point, "kind": one.kind,
                "arrays": {name: list(array.shape) for name, array in one.arrays().items()},
            }
            for one in result
        ],
    }  # fmt: skip
    if json_path == "-":
        from kvkernels_cli.running import print_json

        print_json(said)
        return 0
    if json_path:
        import json
        from pathlib import Path

        Path(json_path).write_text(json.dumps(said, indent=2, allow_nan=False) + "\n")
    made_up = ", made up" if mock else ""
    print(f"{len(result.layers)} captures{made_up}: {path}", file=sys.stderr)
    return 0


def _integers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    return [integer(part, "capture-kv: --layers") for part in text.split(",")]
