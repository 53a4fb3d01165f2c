"""What a key is worth while it waits: hits for each unit of time that it takes up room."""

from __future__ import annotations

from collections.abc import Sequence

#: Ages go into buckets whose widths double every fourth.
PER_OCTAVE = 4
BUCKETS = 48
EDGES = tuple(
    bucket if bucket < PER_OCTAVE else (bucket % PER_OCTAVE + PER_OCTAVE) << (bucket // PER_OCTAVE - 1)
    for bucket in range(BUCKETS + 1)
)

#: A class of which nothing is known is taken for one whose keys are used again half the time, with this weight.
_PRIOR_KEYS = 100.0
_MOST_LIKELY = 0.98


def bucket_of(age: int) -> int:
    """The bucket of an age: the last whose edge is not above it.

    Examples
    --------
    >>> [bucket_of(age) for age in (0, 3, 4, 9, 10, 1 << 40)]
    [0, 3, 4, 8, 9, 47]
    """
    if age < PER_OCTAVE:
        return age
    octave = age.bit_length() - PER_OCTAVE.bit_length()
    return min(BUCKETS - 1, octave * PER_OCTAVE + (age >> octave))


def survival(gaps: Sequence[float]) -> list[float]:
    """The share of gaps that are in each bucket or a later one; at the end 0.

    Parameters
    ----------
    gaps : sequence of float
        How many gaps between two uses were in each bucket, more than 0 in all.
    """
    left = 0.0
    shares = [0.0] * (BUCKETS + 1)
    for bucket in range(BUCKETS - 1, -1, -1):
        left += gaps[bucket]
        shares[bucket] = left
    return [share / left for share in shares]


def hit_densities(survival: Sequence[float], again: float, watched: float) -> list[float]:
    """For keys of each age, the most hits that an hour of room can give if they are kept for the best length of time.

    A key is used again with the probability p = again / watched, after a gap of the distribution that ``survival``
    has. Kept until it is used or T old it gives H(T) = p F(T) hits and takes up O(T), the integral of 1 - H. From age a
    on, the best T has the steepest line from (O(a), H(a)) to (O(T), H(T)): the slopes of the curve's hull, which is
    Gittins' index of a key that stops when it is used.

    Parameters
    ----------
    survival : sequence of float
        What ``survival`` gives.
    again, watched : float
        Keys that were used again, and all that have been watched for long enough to know.

    Returns
    -------
    list of float
        One for each bucket.
    """
    p = min(_MOST_LIKELY, (again + _PRIOR_KEYS / 2) / (watched + _PRIOR_KEYS))
    # After the longest gap there is nothing to come.
    end = survival.index(0.0)
    hits = [p * (1.0 - share) for share in survival[: end + 1]]
    room = [0.0]
    for bucket in range(end):
        width = EDGES[bucket + 1] - EDGES[bucket]
        room.append(room[-1] + width * (1.0 - (hits[bucket] + hits[bucket + 1]) / 2))
    found = [0.0] * BUCKETS
    hull = [end]
    slopes = [0.0]  # from the point of the hull before, going back
    for bucket in range(end - 1, -1, -1):
        slope = (hits[hull[-1]] - hits[bucket]) / (room[hull[-1]] - room[bucket])
        while len(hull) > 1 and slope <= slopes[-1]:
            hull.pop()
            slopes.pop()
            slope = (hits[hull[-1]] - hits[bucket]) / (room[hull[-1]] - room[bucket])
        hull.append(bucket)
        slopes.append(slope)
        found[bucket] = slope
    return found
