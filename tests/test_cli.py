"""The commands: what they print where, how they end, and that they start without torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvkernels_records import capture_kv_mock, save_capture
from kvkernels_records.pages import save_page_digests

click = pytest.importorskip("click")

from kvkernels_cli import capture_kv, check_kv, house, kv_stats, running  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"kvkernels": house, "capture-kv": capture_kv, "check-kv": check_kv, "kv-stats": kv_stats}
MOCK = ("--mock", "--url", "mock", "--prompt", "a b c")


class Ran:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def line(self, status: int = 1) -> str:
        """The one line on standard error, of a command that says nothing else."""
        assert (self.status, self.out) == (status, ""), (self.status, self.out, self.err)
        (line,) = self.err.splitlines()
        return line


@pytest.fixture
def run(capsys):
    def command(name: str, *arguments: object) -> Ran:
        status = running.run(COMMANDS[name].COMMAND, name, list(map(str, arguments)))
        said = capsys.readouterr()
        return Ran(status, said.out, said.err)

    return command


def two_captures(folder: Path, change: float = 0.0) -> tuple[Path, Path]:
    first, second = (capture_kv_mock("a b c", layers=[0, 1]) for _ in range(2))
    second.get(1).key[4, 2, 0] += np.float16(change)
    return save_capture(first, folder / "a.npz"), save_capture(second, folder / "b.npz")


WITHOUT_TORCH = """
import sys
from kvkernels_cli import running
import kvkernels_cli.{module} as module
status = running.run(module.COMMAND, "it", {arguments!r})
assert "torch" not in sys.modules and "kvkernels" not in sys.modules, "torch was imported"
sys.exit(status)
"""


def run_without_torch(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = WITHOUT_TORCH.format(module=module, arguments=list(map(str, arguments)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module,arguments,status",
    [
        ("house", ["--help"], 0),
        ("house", ["replay", "--help"], 0),
        ("house", ["replay", "--policy", "best", "x"], 2),
        ("house", ["bench", "--model", "gpt-7"], 2),
        ("house", ["explain", "--help"], 0),
        ("house", ["explain", "swap_blocks", "--pairs", "x"], 1),
        ("house", ["nothing"], 2),
        ("capture_kv", ["--url", "x"], 2),
        ("capture_kv", [*MOCK, "--output", "{folder}/mock"], 0),
        ("capture_kv", ["--url", "http://127.0.0.1:9", "--prompt", "a", "--output", "{folder}/x"], 1),
        ("kv_stats", ["demo", "-n", "100", "-o", "{folder}/demo.json"], 0),
        ("kv_stats", ["visualize", "--help"], 0),
    ],
)
def test_help_usage_and_numpys_commands_import_no_torch(tmp_path, module, arguments, status):
    ran = run_without_torch(module, *(argument.replace("{folder}", str(tmp_path)) for argument in arguments))
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr


def test_check_kv_imports_no_torch(tmp_path):
    ran = run_without_torch("check_kv", "--baseline", *two_captures(tmp_path)[:1], "--target", tmp_path / "b.npz")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "4 arrays agree"), ran.stderr


def test_the_scripts_of_the_package_are_these():
    section = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0]
    scripts = dict(re.findall(r'^([a-z-]+) = "(\S+)"$', section, re.M))
    assert scripts.keys() == COMMANDS.keys()
    for name, place in scripts.items():
        module, function = place.split(":")
        assert module == "kvkernels_cli.scripts"
        code = f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function}; {function}()"
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0 and ran.stdout.startswith(f"Usage: {name} ") and "Example" in ran.stdout


def test_without_click_a_command_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; from kvkernels_cli.scripts import check_kv; check_kv()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "check-kv needs click, which is not installed: pip install kvkernels[cli]\n"


@pytest.mark.parametrize("name", sorted(house.COMMAND.commands))
def test_each_command_has_help_with_examples(run, name):
    ran = run("kvkernels", name, "--help")
    assert ran.status == 0 and "Example" in ran.out and f"{name}" in ran.out.split("Example")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_status_2(run, name):
    ran = run(name, "--nonsense")
    assert ran.status == 2 and ran.out == "" and "No such option" in ran.err


@pytest.mark.parametrize("missing", ["--url", "--prompt", "--output"])
def test_capture_kv_needs_url_prompt_and_output(run, tmp_path, missing):
    given = {"--url": "http://localhost:1", "--prompt": "a", "--output": str(tmp_path / "x")}
    del given[missing]
    ran = run("capture-kv", *(word for pair in given.items() for word in pair))
    assert ran.status == 2 and f"Missing option '{missing}'" in ran.err


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--layers", "0,x"], "capture-kv: --layers must be an integer, got 'x'"),
        (["--layers", "0,-1"], "capture-kv: layers must be from 0 on, got -1"),
        (["--layers", "40"], "capture_kv_mock: layers must be below 32, got 40"),
        (["--capture-points", "soon"], "capture-kv: capture_points must be of"),
        (["--capture-points", ","], "capture-kv: capture_points must name at least one"),
        (["--capture-points", "during_decode"], "capture-kv: max_tokens must be at least 2 for during_decode"),
        (["--tp-size", "none"], "capture-kv: --tp-size must be an integer, got 'none'"),
        (["--tp-size", "0"], "capture-kv: tp_size must be at least 1, got 0"),
        (["--max-tokens", "0"], "capture-kv: max_tokens must be at least 1, got 0"),
        (["--seed", "-1"], "capture-kv: --seed must be at least 0, got -1"),
        (["--prompt", ""], "capture-kv: prompt must not be empty"),
        (["--output", "/proc/nothing/x"], "/proc/nothing: "),
    ],
)
def test_bad_values_of_capture_kv_are_one_line_and_status_1(run, tmp_path, arguments, text):
    line = run("capture-kv", *MOCK, "--output", tmp_path / "x", *arguments).line()
    assert line.startswith(text)
    assert list(tmp_path.iterdir()) == []


def test_capture_kv_mock_writes_what_it_says(run, tmp_path):
    ran = run("capture-kv", *MOCK, "--output", tmp_path / "a" / "x", "--layers", "0,1", "--tp-size", "4", "--json", "-")
    said = json.loads(ran.out)
    assert ran.status == 0 and said["output"] == str(tmp_path / "a" / "x.npz") and said["metadata"]["mock"] is True
    assert said["layers"][1]["arrays"]["layer_1_after_prefill_key"] == [32, 3, 128]
    ran = run("capture-kv", *MOCK, "--output", tmp_path / "y", "--json", tmp_path / "said.json")
    assert (ran.status, ran.out) == (0, "") and "32 captures, made up" in ran.err
    assert len(json.loads((tmp_path / "said.json").read_text())["layers"]) == 32


def test_capture_kv_without_mock_asks_a_server(run, tmp_path):
    line = run("capture-kv", "--url", "http://127.0.0.1:9", "--prompt", "a", "--output", tmp_path / "x").line()
    assert line.startswith("http://127.0.0.1:9/v1/models: no server answers: ")


def test_check_kv_says_that_captures_agree(run, tmp_path):
    a, b = two_captures(tmp_path)
    ran = run("check-kv", "--baseline", a, "--target", b)
    assert (ran.status, ran.err) == (0, "") and ran.out.endswith("4 arrays agree\n")


def test_check_kv_exits_1_on_divergence_and_names_the_place(run, tmp_path):
    a, b = two_captures(tmp_path, 0.5)
    ran = run("check-kv", "--baseline", a, "--target", b, "--by", "layer")
    assert ran.status == 1
    assert ran.out.endswith("1 of 4 arrays diverge, first layer_1_after_prefill_key, head 4, token 2\n")
    assert "layer 1" in ran.out
    assert run("check-kv", "--baseline", a, "--target", b, "--max-abs-threshold", "0.6").status == 0
    assert run("check-kv", "--baseline", a, "--target", b, "--rule", "_key max_abs < 0.6").status == 0


def test_check_kv_prints_strict_json(run, tmp_path):
    a, b = two_captures(tmp_path, np.inf)
    ran = run("check-kv", "--baseline", a, "--target", b, "--json")
    said = json.loads(ran.out, parse_constant=pytest.fail)
    assert ran.status == 1 and said["divergent"] and said["compared"] == 4 and said["diverging"] == 1
    assert said["first_divergence"]["key"] == "layer_1_after_prefill_key"


def test_check_kv_prints_json_lines(run, tmp_path):
    a, b = two_captures(tmp_path, 0.5)
    ran = run("check-kv", "--baseline", a, "--target", b, "--jsonl")
    *keys, last = map(json.loads, ran.out.splitlines())
    assert [key["divergent"] for key in keys] == [False, False, True, False]
    assert last["divergent"] and last["keys"] == 4


def test_check_kv_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    a, b = two_captures(tmp_path, 0.5)
    assert run("check-kv", "--baseline", a, "--target", b, "--plot", tmp_path / "x.png").status == 1
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--max-abs-threshold", "much"], "check-kv: --max-abs-threshold must be a number, got 'much'"),
        (["--max-abs-threshold", "nan"], "check-kv: --max-abs-threshold must be a number from 0 on, got nan"),
        (["--cosine-threshold", "2"], "check-kv: --cosine-threshold must be a number from -1 to 1, got 2.0"),
        (["--rule", "[ max_abs < 1"], "check-kv: --rule must begin with a regular expression"),
        (["--by", "word"], "check-kv: --by must be of layer, head, token, page, got 'word'"),
        (["--by", "page"], "check-kv: --page-tokens must be from 1 on with --by page, got None"),
        (["--page-tokens", "0"], "check-kv: --page-tokens must be at least 1, got 0"),
        (["--target", "nowhere.npz"], "nowhere.npz: there is no such file"),
        (["--target", "{folder}/noise.npz"], "{folder}/noise.npz: is no .npz file"),
        (["--target", "{folder}/pages.npz"], "{folder}/a.npz, "),
    ],
)
def test_bad_values_of_check_kv_are_one_line_and_status_1(run, tmp_path, arguments, text):
    a, b = two_captures(tmp_path)
    (tmp_path / "noise.npz").write_bytes(os.urandom(999))
    save_page_digests({"pool": np.zeros((2, 8), np.uint8)}, tmp_path / "pages.npz")
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    sides = ["--baseline", a] + ([] if "--target" in arguments else ["--target", b])
    assert run("check-kv", *sides, *arguments).line().startswith(text.replace("{folder}", str(tmp_path)))


def test_check_kv_names_pages_that_were_written(run, tmp_path):
    pages = np.zeros((9, 8), np.uint8)
    before = save_page_digests({"pool": pages}, tmp_path / "before.npz")
    pages[[2, 3, 4, 7]] = 1
    after = save_page_digests({"pool": pages}, tmp_path / "after.npz")
    ran = run("check-kv", "--baseline", before, "--target", after)
    assert (ran.status, ran.out) == (1, "pool: 2-4, 7 written in between\n")
    ran = run("check-kv", "--baseline", before, "--target", after, "--json")
    assert json.loads(ran.out)["written_pages"] == {"pool": [2, 3, 4, 7]}
    assert run("check-kv", "--baseline", before, "--target", before).status == 0


def test_kv_stats_demo_and_visualize(run, tmp_path):
    pytest.importorskip("matplotlib")
    demo = tmp_path / "demo.json"
    assert run("kv-stats", "demo", "-n", 500, "-o", demo).status == 0
    assert json.loads(demo.read_text())["made_up"] is True
    ran = run("kv-stats", "visualize", "-i", demo, "-o", tmp_path / "all", "--summary")
    assert ran.status == 0 and "total_accesses   500" in ran.out
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "frequency.png", "heatmap.png", "hitrate.png", "interval.png",
    ]  # fmt: skip
    one = run("kv-stats", "visualize", "--input", demo, "--output", tmp_path / "one.png", "--type", "interval")
    assert one.status == 0 and (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["demo", "-n", "0", "-o", "-"], "kv-stats demo: --num-accesses must be at least 1, got 0"),
        (["demo", "-n", "many", "-o", "-"], "kv-stats demo: --num-accesses must be an integer, got 'many'"),
        (["visualize", "-i", "nowhere.json", "-o", "x"], "nowhere.json: No such file or directory"),
        (["visualize", "-i", "{folder}/list.json", "-o", "x"], "{folder}/list.json: is no JSON object"),
        (["visualize", "-i", "{folder}/noise.json", "-o", "x"], "{folder}/noise.json: is no JSON"),
        (
            ["visualize", "-i", "{folder}/other.json", "-o", "{folder}/y"],
            "kv-stats: the input has nothing for a heatmap",
        ),
        (["visualize", "-i", "{folder}/other.json", "--summary"], "kv-stats: the input has no totals"),
    ],
)
def test_bad_values_of_kv_stats_are_one_line_and_status_1(run, tmp_path, arguments, text):
    pytest.importorskip("matplotlib")
    for name, said in (("list", "[1]"), ("noise", "\0{"), ("other", '{"a": 1}')):
        (tmp_path / f"{name}.json").write_text(said)
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    assert run("kv-stats", *arguments).line().startswith(text.replace("{folder}", str(tmp_path)))


def test_explain_says_what_the_op_would_do(run):
    said = json.loads(run("kvkernels", "explain", "copy_pages", "--pools", 3, "--page-bytes", 656, "--json").out)
    assert (said["op"], said["pairs"], said["bytes"]) == ("copy_pages", 64, 3 * 64 * 656)
    for op in house.OPS:
        assert run("kvkernels", "explain", op).status == 0
    assert run("kvkernels", "explain", "swap_blocks", "--pools", 2).line().startswith("explain: --pools must be 1")
    assert "cannot serve" in run("kvkernels", "explain", "swap_blocks", "--executor", "kernel").line()
    assert "cannot be allocated" in run("kvkernels", "explain", "swap_blocks", "--page-bytes", 1 << 61).line()


def test_info_policy_and_replay_are_those_of_the_module(run, tmp_path):
    assert json.loads(run("kvkernels", "info", "--json").out)["version"] == importlib.metadata.version("kvkernels")
    trace = tmp_path / "t.jsonl"
    assert run("kvkernels", "replay", "--generate", "chat", "-n", 20, "-o", trace).status == 0
    said = json.loads(run("kvkernels", "replay", trace, "--policy", "lru,belady", "--capacity", 100, "--json").out)
    assert [row["policy"] for row in said[0]["results"]] == ["lru", "belady"]
    assert run("kvkernels", "replay").line() == "replay: a trace, or --generate, must be given"


def test_the_options_written_down_here_are_those_of_the_house(monkeypatch):
    import argparse

    from kvkernels.memory.eviction import POLICIES
    from kvkernels.memory.replay.command import BOUND, KINDS, add_arguments

    assert (*POLICIES, BOUND) == house.POLICIES and house.TRACES == KINDS
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    theirs = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    ours = {option for one in house.COMMAND.commands["replay"].params for option in one.opts if option.startswith("-")}
    assert ours == theirs
    calibrate = importlib.import_module("kvkernels.transfer.calibrate")
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    theirs = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert theirs == {option for one in house.COMMAND.commands["tune"].params for option in one.opts}
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    text = (ROOT / "benchmarks" / "swap.py").read_text()
    ours = {option for one in house.COMMAND.commands["bench"].params for option in one.opts}
    assert ours == set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text))
    models = (ROOT / "benchmarks" / "models.py").read_text().split("MODELS: dict")[1]
    assert list(house.MODELS) == sorted(re.findall(r'^    "([^"]+)":', models, re.M))
    assert f"EXECUTORS = {house.EXECUTORS!r}".replace("'", '"') in text


def test_bench_measures_and_plot_draws_it(run, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("kvkernels._host")
    report = tmp_path / "swap.json"
    given = ("--model", "llama-3.1-70b-tp8", "--blocks", 2, "--seconds", 0, "--threads", 1, "--executor", "cpu")
    assert run("kvkernels", "bench", *given, "--json", report).status == 0
    assert json.loads(report.read_text())["checked"] is True
    assert run("kvkernels", "plot", report, tmp_path / "swap.png").status == 0
    assert (tmp_path / "swap.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_draws_statistics_and_replays(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("kv-stats", "demo", "-n", 300, "-o", tmp_path / "demo.json")
    run("kvkernels", "replay", "--generate", "chat", "-n", 20, "-o", tmp_path / "t.jsonl")
    replayed = run("kvkernels", "replay", tmp_path / "t.jsonl", "--policy", "lru", "--json").out
    (tmp_path / "replay.json").write_text(replayed)
    for name in ("demo", "replay"):
        assert run("kvkernels", "plot", tmp_path / f"{name}.json", tmp_path / f"{name}.png").status == 0
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "odd.json").write_text("[3]")
    for source, text in (("odd.json", "is nothing that kvkernels replay wrote"), ("demo.json", "--type must be of")):
        given = ["--type", "odd"] if source == "demo.json" else []
        assert text in run("kvkernels", "plot", tmp_path / source, tmp_path / "x.png", *given).line()
