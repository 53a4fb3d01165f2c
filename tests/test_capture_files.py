"""Capture files: what is written, that it is whole or not there, and that no file does harm to who reads it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkernels_records import CaptureFileError, CaptureResult, LayerCapture, load_capture, open_arrays, save_capture
from kvkernels_records import files as files_module
from kvkernels_records.dtypes import DTYPES, bits_of
from kvkernels_records.files import check_sums, save_arrays

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = int(os.environ.get("KVKERNELS_CAPTURE_MUTATIONS", 600))
SUFFIXES = (".npz", ".safetensors")
DRAW = np.random.default_rng(3)


def random_bits(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Any bits: NaNs included."""
    if dtype == np.bool_:
        return DRAW.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape)) * dtype.itemsize
    return DRAW.integers(0, 256, count, dtype=np.uint8).view(dtype).reshape(shape)


def capture(dtype: str = "float16", tokens: int = 5) -> CaptureResult:
    layers = [
        LayerCapture(i, "after_prefill", *(random_bits((2, tokens, 8), DTYPES[dtype]) for _ in range(2)))
        for i in (0, 3)
    ]
    return CaptureResult(layers, {"model": "tiny", "dtype": dtype, "prompt_tokens": tokens, "deep": {"a": [1, None]}})


def assert_equal_captures(one: CaptureResult, other: CaptureResult) -> None:
    assert one.metadata == other.metadata
    first, second = one.arrays(), other.arrays()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and first[name].shape == second[name].shape
        assert bits_of(first[name]).tobytes() == bits_of(second[name]).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_capture_comes_back_bit_for_bit(tmp_path, suffix, dtype):
    result = capture(dtype)
    if suffix == ".npz" and DTYPES[dtype].names:
        with pytest.raises(ValueError, match=rf"is {dtype}, which .npz does not have and .safetensors has"):
            save_capture(result, tmp_path / "a.npz")
        assert list(tmp_path.iterdir()) == []
        return
    path = save_capture(result, tmp_path / f"a{suffix}")
    assert_equal_captures(load_capture(path), result)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whatever_a_layer_has_comes_back(tmp_path, suffix):
    latent, state = random_bits((1, 7, 24), np.dtype(np.float32)), random_bits((3, 4), np.dtype(np.float16))
    layers = [
        LayerCapture(0, "after_prefill", None, None, "mla", {"latent": latent}),
        LayerCapture(
            1, "after_prefill", None, None, "state", {"state0": state, "state1": np.zeros((0, 4), np.float32)}
        ),
        LayerCapture(2, "after_transfer", latent, latent[:, :, :2], "sliding_window", {}, 32),
        LayerCapture(2, "during_decode", np.zeros((2, 0, 4), np.float16), np.zeros((2, 0, 4), np.float16)),
    ]
    result = CaptureResult(layers)
    found = load_capture(save_capture(result, tmp_path / f"a{suffix}"))
    assert_equal_captures(found, result)
    assert [(one.layer_index, one.kind, one.first_token) for one in sorted(found, key=lambda one: one.layer_index)][
        :3
    ] == [
        (0, "mla", 0),
        (1, "state", 0),
        (2, "sliding_window", 32),
    ]


def test_numpy_reads_an_npz_without_pickles(tmp_path):
    result = capture()
    found = np.load(save_capture(result, tmp_path / "a.npz"), allow_pickle=False)
    assert set(found.files) == {f"layer_{i}_after_prefill_{part}" for i in (0, 3) for part in ("key", "value")} | {
        "metadata"
    }
    assert found["layer_3_after_prefill_value"].tobytes() == result.get(3).value.tobytes()
    assert json.loads(found["metadata"].item())["model"] == "tiny"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path, dtype):
    theirs = pytest.importorskip("safetensors.torch")
    result = capture(dtype)
    path = save_capture(result, tmp_path / "a.safetensors")
    found = theirs.load_file(path)
    for name, array in result.arrays().items():
        assert str(found[name].dtype) == f"torch.{dtype}"
        assert found[name].contiguous().view(torch.uint8).numpy().tobytes() == bits_of(array).tobytes()
    theirs.save_file(found, tmp_path / "b.safetensors")
    with open_arrays(tmp_path / "b.safetensors") as file:
        assert file.metadata is None
        assert all(
            bits_of(file.array(name)).tobytes() == bits_of(array).tobytes() for name, array in result.arrays().items()
        )


