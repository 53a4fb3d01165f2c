"""The policy for a GPU in files: what is read, what is refused and in which words, and who says which one serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvkernels
from kvkernels import policy
from kvkernels.cli import main
from kvkernels.info import info_text
from kvkernels.registration import LIBRARY

INTEGER = "must be an integer from 0 to 9223372036854775806"
compiled = pytest.mark.skipif(not LIBRARY.compiled, reason="no compiled library has a policy")

EVERY_KEY = {
    "direction": "d2h",
    "link": "coherent",
    "capability_at_least": "9.0",
    "capability_below": "12.1",
    "copies": "one_by_one",
    "count_at_least": 0,
    "count_below": (1 << 63) - 2,
    "fragment_bytes_below": 4097,
    "ring_copy_bytes_at_least": 1,
    "executor": "staged",
}
BUDGETED = {"direction": "d2d", "sm_budget": 12, "executor": "bulk"}


def written(tmp_path: Path, table: object) -> Path:
    path = tmp_path / "policy.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, since the file is read once, and where ops answer under any mode."""
    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, text=True, capture_output=True, timeout=300
    )


def message_of(tmp_path: Path, table: object) -> str:
    """What is raised for a file, without the part that all messages have."""
    path = written(tmp_path, table)
    with pytest.raises(ValueError) as raised:
        policy.load(path)
    start = f"KVKERNELS_POLICY: {path}"
    assert str(raised.value).startswith(start)
    return str(raised.value)[len(start) :]


@compiled
def test_the_default_is_printed_as_a_file_that_can_be_read(tmp_path, capsys):
    default = policy.default()
    assert default == policy.in_force() and default["source"] == "default" and len(default["rows"]) == 11
    assert main(["policy"]) == 0
    printed = capsys.readouterr().out
    assert printed == policy.text_of(default) + "\n"
    assert policy.load(written(tmp_path, printed)) == {"rows": default["rows"]}
    assert main(["policy", "--default"]) == 0 and capsys.readouterr().out == printed


@compiled
def test_the_default_has_the_limits_that_the_documentation_names():
    rows = policy.default()["rows"]
    assert {row["executor"] for row in rows} == {"kernel", "staged", "triton"}
    to_device = [row for row in rows if (row["direction"], row.get("copies")) == ("h2d", "batched")]
    few, many = (row for row in to_device if row["executor"] == "kernel")
    assert (few["count_at_least"], few["count_below"], few["fragment_bytes_below"]) == (16, 50000, 128 << 10)
    assert (many["count_at_least"], many["fragment_bytes_below"]) == (50000, 28 << 10)


def test_without_a_library_there_is_nothing_to_print(monkeypatch, capsys):
    monkeypatch.setattr("kvkernels.cli.LIBRARY", type(LIBRARY)(None, "so", LIBRARY.registrations))
    assert main(["policy"]) == 1
    assert capsys.readouterr() == ("", "there is no policy: so\n")


@compiled
@pytest.mark.parametrize("mode", ["", "torch._subclasses.FakeTensorMode().__enter__(); "])
def test_the_file_that_the_environment_names_serves_and_is_reported(tmp_path, mode):
    rows = [{**EVERY_KEY, "comment": "measured on a napkin"}, BUDGETED, {"executor": "dma"}]
    path = written(tmp_path, {"comment": ["anything"], "rows": rows})
    script = f"import json, torch; {mode}import kvkernels; from kvkernels import policy; "
    script += "print(json.dumps([policy.in_force(), policy.default(), kvkernels.info()['cuda']['policy']]))"
    done = python(script, KVKERNELS_POLICY=str(path), KVKERNELS_KERNEL_BELOW_BYTES="7")
    assert done.returncode == 0, done.stderr
    in_force, default, reported = json.loads(done.stdout)
    assert in_force == {"source": str(path), "refused": None, "rows": [EVERY_KEY, BUDGETED, {"executor": "dma"}]}
    assert list(in_force["rows"][0]) == list(EVERY_KEY)
    assert default == policy.default()
    assert reported == {**in_force, "kernel_below_bytes": "7"}


def test_info_says_which_policy_serves():
    found = kvkernels.info()
    assert found["cuda"]["policy"] == {**policy.in_force(), "kernel_below_bytes": None}
    assert f"\npolicy:   default, {len(policy.in_force()['rows'])} rows\n" in info_text(found)
    found["cuda"]["policy"] = {"source": "some/file", "refused": None, "rows": [{}], "kernel_below_bytes": "12"}
    assert "\npolicy:   some/file, 1 rows, below 12 bytes\n" in info_text(found)
    found["cuda"]["policy"]["refused"] = "not by some/file: why"
    assert "\nrefused:  not by some/file: why\n" in info_text(found)


