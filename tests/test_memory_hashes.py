"""Hashes of blocks: chained, the same everywhere, apart for each salt and extra."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from kvkernels.memory import BlockHasher, PrefixCache
from kvkernels.memory.hashes import ALGORITHMS


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    if request.param != "sha256":
        pytest.importorskip(request.param.split("_")[0].replace("xxh3", "xxhash"))
    return request.param


def obvious(tokens, block_size, *, salt=b"", parent=None, extra=()):
    """What BlockHasher's docstring says, with sha256, written out."""
    last = parent or hashlib.sha256(b"kv block" + struct.pack("<Q", block_size) + salt).digest()
    found = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        data = last + b"".join(struct.pack("<I", token) for token in tokens[start : start + block_size])
        for item in extra:
            kind = {bytes: b"b", str: b"s", int: b"i"}[type(item)]
            content = item if isinstance(item, bytes) else str(item).encode()
            data += kind + struct.pack("<Q", len(content)) + content
        last = hashlib.sha256(data).digest()
        found.append(last)
    return found


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_hashes_are_what_the_docstring_says(block_size):
    draw = random.Random(block_size)
    hasher = BlockHasher(block_size, salt=b"pepper", algorithm="sha256")
    for length in (0, 1, block_size - 1, block_size, block_size + 1, 5 * block_size + 2):
        tokens = [draw.choice([0, 1, 127999, 2**32 - 1]) for _ in range(length)]
        for extra in ((), ("lora",), (b"", 7, "x")):
            assert hasher.hashes(tokens, extra=extra) == obvious(tokens, block_size, salt=b"pepper", extra=extra)


def test_they_are_chained(algorithm):
    """The same block behind another prefix has another hash: unchained ones return other prefixes' KV."""
    hasher = BlockHasher(4, algorithm=algorithm)
    same = [7, 7, 7, 7]
    first, second = hasher.hashes([1, 2, 3, 4, *same]), hasher.hashes([1, 2, 3, 5, *same])
    assert len({*first, *second, *hasher.hashes(same)}) == 5
    assert hasher.hashes(same * 3)[0] != hasher.hashes(same * 3)[1]