def test_parents_are_created_and_the_suffix_is_added(tmp_path):
    assert save_capture(capture(), tmp_path / "a" / "b" / "run.1") == tmp_path / "a" / "b" / "run.1.npz"
    assert save_capture(capture("bfloat16"), tmp_path / "c" / "run") == tmp_path / "c" / "run.safetensors"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_captures_are_equal_files(tmp_path, suffix):
    result = capture()
    first, second = (save_capture(result, tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = save_capture(capture(), tmp_path / f"a{suffix}")
    before = path.read_bytes()
    monkeypatch.setattr(files_module.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_capture(capture("float32"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_who_has_mapped_a_file_keeps_it_when_another_takes_its_name(tmp_path, suffix):
    path = save_capture(capture(), tmp_path / f"a{suffix}")
    old = load_capture(path).get(0).key
    wanted = old.tobytes()
    save_capture(capture(), path)
    assert old.tobytes() == wanted != load_capture(path).get(0).key.tobytes()


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    for wrong in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="metadata must be strict JSON"):
            save_capture(CaptureResult([], wrong), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_a_file_not_found_error_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_capture(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_are_views_of_the_file_that_cannot_be_written(tmp_path, suffix):
    key = load_capture(save_capture(capture(), tmp_path / f"a{suffix}")).get(0).key
    assert not key.flags.writeable and not key.flags.owndata
    with pytest.raises(ValueError):
        key[0] = 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_capture_outlives_the_open_file(tmp_path, suffix):
    path = save_capture(capture(), tmp_path / f"a{suffix}")
    with open_arrays(path) as file:
        key = file.array("layer_0_after_prefill_key")
        wanted = key.tobytes()
    path.unlink()
    assert key.tobytes() == wanted


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flipped_bit_of_the_arrays_is_found(tmp_path, suffix):
    path = save_capture(capture(), tmp_path / f"a{suffix}")
    with open_arrays(path) as file:
        entries = dict(file.entries)
    good = path.read_bytes()
    for name, entry in entries.items():
        damaged = bytearray(good)
        damaged[entry.offset + 17] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CaptureFileError, match=f"{name} is damaged: the checksum differs"):
            load_capture(path)
        load_capture(path, verify=False)


def test_changed_metadata_is_found(tmp_path):
    path = save_capture(capture(), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tinY"))
    with pytest.raises(CaptureFileError, match="its metadata is damaged"):
        load_capture(path)


def test_another_format_is_named(tmp_path):
    path = save_capture(capture(), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes().replace(b"kvkernels-capture/1", b"kvkernels-capture/2"))
    with pytest.raises(CaptureFileError, match="is of the format 'kvkernels-capture/2', and this reads"):
        load_capture(path)


def test_a_compressed_archive_of_others_is_read(tmp_path):
    arrays = {
        "a": DRAW.standard_normal((3, 4, 5)),
        "b": np.asfortranarray(DRAW.standard_normal((6, 7))),
        "c": np.float32(3),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with open_arrays(tmp_path / "a.npz") as file:
        check_sums(file)
        assert all(np.array_equal(file.array(name), array) for name, array in arrays.items())


def test_a_large_compressed_array_goes_through_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr("kvkernels_records.arrayfile._IN_MEMORY_BYTES", 1000)
    array = DRAW.integers(0, 9, (4, 1000, 70), dtype=np.int32)
    np.savez_compressed(tmp_path / "a.npz", array=array)
    with open_arrays(tmp_path / "a.npz") as file:
        found = file.array("array")
    assert np.array_equal(found, array) and not found.flags.owndata


def test_damage_in_an_archive_of_others_is_found_by_its_crc(tmp_path):
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        save(path, x=np.arange(5000))
        with open_arrays(path) as file:
            check_sums(file)
            offset = file.entries["x"].offset
        damaged = bytearray(path.read_bytes())
        damaged[offset + 40] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CaptureFileError), open_arrays(path) as file:
            check_sums(file)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_pickles_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=np.array([Harmful()], dtype=object), metadata=np.array([Harmful()], dtype=object))
    Path("b.npz").write_bytes(pickle.dumps(Harmful()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(CaptureFileError):
            open_arrays(name)
    assert not Path("harm").exists()


def member(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"


@pytest.mark.parametrize(
    "members,text",
    [
        ({"a.txt": b"hello"}, "'a.txt' is no array"),
        ({"a.npy": b"hello"}, "is no numpy array"),
        ({"a.npy": member("{'descr': __import__('os').getcwd()}")}, "no plain array of numbers"),
        ({"a.npy": member(HEADER.replace("<f4", "|O"), b"12345678")}, "is of numpy's type '|O'"),
        ({"a.npy": member(HEADER.replace("<f4", "<c8"), b"1" * 16)}, "is of numpy's type '<c8'"),
        ({"a.npy": member(HEADER, b"1234567")}, "has 7 bytes, which are not those of its shape and dtype"),
        ({"a.npy": member(HEADER.replace("(2,)", "(-2,)"), b"12345678")}, "no plain array of numbers"),
        ({"a.npy": member(HEADER.replace("(2,)", "(2, 9999999999999)"), b"12345678")}, "has 8 bytes"),
        ({"a.npy": member(HEADER.replace("(2,)", "(0, 99999999999999999999)"))}, "has a shape that is none"),
        ({"a.npy": member(HEADER.replace("(2,)", "(0, 9999999999, 9999999999)"))}, "of a shape that is too large"),
        ({"a.npy": member(HEADER.replace("(2,)", "(" + "1, " * 40 + ")"), b"1234")}, "has 40 dimensions"),
        ({"metadata.npy": member(HEADER.replace("<f4", "<U1"), b"12345678")}, "its metadata is damaged"),
        ({"metadata.npy": member(HEADER.replace("<f4", "<U2").replace("(2,)", "()"), b"{\0\0\0[\0\0\0")}, "no JSON"),
        ({"metadata.npy": member(HEADER.replace("<f4", "<U1").replace("(2,)", "()"), b"3\0\0\0")}, "no JSON object"),
    ],
)
def test_archives_that_lie_are_refused(tmp_path, members, text):
    with pytest.raises(CaptureFileError) as raised:
        open_arrays(archive(tmp_path / "a.npz", members))
    assert text in str(raised.value) and "a.npz" in str(raised.value)


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    """A member that says it comes to more than deflate can make of its bytes."""
    path = archive(tmp_path / "a.npz", {"a.npy": member(HEADER, b"12345678")}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 1 << 31)
    path.write_bytes(data)
    with pytest.raises(CaptureFileError, match=r"says it has 2147483648 bytes, which \d+ cannot come to"):
        open_arrays(path)


def test_names_that_are_there_twice_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file, pytest.warns(UserWarning):
        for _ in range(2):
            file.writestr("layer_0_after_prefill_key.npy", member(HEADER, b"12345678"))
    with pytest.raises(CaptureFileError, match="layer_0_after_prefill_key is there twice"):
        load_capture(tmp_path / "a.npz")


def tensors_file(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header,text",
    [
        (b"", "its header is no JSON"),
        (b"[" * 100_000, "its header is no JSON"),
        (b"[1]", "its header is no JSON object"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', "a key is given twice"),
        ({"a": {**ENTRY, "more": 1}}, "a is not described as an array"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "a is not described as an array"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "a is not described as an array"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "a is not described as an array"),
        ({"a": {**ENTRY, "dtype": "F128"}}, "dtype 'F128'"),
        ({"a": {**ENTRY, "shape": [3]}}, "a has 8 bytes"),
        ({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}, "a has 8 bytes"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, "a does not begin where"),
        ({"a": ENTRY, "b": ENTRY}, "does not begin where"),
        ({}, "has 18 bytes, and its header says 10"),
        ({"__metadata__": {"kvkernels_capture": 3}}, "its metadata is no text"),
        ({"a": ENTRY, "__metadata__": {"kvkernels_capture": "[]"}}, "its metadata is no JSON object"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, text):
    with pytest.raises(CaptureFileError) as raised:
        open_arrays(tensors_file(tmp_path / "a.safetensors", header, b"12345678"))
    assert text in str(raised.value) and "a.safetensors" in str(raised.value)


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_a_few_bytes_are_refused(tmp_path, suffix, size):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xff" * size)
    with pytest.raises(CaptureFileError):
        open_arrays(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for path, text in ((tmp_path, "is a folder"), (tmp_path / "a.txt", "must end in .npz or .safetensors")):
        with pytest.raises(CaptureFileError, match=text):
            open_arrays(path)
    np.savez(tmp_path / "b.npz", weights=np.zeros(3))
    with pytest.raises(CaptureFileError, match="is no capture: it has no metadata"):
        load_capture(tmp_path / "b.npz")
    path = save_arrays({"weights": np.zeros(3)}, {}, tmp_path / "c.npz")
    with pytest.raises(CaptureFileError, match="is no capture: it holds weights"):
        load_capture(path)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to four edits: bits, bytes of extremes, pieces that are moved, doubled, cut out or overwritten."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(1, len(found)))
        # Most of a file is numbers, in which every bit is right: headers and directories are where lies are told.
        if draw.random() < 0.7:
            at = draw.choice((at % 400, max(0, len(found) - 1 - at % 900)))
        end = min(len(found), at + draw.choice((1, 2, 4, 8, 40)))
        match draw.randrange(7):
            case 0:
                found[at : at + 1] = bytes([found[at] ^ 1 << draw.randrange(8)]) if at < len(found) else b""
            case 1:
                found[at:end] = draw.choice((b"\0", b"\xff", b"9", b"[")) * (end - at)
            case 2:
                found[at:end] = draw.randbytes(end - at)
            case 3:
                del found[at:end]
            case 4:
                found[at:at] = found[at:end]
            case 5:
                del found[draw.randrange(len(found) + 1) :]
            case 6:
                place = draw.randrange(len(found) + 1)
                found[place : place + end - at] = found[at:end]
    return bytes(found)


def samples(folder: Path) -> list[Path]:
    np.savez_compressed(folder / "c.npz", **capture().arrays(), metadata=np.array('{"model": "tiny"}'))
    return [save_capture(capture(), folder / f"a{suffix}") for suffix in SUFFIXES] + [folder / "c.npz"]


def test_mutated_files_are_read_right_or_refused_in_one_sentence(tmp_path):
    """KVKERNELS_CAPTURE_MUTATIONS=10000 makes as many."""
    draw = random.Random(11)
    refused = 0
    for good in samples(tmp_path):
        data, wanted = good.read_bytes(), load_capture(good, verify=good.name != "c.npz")
        for _ in range(MUTATIONS // 3):
            path = good.with_name(f"mutated{good.suffix}")
            path.write_bytes(mutate(data, draw))
            try:
                found = load_capture(path)
            except CaptureFileError as error:
                assert str(path) in str(error) and len(str(error)) < 600 and "\n" not in str(error)
                refused += 1
            else:  # the edit was in padding, or undone
                if good.name != "c.npz":
                    assert_equal_captures(found, wanted)
    assert refused > MUTATIONS // 2


READ_BOMB = """
import resource, sys
import numpy as np
from kvkernels_records import CaptureFileError, open_arrays
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    with open_arrays(sys.argv[1]) as file:
        for name in file.entries:
            file.array(name)
except CaptureFileError as error:
    print(error)
"""


def test_memory_is_bounded_by_what_the_file_can_come_to(tmp_path):
    """A file of 200 KB of zeros that says it is 4 GiB, read with 700 MB of addresses."""
    size = 4 << 30
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(member(HEADER.replace("(2,)", f"({size // 4},)")) + bytes(200 << 20)) + packer.flush()
    head = b"a.npy"
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 33, 0, len(body), 0xFFFFFFFE, len(head), 0) + head
    where = struct.pack(
        "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 8, 0, 33, 0, len(body), 0xFFFFFFFE, len(head), 0, 0, 0, 0, 0, 0
    )
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(where) + len(head), len(local) + len(body), 0)
    path = tmp_path / "bomb.npz"
    path.write_bytes(local + body + where + head + end)
    command = [sys.executable, "-c", READ_BOMB, str(path), str(700 << 20)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "bomb.npz: a says it has" in ran.stdout


def test_digests_do_not_depend_on_byte_order_or_strides(tmp_path):
    array = DRAW.standard_normal((4, 6, 8)).astype(np.float32)
    sums = []
    for one in (array, array.astype(">f4"), np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
        path = save_arrays({"x": one}, {}, tmp_path / "a.safetensors")
        with open_arrays(path) as file:
            check_sums(file)
            sums.append(file.metadata["checksum"]["arrays"]["x"])
            assert np.array_equal(file.array("x"), array)
    assert len(set(sums)) == 1
    assert sums[0] == hashlib.sha256(b"float32 (4, 6, 8)" + array.tobytes()).hexdigest()


def test_nothing_is_left_open(tmp_path):
    path = save_capture(capture(), tmp_path / "a.npz")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        load_capture(path)
        with open_arrays(path):
            pass
    assert len(os.listdir("/proc/self/fd")) <= before + 1