@pytest.mark.parametrize("name", ["", "no/such/file", "."])
def test_a_file_that_is_not_there_keeps_the_package_from_being_imported(name):
    done = python("import kvkernels", KVKERNELS_POLICY=name)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: KVKERNELS_POLICY: {name} must be a file with JSON, got ")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[", " must be a file with JSON, got Expecting value: line 1 column 2 (char 1)"),
        (
            '{"rows": [{"executor": "dma", "executor": "dma"}]}',
            " must be a file with JSON, got an object with a key that comes twice among ['executor', 'executor']",
        ),
        ([], " must be an object with 'rows' or 'cpu', got []"),
        ({"row": []}, " must be an object with 'rows' or 'cpu', got {'row': []}"),
        ({"rows": {}}, ": rows must be a list, got {}"),
        ({"rows": [], "format": 2}, ": format must be 1, got 2: measure again"),
        ({"rows": [], "machine": "mine"}, ": machine must be an object, got 'mine'"),
        ({"rows": [], "measured": [1]}, ": measured must be an object, got [1]"),
        (
            {"rows": [], "b": 1, "a": 1},
            " must have the keys comment, format, machine, measured, cpu, rows alone, got 'a'",
        ),
        ({"rows": [{"executor": "dma"}, 7]}, ": rows[1] must be an object, got 7"),
        ({"rows": [{}]}, ": rows[0].executor must be there, got a row without"),
        (
            {"rows": [{"executor": "dma", "fragment_below": 1}]},
            ": rows[0] must have the keys executor, direction, link, capability_at_least, capability_below, copies, "
            "count_at_least, count_below, fragment_bytes_below, ring_copy_bytes_at_least, sm_budget and comment alone, "
            "got 'fragment_below'",
        ),
    ],
)
def test_what_is_no_table(tmp_path, table, message):
    assert message_of(tmp_path, table) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("executor", "cpu", "must be one of 'kernel', 'bulk', 'dma', 'staged', 'triton', got 'cpu'"),
        ("executor", ["dma"], "must be one of 'kernel', 'bulk', 'dma', 'staged', 'triton', got ['dma']"),
        ("direction", "h2h", "must be one of 'h2d', 'd2h', 'd2d', got 'h2h'"),
        ("link", "any", "must be one of 'pcie', 'coherent', got 'any'"),
        ("copies", True, "must be one of 'one_by_one', 'batched', got True"),
        ("capability_at_least", 9.0, "must be a compute capability such as '9.0', got 9.0"),
        ("capability_below", "90", "must be a compute capability such as '9.0', got '90'"),
        ("count_below", 10.0, INTEGER + ", got 10.0"),
        ("count_at_least", True, INTEGER + ", got True"),
        ("fragment_bytes_below", -1, INTEGER + ", got -1"),
        ("fragment_bytes_below", (1 << 63) - 1, INTEGER + ", got " + str((1 << 63) - 1)),
        ("ring_copy_bytes_at_least", "x" * 90, INTEGER + ", got '" + "x" * 76 + "..."),
    ],
)  # fmt: skip
def test_values_that_no_row_has(tmp_path, key, value, message):
    rows = [{"executor": "kernel"}, {**EVERY_KEY, key: value}]
    assert message_of(tmp_path, {"rows": rows}) == f": rows[1].{key} {message}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"count_at_least": 5, "count_below": 5}, "count_below must be more than count_at_least, got 5"),
        (
            {"capability_at_least": "12.0", "capability_below": "9.0"},
            "capability_below must be more than capability_at_least, got '9.0'",
        ),
        (
            {"executor": "dma", "sm_budget": 4},
            "sm_budget must be of a row with the executor 'kernel' or 'bulk', got 'dma'",
        ),
        (
            {"ring_copy_bytes_at_least": 1},
            "ring_copy_bytes_at_least must be of a row with the executor 'staged', got 'kernel'",
        ),
    ],
)
def test_rows_that_are_for_no_call(tmp_path, row, message):
    assert message_of(tmp_path, {"rows": [{"executor": "kernel", **row}]}) == f": rows[0].{message}"


@compiled
def test_numbers_that_are_no_rows_are_refused_by_the_library():
    import torch

    def refused(rows: torch.Tensor) -> str:
        with pytest.raises(ValueError) as raised:
            torch.ops.kvkernels._set_policy(rows, "")
        return str(raised.value)

    any_call = torch.full((1, 11), -1)
    assert refused(any_call) == "_set_policy: rows must each have an executor, got one without"
    assert refused(any_call.int()).startswith("_set_policy: rows must be contiguous int64 of shape [n, 11] on the cpu")
    assert refused(any_call[:, :10]).endswith("got int64 of shape [1, 10] on cpu")
    for column, values in ((0, 8), (1, 4), (2, 2), (3, 10000), (5, 2)):
        rows = any_call.clone()
        rows[0, column] = values
        assert refused(rows) == f"_set_policy: rows must have numbers from -1 to {values - 1}, got {values}"
    assert policy.in_force() == policy.default()
