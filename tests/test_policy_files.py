"""Policy files of the cache directory: on which machine they serve, what refuses them, and how they are written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

import kvkernels
from kvkernels import policy
from kvkernels.info import info_text
from kvkernels.policy import files
from kvkernels.policy.machine import machine
from kvkernels.registration import LIBRARY
from kvkernels.transfer import Mover

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="no compiled library has a policy")

NUMBERS = {"lanes": 1, "stream_pool_bytes": 1 << 20, "interleave": 2, "writes_rows": False}
MEASURED = {"at": "2026-01-02 03:04 UTC", "by": "a test"}


def table(**changed: object) -> dict[str, object]:
    return {"format": 1, "machine": machine(), "measured": MEASURED, "cpu": NUMBERS, **changed}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where a file in the cache directory is; what served before does so after the test."""
    monkeypatch.delenv(policy.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "kvkernels" / "policy.json"
    policy.use(None)


def explained() -> kvkernels.Explanation:
    src, dst = torch.zeros(1024, 4096, dtype=torch.uint8), torch.zeros(1024, 4096, dtype=torch.uint8)
    return kvkernels.explain("swap_blocks", src, dst, 4096, torch.arange(256).repeat(2, 1).T)


SCRIPT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import kvkernels, torch
    from kvkernels import policy
src, dst = (torch.zeros(1024, 4096, dtype=torch.uint8) for _ in range(2))
said = kvkernels.explain("swap_blocks", src, dst, 4096, torch.arange(256).repeat(2, 1).T)
warned = [str(w.message) for w in caught if "kvkernels" in str(w.message)]
print(json.dumps([policy.in_force()["source"], policy.in_force()["refused"], warned, said.table, said.streaming]))
"""


def imported(**environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != policy.VARIABLE} | environment
    return subprocess.run([sys.executable, "-c", SCRIPT], env=given, text=True, capture_output=True, timeout=300)


def test_a_process_goes_by_the_file_in_the_cache_directory(path, tmp_path):
    policy.write(path, table())
    done = imported(XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = f"{path}, tuned on {machine()['processor']} at 2026-01-02 03:04 UTC"
    assert json.loads(done.stdout) == [str(path), None, [], said, True]
    assert not explained().streaming  # 1 MiB is below what is compiled in


def test_another_machine_s_file_is_refused_with_one_warning(path, tmp_path, monkeypatch):
    policy.write(path, table(machine={**machine(), "processor": "an abacus"}))
    done = imported(XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    source, refused, warned, said, streaming = json.loads(done.stdout)
    why = f"not by {path}: machine.processor must be this machine's {machine()['processor']!r}, got 'an abacus'"
    assert (source, refused, streaming) == ("default", why, False)
    assert warned == [f"kvkernels goes by what is compiled in, {why}"]
    assert said.startswith("compiled in: ") and said.endswith(f" ({why})")
    monkeypatch.setenv(policy.VARIABLE, str(path))
    with pytest.raises(ValueError) as raised:
        policy._read_files()
    assert str(raised.value) == f"KVKERNELS_POLICY: {path}: {why.removeprefix(f'not by {path}: ')}"


def test_the_word_default_reads_no_file(path, monkeypatch):
    policy.write(path, table())
    monkeypatch.setenv(policy.VARIABLE, "default")
    policy._read_files()
    assert policy.in_force() == policy.default() and explained().table.startswith("compiled in: ")
    monkeypatch.delenv(policy.VARIABLE)
    policy._read_files()
    assert policy.in_force()["source"] == str(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("processor", "x"), ("instruction_set", "x"), ("features", []), ("cores", 0), ("gpus", ["x"]), ("driver", "1.0")],
)
def test_each_part_of_a_machine_s_identity_counts(path, key, value):
    policy.write(path, table(machine={**machine(), key: value}))
    with pytest.raises(ValueError, match=rf"machine\.{key} must be this machine's .*, got "):
        policy.use(path)
    left = {name: one for name, one in machine().items() if name != key}
    policy.write(path, table(machine=left))
    if machine()[key] is not None:
        with pytest.raises(ValueError, match=rf"machine\.{key} must be this machine's .*, got None"):
            policy.use(path)
    assert policy.in_force() == policy.default()


def test_a_file_that_names_no_machine_serves_on_any(path):
    policy.write(path, {"cpu": {"lanes": 1}})
    policy.use(path)
    assert policy.in_force()["cpu"] == {"lanes": 1} and explained().table == str(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"cpu": {"lanes": 0}}', b"[" * 100_000])
def test_a_damaged_file_is_refused_in_words(path, content, monkeypatch):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="kvkernels goes by what is compiled in, not by .*policy.json") as warned:
        policy._read_files()
    assert len(warned) == 1 and policy.in_force()["source"] == "default"
    assert policy.in_force()["refused"] in info_text(kvkernels.info())
    assert policy.in_force()["rows"] == policy.default()["rows"]
    monkeypatch.setenv(policy.VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"^KVKERNELS_POLICY: .*policy\.json"):
        policy._read_files()


def test_a_folder_or_a_dangling_link_in_the_file_s_place_is_refused(path):
    path.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="must be a file with JSON"):
        policy._read_files()
    path.rmdir()
    path.symlink_to("nowhere")
    with pytest.warns(RuntimeWarning, match="must be a file with JSON"):
        policy._read_files()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        assert policy.cache_path() == tmp_path / ".cache/kvkernels/policy.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert policy.cache_path() == tmp_path / ".cache/kvkernels/policy.json"
    monkeypatch.setattr(files.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert policy.cache_path() is None


def test_a_file_that_was_written_is_read_as_it_was(path):
    given = table(rows=policy.default()["rows"])
    policy.write(path, given)
    assert policy.load(path) == {key: value for key, value in given.items() if key != "format"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [one.name for one in path.parent.iterdir()] == ["policy.json"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_leaves_what_was_there(path, step, monkeypatch):
    policy.write(path, table(cpu={"lanes": 7}))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        policy.write(path, table(cpu={"lanes": 8}))
    assert policy.load(path)["cpu"] == {"lanes": 7}
    assert [one.name for one in path.parent.iterdir()] == ["policy.json"]


def write_often(path, lanes: int) -> int:
    """In a process of its own, whose number is returned; it does nothing that needs torch."""
    child = os.fork()
    if child:
        return child
    try:
        for _ in range(200):
            policy.write(path, {"cpu": {"lanes": lanes}, "measured": {"padding": str(lanes) * 20_000}})
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_two_processes_that_write_at_once_leave_a_whole_file_at_any_time(path):
    policy.write(path, {"cpu": {"lanes": 1}, "measured": {"padding": "1" * 20_000}})
    running = {write_often(path, lanes) for lanes in (1, 2)}
    while running:
        found = policy.load(path)
        assert found["measured"]["padding"] == str(found["cpu"]["lanes"]) * 20_000
        for child in tuple(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            assert status == 0
            running.discard(ended)
    assert [one.name for one in path.parent.iterdir()] == ["policy.json"]


def test_a_process_may_change_its_file_and_go_back(path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    before = policy.cpu.in_force()
    with Mover() as mover:
        assert mover.lanes == 2
    policy.write(path, table(cpu={**NUMBERS, "lanes": 5}))
    policy.use(path)
    assert policy.in_force() == {
        "source": str(path), "refused": None, "machine": machine(), "measured": MEASURED,
        "cpu": {**NUMBERS, "lanes": 5}, "rows": policy.default()["rows"],
    }  # fmt: skip
    now = policy.cpu.in_force()
    assert {name for name in now if now[name] != before[name]} == {*NUMBERS, "table"} - (
        {"interleave"} if before["interleave"] == 2 else set()
    )
    assert explained().streaming and f"\ntable:    {path}, tuned on " in info_text(kvkernels.info())
    with Mover() as mover:
        assert mover.lanes == 5
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    with Mover() as mover:
        assert mover.lanes == 2  # one is left to others
    policy.write(path, {"rows": [{"executor": "dma"}], "cpu": {"lanes": 0}})
    with pytest.raises(ValueError, match=r"cpu\.lanes must be an integer from 1 to 1024, got 0"):
        policy.use(path)
    assert policy.cpu.in_force() == now  # what served does so still
    policy.use(None)
    assert policy.cpu.in_force() == before and policy.in_force() == policy.default()


def test_lanes_and_streaming_are_what_the_file_says(path):
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        src, dst = torch.zeros(4096, 4096, dtype=torch.uint8), torch.zeros(4096, 4096, dtype=torch.uint8)

        def said(**numbers: int) -> tuple[int, bool]:
            policy.write(path, {"cpu": numbers})
            policy.use(path)
            found = kvkernels.explain("swap_blocks", src, dst, 4096, torch.arange(4096).repeat(2, 1).T)
            return found.lanes, found.streaming

        assert said(lanes=1024)[0] == 8 and said(lanes=3)[0] == 3 and said(lanes=1)[0] == 1
        assert said(serial_bytes=(16 << 20) + 1)[0] == 1 and said(serial_bytes=16 << 20)[0] == 8
        assert said(stream_pool_bytes=16 << 20)[1] and not said(stream_pool_bytes=(16 << 20) + 1)[1]
        assert said(stream_soon_read_bytes=0) == said()
    finally:
        torch.set_num_threads(threads)


def test_threads_may_set_what_others_read(path):
    stop = threading.Event()
    policy.write(path, table())

    def change() -> None:
        while not stop.is_set():
            policy.use(path)
            policy.use(None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        tables = {explained().table for _ in range(100)}
    finally:
        stop.set()
        thread.join()
    tuned = [one for one in tables if one.startswith(str(path))]
    assert len(tables) <= 2 and len(tuned) <= 1


def written(root, where: str, text: str) -> None:
    target = root / where
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def test_a_machine_is_what_the_system_says(tmp_path):
    written(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: A Chip\ncpu family\t: 6\nmodel\t\t: 7\n"
            "stepping\t: 8\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nmodel name\t: Another\n")  # fmt: skip
    written(tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Module  580.65.06  Release\n")
    for bus, model in (("0000:1B:00.0", "NVIDIA H100"), ("0000:0a:00.0", "NVIDIA A10")):
        written(tmp_path, f"proc/driver/nvidia/gpus/{bus}/information", f"Model: \t\t {model}\nIRQ:   \t\t 12\n")
    written(tmp_path, "sys/bus/pci/devices/0000:1b:00.0/max_link_speed", "32.0 GT/s PCIe\n")
    written(tmp_path, "sys/bus/pci/devices/0000:1b:00.0/max_link_width", "16\n")
    found = machine(tmp_path)
    assert found == {
        "processor": "A Chip, cpu family 6, model 7, stepping 8", "instruction_set": machine()["instruction_set"],
        "features": ["avx2", "avx512f"], "cores": os.cpu_count(), "driver": "580.65.06",
        "gpus": ["NVIDIA A10", "NVIDIA H100, 32.0 GT/s PCIe, x16"],
    }  # fmt: skip
    written(tmp_path, "arm/proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n"
            "CPU part\t: 0xd40\n")  # fmt: skip
    arm = machine(tmp_path / "arm")
    assert arm["processor"] == "CPU implementer 0x41, CPU part 0xd40" and arm["features"] == ["asimd", "sve"]
    assert (arm["gpus"], arm["driver"], machine(tmp_path / "nothing")["processor"]) == ([], None, "")
