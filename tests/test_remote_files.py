"""Pages in files: all of them or a miss, whatever became of the file."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("xxhash")

from remote_cases import Sharded, random_bytes

from kvkernels.transfer.remote import FileTier
from kvkernels.transfer.remote import files as files_module

KEY = b"key"


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_stored_is_loaded_and_nothing_else_changes(tmp_path):
    src = [random_bytes(8, 48, seed=i)[:, :40] for i in range(3)]
    dst = [random_bytes(8, 56, seed=9 + i) for i in range(3)]
    before = [one.clone() for one in dst]
    writer, reader = FileTier(tmp_path, src), FileTier(tmp_path, [one[:, :40] for one in dst])
    writer.store(KEY, [5, 1, 5])
    assert reader.load(KEY, torch.tensor([7, 0, 2])) is True
    for now, then, origin in zip(dst, before, src, strict=True):
        then[[7, 0, 2], :40] = origin[[5, 1, 5]]
        assert torch.equal(now, then)
    assert not reader.load(b"other", [0])
    assert writer.stats() == {"stored": 1} and reader.stats() == {"loaded": 1, "missed": 1}
    assert writer.remove(KEY) and not writer.remove(KEY) and not reader.load(KEY, [0])


@pytest.mark.parametrize("part_bytes", [512, 1 << 26])
def test_another_layout_reads_it(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(files_module, "_PART_BYTES", part_bytes)
    src, dst = Sharded("NHD", 1, 6), Sharded("HND", 2, 6)
    array = torch.randn(2, 2, 6, 4, 4, 8).to(torch.float16)
    src.set(array)
    FileTier(tmp_path, src.caches[0]).store(KEY, [1, 2])
    for cache in dst.caches:
        assert FileTier(tmp_path, cache).load(KEY, [5, 0])
    assert torch.equal(dst.get(array)[:, :, [5, 0]], array[:, :, [1, 2]])


def test_a_file_that_was_changed_anywhere_is_a_miss(tmp_path):
    src, dst = random_bytes(8, 40), random_bytes(8, 40, seed=1)
    before = dst.clone()
    FileTier(tmp_path, [src]).store(KEY, [1, 2, 3])
    path, reader, rng = only_file(tmp_path), FileTier(tmp_path, [dst]), random.Random(0)
    whole = path.read_bytes()
    changed = [whole[:i] + bytes([whole[i] ^ (1 << rng.randrange(8))]) + whole[i + 1 :] for i in range(len(whole))]
    changed += [whole[:i] for i in range(0, len(whole), 3)] + [whole + b"\0", b""]
    for data in changed:
        path.write_bytes(data)
        assert reader.load(KEY, [4, 5, 6]) is False
    assert torch.equal(dst, before)
    counts = reader.stats()
    assert sum(counts.values()) == len(changed) and set(counts) >= {"refused_checksum", "refused_length"}
    path.write_bytes(whole)
    assert reader.load(KEY, [4, 5, 6]) and torch.equal(dst[4:7], src[1:4])


def test_files_of_others_are_a_miss(tmp_path, monkeypatch):
    src = random_bytes(8, 40)
    FileTier(tmp_path, [src]).store(KEY, [1, 2])
    for pools, blocks in (([src], [0]), ([random_bytes(8, 41)], [0, 1]), ([src, src.clone()], [0, 1])):
        assert not FileTier(tmp_path, pools).load(KEY, blocks)
    monkeypatch.setattr(files_module, "_VERSION", 2)
    reader = FileTier(tmp_path, [src])
    assert not reader.load(KEY, [0, 1]) and reader.stats() == {"refused_protocol": 1}


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Synced before it has its name; where anything fails, the old one is there and no rest is left."""
    src, dst = random_bytes(8, 40), torch.zeros(8, 40, dtype=torch.uint8)
    tier = FileTier(tmp_path, [src])
    tier.store(KEY, [1])
    steps, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("sync"), fsync(file))[1])
    monkeypatch.setattr(Path, "replace", lambda *given: (steps.append("rename"), replace(*given))[1])
    tier.store(KEY, [2])
    assert steps == ["sync", "rename", "sync"]

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tier.store(KEY, [3])
    assert only_file(tmp_path).suffix == ".kv"
    assert FileTier(tmp_path, [dst]).load(KEY, [0]) and torch.equal(dst[0], src[2])


def test_rests_of_killed_writers_are_removed_when_they_are_old(tmp_path):
    old, new = tmp_path / "a.tmp", tmp_path / "b.tmp"
    for rest in (old, new):
        rest.write_bytes(b"rest")
    os.utime(old, (time.time() - 7200,) * 2)
    FileTier(tmp_path, [random_bytes(8, 40)])
    assert only_file(tmp_path) == new


@pytest.mark.parametrize("key", ["text", b"", b"x" * 65])
def test_what_a_tier_refuses(tmp_path, key):
    tier = FileTier(tmp_path, [random_bytes(8, 40)])
    for call in (tier.store, tier.load):
        with pytest.raises(ValueError, match="key must be 1 to 64 bytes"):
            call(key, [0])
    with pytest.raises(IndexError, match="below 8, got 8"):
        tier.store(KEY, [8])
    with pytest.raises(ValueError, match="must be 1 to"):
        tier.load(KEY, [])
    with pytest.raises(ValueError, match="different ones"):
        tier.load(KEY, [1, 1])
    assert list(tmp_path.iterdir()) == []
