"""Replay of traces: counts, the optimum, the command, and traces that are made up."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvkernels.cli import main
from kvkernels.memory.eviction import POLICIES
from kvkernels.memory.replay import (
    BLOCK_TOKENS,
    Simulation,
    TraceError,
    generate,
    optimal_hits,
    read_trace,
    replay,
    write_trace,
)

TRACE = Path(__file__).parent / "data" / "synthetic_trace.jsonl.gz"
REQUESTS = [([0, 1, 2], 0), ([0, 1, 3], 500), ([4], 900), ([0, 1, 2], 1000)]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps({"timestamp": at, "hash_ids": ids}) + "\n" for ids, at in REQUESTS))
    return path


def test_the_synthetic_trace_gives_lrus_counts():
    requests = list(read_trace(TRACE))
    assert (len(requests), sum(len(request.hash_ids) for request in requests)) == (3_993, 121_877)
    bounded, unbounded = Simulation("lru", 5_860), Simulation("lru", 1_000_000)
    replay(requests, [bounded, unbounded])
    assert (bounded.hits, unbounded.hits) == (37_703, 77_953)


@pytest.mark.parametrize("name,hits", [("fifo", 36_644), ("lfu", 29_603), ("arc", 39_244), ("s3fifo", 37_465)])
def test_the_synthetic_trace_gives_the_counts_of_other_models(name, hits):
    simulation = Simulation(name, 5_860)
    replay(read_trace(TRACE), [simulation])
    assert simulation.hits == hits


@pytest.mark.parametrize("capacity,best_of_others", [(1_000, 11_097), (5_860, 39_244), (30_000, 76_290)])
def test_chain_is_at_least_as_good_as_the_best_of_the_others(capacity, best_of_others):
    simulation = Simulation("chain", capacity)
    replay(read_trace(TRACE), [simulation])
    assert simulation.hits >= best_of_others


def test_the_optimum_on_the_synthetic_trace():
    accesses = [block for request in read_trace(TRACE) for block in request.hash_ids]
    assert optimal_hits(accesses, 5_860) == 67_031


def test_the_optimum_is_that_of_all_choices():
    def best(accesses, capacity):
        """Tries every set that may be held after each access."""
        states = {frozenset(): 0}
        for block in accesses:
            after = {}
            for held, hits in states.items():
                hits += block in held
                options = [held] if block in held else [held, *(
                    held - out | {block}
                    for out in ([frozenset()] if len(held) < capacity else [frozenset([one]) for one in held])
                )]  # fmt: skip
                for option in options:
                    after[option] = max(after.get(option, 0), hits)
            states = after
        return max(states.values())

    rng = random.Random(0)
    for _ in range(200):
        accesses = [rng.randrange(6) for _ in range(rng.randint(0, 14))]
        capacity = rng.randint(1, 3)
        assert optimal_hits(accesses, capacity) == best(accesses, capacity)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("chains", [False, True])
def test_hits_are_a_prefix_and_below_the_optimum(name, chains):
    requests = [line["hash_ids"] for line in generate("chat", 300, seed=1)]
    simulation = Simulation(name, 100, chains=chains)
    for hash_ids in requests:
        held = set(simulation._held)
        before = simulation.hits
        simulation.run(hash_ids)
        at_least = len(list(itertools.takewhile(held.__contains__, hash_ids)))
        # A block of the prefix may be evicted for one before it only if it was not held.
        assert simulation.hits - before == at_least
        assert len(simulation._held) <= 100
    assert simulation.hits <= optimal_hits(list(itertools.chain(*requests)), 100)


def test_a_request_that_is_longer_than_the_cache():
    for name, chains in itertools.product(POLICIES, (False, True)):
        simulation = Simulation(name, 4, chains=chains)
        for _ in range(3):
            simulation.run(list(range(10)))
        if chains:
            assert simulation._held == {0, 1, 2, 3} and simulation.hits == 8


def test_the_clock_is_the_traces():
    simulation = Simulation("ttl", 4)
    replay(read_trace(TRACE), [simulation])
    assert simulation._policy._clock() == [request.timestamp_ms for request in read_trace(TRACE)][-1] / 1000


def test_the_command_prints_a_table(small, capsys):
    assert main(["replay", str(small), "--policy", "lru,belady", "--capacity", "1600tok,4"]) == 0
    out = capsys.readouterr().out
    assert "4 requests, 10 blocks, 5 hits (50.0%) without a bound" in out
    # 3 blocks are 1,536 tokens: of the second request two; of the last 0 went for 3, 1 for 4.
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["hits", "by", "blocks", "3", "4"],
        ["lru", "2", "20.0%", "4", "40.0%"],
        ["belady", "5", "50.0%", "5", "50.0%"],
    ]


def test_the_command_prints_json(small, capsys):
    assert main(["replay", str(small), str(small), "--policy", "all", "--capacity", "2", "--json", "--chains"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second
    assert first["requests"] == 4 and first["accesses"] == 10 and first["unbounded_hits"] == 5 and first["chains"]
    assert [row["policy"] for row in first["results"]] == [*POLICIES, "belady"]
    assert all(row["hit_rate"] == row["hits"] / 10 for row in first["results"])


def test_the_command_draws(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "small.png"
    assert main(["replay", str(small), "--policy", "lru,chain", "--capacity", "1,2,4", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_one_line(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["replay", str(small), "--plot", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err.strip().endswith("pip install kvkernels[bench]")


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "a line must be JSON"),
        ("[1]", "a line must be an object with hash_ids, got [1]"),
        ('{"timestamp": 1}', "a line must be an object with hash_ids"),
        ('{"hash_ids": [1, true]}', "whose hash_ids are a list of integers, got [1, True]"),
        ('{"hash_ids": 7}', "whose hash_ids are a list of integers, got 7"),
        ('{"hash_ids": [1, 1]}', "whose hash_ids are different, got [1, 1]"),
        ('{"hash_ids": [1], "timestamp": "now"}', "whose timestamp is a number, got 'now'"),
        ("\xff", "a line must be JSON"),
    ],
)
def test_a_malformed_line_is_one_error_with_its_number(tmp_path, line, message, capsys):
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"hash_ids": [1, 2]}\n\n' + line.encode("latin-1") + b"\n"))
    assert main(["replay", str(path), "--policy", "lru"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"replay: {path}:3: ") and message in captured.err


def test_files_that_cannot_be_read(tmp_path):
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b'{"hash_ids": [1, 2]}\n' * 100)[:-12])
    for path in (cut, tmp_path / "absent", tmp_path):
        with pytest.raises(TraceError, match=r"the file must be readable, got"):
            list(read_trace(path))


@pytest.mark.parametrize(
    "arguments",
    [["--policy", "mru"], ["--capacity", "0"], ["--capacity", "511tok"], ["--capacity", "1e3"], ["-n", "-1"]],
)
def test_the_commands_arguments_are_checked(arguments, small, capsys):
    with pytest.raises(SystemExit):
        main(["replay", str(small), *arguments])
    assert "must be" in capsys.readouterr().err


def test_the_command_needs_something_to_do(capsys, tmp_path):
    assert main(["replay"]) == 1 and "a trace, or --generate, must be given" in capsys.readouterr().err
    assert main(["replay", "--generate", "chat"]) == 1 and "-o must be given" in capsys.readouterr().err


def test_a_process_ends_without_a_traceback(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n")
    ended = subprocess.run(
        [sys.executable, "-m", "kvkernels", "replay", str(path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and f"{path}:1: " in ended.stderr


@pytest.mark.parametrize("kind", ["chat", "rag", "agent"])
def test_generated_traces(kind, tmp_path, capsys):
    path, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    assert main(["replay", "--generate", kind, "-n", "200", "--seed", "3", "-o", str(path)]) == 0
    write_trace(kind, 200, again, seed=3)
    assert gzip.decompress(again.read_bytes()) == path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == list(generate(kind, 200, seed=3)) != list(generate(kind, 200, seed=4))
    assert len(lines) == 200
    assert [line["timestamp"] for line in lines] == sorted(line["timestamp"] for line in lines)
    parent = {}
    for line in lines:
        ids = line["hash_ids"]
        assert len(ids) == -(-line["input_length"] // BLOCK_TOKENS)
        for before, block in zip([None, *ids], ids, strict=False):
            assert parent.setdefault(block, before) == before
    blocks = [block for line in lines for block in line["hash_ids"]]
    assert set(blocks) == set(range(len(set(blocks))))
    assert 0.1 < 1 - len(set(blocks)) / len(blocks) < 0.98  # there is something to reuse, and something new


def test_the_generator_refuses():
    with pytest.raises(ValueError, match=r"generate: kind must be one of 'chat', 'rag', 'agent', got 'code'"):
        next(generate("code", 1))
    with pytest.raises(ValueError, match=r"generate: num_requests must be an integer from 0, got -1"):
        next(generate("chat", -1))