def test_a_partial_tail_is_ignored(algorithm):
    hasher = BlockHasher(4, algorithm=algorithm)
    assert [len(hasher.hashes(range(n))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert hasher.hashes(range(7)) == hasher.hashes(range(4))


def test_a_parent_goes_on_where_it_ended(algorithm):
    hasher = BlockHasher(4, algorithm=algorithm)
    tokens = list(range(40))
    whole = hasher.hashes(tokens, extra=["lora"])
    assert whole == hasher.hashes(tokens[:12], extra=["lora"]) + hasher.hashes(
        tokens[12:], parent=whole[2], extra=["lora"]
    )


def test_salts_extras_sizes_and_algorithms_keep_apart(algorithm):
    """A million pairs of one kind would not show more: each of these must differ from all others."""
    tokens = list(range(64))
    found = []
    for salt in (b"", b"a", b"b", b"ab"):
        found += BlockHasher(16, salt=salt, algorithm=algorithm).hashes(tokens)
    hasher = BlockHasher(16, algorithm=algorithm)
    extras = [("a",), (b"a",), ("ab",), ("a", "b"), ("b", "a"), (1,), ("1",), (11,), (1, 1), ("",), ("", ""), (-1,)]
    for extra in extras:
        found += hasher.hashes(tokens, extra=extra)
    for block_size in (8, 32):
        found += BlockHasher(block_size, algorithm=algorithm).hashes(tokens)
    assert len(set(found)) == len(found)


def test_an_image_s_hash_reaches_what_follows():
    hasher = BlockHasher(4, algorithm="sha256")
    tokens = list(range(8))
    with_image = hasher.hashes(tokens[:4], extra=[b"image"])
    assert hasher.hashes(tokens[4:], parent=with_image[0]) != hasher.hashes(tokens)[1:]


TOKENS = [0, 5, 2**31, 2**32 - 1] * 8


@pytest.mark.parametrize(
    "tokens",
    [
        tuple(TOKENS),
        np.array(TOKENS),
        np.array(TOKENS, dtype=np.uint32),
        np.array(TOKENS, dtype=np.uint64),
        np.repeat(TOKENS, 2)[::2],
        torch.tensor(TOKENS),
        torch.tensor(TOKENS).repeat_interleave(2)[::2],
        [np.int64(token) for token in TOKENS],
    ],
    ids=["tuple", "int64", "uint32", "uint64", "strided", "tensor", "strided tensor", "numpy ints"],
)
def test_all_kinds_of_tokens_have_the_same_hashes(tokens):
    hasher = BlockHasher(8, algorithm="sha256")
    assert hasher.hashes(tokens) == obvious(TOKENS, 8)
    small = BlockHasher(2, algorithm="sha256")
    for kind in (np.int8, np.int16, np.int32, np.uint8):
        assert small.hashes(np.arange(5, dtype=kind)) == obvious(range(5), 2)
    assert small.hashes(range(5)) == obvious(range(5), 2)


@pytest.mark.parametrize(
    "tokens",
    [
        [1, -1], [1, 2**32], [1, 1.5], [1, "2"], [1, None], "12", b"12345678", bytearray(8),
        np.array([1, -1]), np.array([1, 2**32]), np.array([1.0, 2.0]), np.array([[1, 2]]), torch.tensor([1, -1]),
        torch.tensor([1.0, 2.0]), np.array([True, False]), {1, 2},
    ],
    ids=repr,
)  # fmt: skip
def test_other_tokens_are_a_value_error(tokens):
    with pytest.raises(ValueError, match=r"BlockHasher.hashes: tokens must be"):
        BlockHasher(2, algorithm="sha256").hashes(tokens)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"parent": b"short"}, "parent must be 32 bytes, got b'short'"),
        ({"parent": "a" * 32}, "parent must be 32 bytes"),
        ({"extra": "tenant"}, "extra must be a sequence of items, got 'tenant' alone"),
        ({"extra": b"tenant"}, "extra must be a sequence of items"),
        ({"extra": [1.5]}, "extra must be bytes, str and int, got 1.5"),
        ({"extra": [True]}, "extra must be bytes, str and int"),
    ],
)
def test_other_arguments_are_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockHasher(2, algorithm="sha256").hashes([1, 2], **arguments)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"block_size": 0}, "BlockHasher: block_size must be a positive integer"),
        ({"salt": "a"}, "BlockHasher: salt must be bytes"),
        ({"algorithm": "md5"}, "BlockHasher: algorithm must be one of xxh3_128, blake3, sha256, got 'md5'"),
    ],
)
def test_a_hasher_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockHasher(**arguments)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    hasher = BlockHasher(4)
    with pytest.raises(ImportError, match=r"xxhash is not installed: pip install kvkernels\[memory\]"):
        hasher.hashes(range(4))


def test_a_cache_of_an_engine_s_hashes_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    cache = PrefixCache(16)
    assert cache.insert([b"a"], [0]) == [] and cache.lookup([b"a"]) == ([0], 16)


def test_another_process_has_the_same_hashes():
    pytest.importorskip("xxhash")
    program = """if True:
        from kvkernels.memory import BlockHasher
        print(BlockHasher(4, salt=b's').hashes(range(8), extra=['x'])[-1].hex())"""
    found = subprocess.check_output([sys.executable, "-c", program], text=True).strip()
    assert found == BlockHasher(4, salt=b"s").hashes(range(8), extra=["x"])[-1].hex()


def test_xxh3_is_over_the_same_bytes():
    xxhash = pytest.importorskip("xxhash")
    last, found = xxhash.xxh3_128_digest(b"kv block" + struct.pack("<Q", 2)), []
    for pair in itertools.pairwise(range(0, 6, 2)):
        last = xxhash.xxh3_128_digest(last + struct.pack("<2I", pair[0], pair[0] + 1))
        found.append(last)
    assert BlockHasher(2).hashes(range(4)) == found
