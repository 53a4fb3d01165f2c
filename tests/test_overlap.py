"""Which bytes the reference takes for touched, and which for shared, against sets of bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkernels.reference import overlap
from kvkernels.reference.overlap import (
    Intervals,
    Steps,
    first_read_of_written,
    first_tensors_sharing,
    intersecting,
    shares_bytes_with_itself,
    steps_of_tensor,
)

loops = st.lists(st.tuples(st.integers(1, 3), st.integers(-4, 4)), max_size=3).map(tuple)
steps = st.builds(Steps, st.integers(0, 50), st.integers(1, 6), loops)


def bytes_of_steps(steps: Steps) -> list[int]:
    found = []
    for index in itertools.product(*(range(extent) for extent, _ in steps.loops)):
        start = steps.offset + sum(i * stride for i, (_, stride) in zip(index, steps.loops, strict=True))
        found += range(start, start + steps.fragment_bytes)
    return found


@given(steps)
def test_steps_reach_their_bytes_and_no_further(steps):
    touched = bytes_of_steps(steps)
    assert steps.hull() == (min(touched), max(touched) + 1)
    assert len(steps.starts()) == steps.fragments() == len(touched) // steps.fragment_bytes


@given(steps)
def test_folded_steps_touch_the_same_bytes_as_often(steps):
    folded = steps.folded()
    assert sorted(bytes_of_steps(folded)) == sorted(bytes_of_steps(steps))
    assert all(extent > 1 and stride >= 0 for extent, stride in folded.loops)
    strides = [stride for _, stride in folded.loops]
    assert strides == sorted(strides) and folded.fragment_bytes not in strides[:1]


shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 13)), max_size=3)
dtypes = st.sampled_from([torch.uint8, torch.int16, torch.int32])
STORAGE = torch.zeros(600, dtype=torch.uint8)


@st.composite
def tensors(draw):
    """Anywhere in one storage, with or without overlap."""
    dtype, dimensions, offset = draw(dtypes), draw(shapes), draw(st.integers(0, 40))
    shape, strides = [n for n, _ in dimensions], [stride for _, stride in dimensions]
    return STORAGE.view(dtype).as_strided(shape, strides, offset // dtype.itemsize)


def bytes_of_tensor(t: torch.Tensor) -> list[int]:
    size = t.element_size()
    dimensions = tuple((n, stride * size) for n, stride in zip(t.shape, t.stride(), strict=True))
    return bytes_of_steps(Steps(t.storage_offset() * size, size, dimensions))


@given(tensors())
def test_a_tensor_shares_bytes_with_itself_where_two_elements_do(t):
    touched = bytes_of_tensor(t)
    assert shares_bytes_with_itself(t) == (len(set(touched)) < len(touched))


@pytest.mark.parametrize(
    ("shape", "strides", "shares"),
    [
        ((2, 3), (4, 2), True),
        ((2, 3), (5, 2), False),
        ((2, 3), (6, 2), False),
        ((2, 2, 2), (5, 3, 2), True),
        ((2, 2, 2), (7, 3, 2), False),
        ((2, 1), (0, 0), True),
        ((0, 2), (0, 0), False),
    ],
)
def test_the_last_byte_of_a_loop_counts(shape, strides, shares):
    assert shares_bytes_with_itself(STORAGE.as_strided(shape, strides)) == shares


@pytest.mark.parametrize(("shape", "strides"), [((2, 2), (3, 2)), ((2, 2, 2), (9, 5, 2)), ((5, 4), (4, 1))])
def test_strides_that_step_over_all_before_need_no_list_of_bytes(monkeypatch, shape, strides):
    monkeypatch.setattr(Intervals, "of", None)
    assert not shares_bytes_with_itself(STORAGE.as_strided(shape, strides))


@given(tensors())
def test_steps_of_a_tensor_are_its_bytes_from_its_first_one_on(t):
    touched = bytes_of_tensor(t)
    if touched:
        begin = t.storage_offset() * t.element_size()
        assert steps_of_tensor(t).hull() == (min(touched) - begin, max(touched) + 1 - begin)


spans = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)).map(lambda s: (s[0], s[0] + s[1])), max_size=5)


@given(spans, spans)
def test_spans_that_share_an_address(some, others):
    shared = [[bool(set(range(*a)) & set(range(*b))) for b in others] for a in some]
    assert intersecting(some, others).tolist() == shared


@given(spans)
def test_the_first_neighbours_that_share_a_byte(spans):
    starts, ends = torch.tensor(sorted(spans), dtype=torch.int64).reshape(-1, 2).unbind(1)
    found = Intervals(starts, ends, starts, starts).first_neighbours_sharing()
    shared = (i for i in range(len(spans) - 1) if starts[i + 1] < ends[i])
    first = next(shared, None)
    assert found == (None if first is None else (first, first + 1))


def apart(t: torch.Tensor) -> bool:
    touched = bytes_of_tensor(t)
    return len(set(touched)) == len(touched)


@given(st.lists(tensors().filter(apart), min_size=1, max_size=3), st.lists(tensors(), min_size=1, max_size=3))
def test_the_first_tensors_that_share_bytes_are_named(written, read):
    written_bytes, read_bytes = ([set(bytes_of_tensor(t)) for t in side] for side in (written, read))
    pairs = itertools.combinations(range(len(written)), 2)
    expected = next((("written", i, j) for i, j in pairs if written_bytes[i] & written_bytes[j]), None)
    both = itertools.product(range(len(written)), range(len(read)))
    expected = expected or next((("read", i, j) for i, j in both if written_bytes[i] & read_bytes[j]), None)
    assert first_tensors_sharing(written, read) == expected


@pytest.mark.parametrize("at_once", [1, 2, 1 << 20])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_first_read_of_what_is_written_is_named_wherever_it_comes(monkeypatch, at_once, length):
    """Reads of so many bytes from each address, of which some are written as [10, 14) and [20, 21)."""
    monkeypatch.setattr(overlap, "_READS_AT_ONCE", at_once)
    origin, written = torch.zeros(1, dtype=torch.int64), (range(10, 14), range(20, 21))
    writes = Intervals.joined([Intervals.of(origin + w.start, Steps(0, len(w), ()), 0) for w in written]).sorted()
    nothing = Intervals(*(column[:0] for column in writes))
    for begins in itertools.permutations([3, 9, 14, 19, 21, 40], 4):
        reads = Intervals.of(torch.tensor(begins), Steps(0, length, ()), 0)
        hits = (
            (at, i) for i, begin in enumerate(begins) for at, w in enumerate(written)
            if begin < w.stop and w.start < begin + length
        )  # fmt: skip
        assert first_read_of_written(writes, reads) == next(hits, None)
        assert first_read_of_written(nothing, reads) is None
