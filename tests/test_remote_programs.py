"""The two terminals of the README, and the benchmark, very small."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("xxhash")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "remote" / "kv.py"
SMALL = ("--layers", "3", "--heads", "4", "--head-size", "16", "--blocks", "12", "--send", "7")


@pytest.mark.parametrize("given", [(), ("--flip",)], ids=["", "flip"])
def test_two_terminals(tmp_path, given):
    secret = tmp_path / "secret"
    secret.write_text("a secret that only this test has\n")
    common = ("--secret-file", str(secret), *SMALL)
    decode = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "decode", "--port", "0", *common], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        port = re.fullmatch(r"waiting at 127.0.0.1:(\d+)\n", decode.stdout.readline())[1]
        prefill = subprocess.run(
            [sys.executable, str(EXAMPLE), "prefill", "--port", port, *common, *given], capture_output=True, text=True,
            timeout=200,
        )  # fmt: skip
        out, errors = decode.communicate(timeout=200)
    finally:
        decode.kill()
        decode.wait()
    assert prefill.returncode == decode.returncode == 0, (prefill.stdout, prefill.stderr, out, errors)
    assert "every value is there, and no other block has changed" in out
    refused = int(re.search(r"refused for their sums: (\d+)", out)[1])
    assert (refused > 0) == bool(given)
    assert prefill.stdout.count("committed") == 2


def test_the_receiver_says_so_where_a_value_is_wrong(tmp_path):
    """What proves it can also find that it is not so: another seed's values are expected."""
    secret = tmp_path / "secret"
    secret.write_text("a secret that only this test has\n")
    common = ("--secret-file", str(secret), *SMALL)
    decode = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "decode", "--port", "0", "--seed", "5", *common], stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        port = re.search(r":(\d+)", decode.stdout.readline())[1]
        subprocess.run([sys.executable, str(EXAMPLE), "prefill", "--port", port, *common], timeout=200, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        out, _ = decode.communicate(timeout=200)
    finally:
        decode.kill()
        decode.wait()
    assert decode.returncode == 1 and "WRONG" in out


def test_the_benchmark_writes_its_tables(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "remote.py"), "--rounds", "1", "--mib", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--idle-seconds", "0.1", "--out", str(tmp_path)], capture_output=True, text=True,
                          timeout=300, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "remote.json").read_text())
    assert [row["page"] for row in found["rates"]] == [1024, 4096, 16384, 65536]
    assert all(row["packed, TCP"] > 0 and row["a raw socket"] > 0 for row in found["rates"])
    assert (tmp_path / "remote.md").read_text() in done.stdout
