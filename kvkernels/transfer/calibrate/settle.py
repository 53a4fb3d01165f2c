"""When a measured answer counts: it comes out the same, within a step, in three runs one after the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

RUNS = 3  # that must agree
MOST_RUNS = 6
MARGIN = 0.03  # by which another candidate must beat the default, in seconds
ROUNDS = 5  # of a run, in which candidates take turns


@dataclass(frozen=True)
class Settled:
    """What came out for one setting.

    Attributes
    ----------
    name : str
        What it is called in the file's ``measured``.
    value : object
        What is to serve: the answer, or the default where there was none.
    default : object
        What is compiled in.
    is_stable : bool
        Whether ``RUNS`` runs one after the other agreed.
    answers : list
        Of each run.
    """

    name: str
    value: Any
    default: Any
    is_stable: bool
    answers: list[Any]

    def in_words(self) -> str:
        """One line for people."""
        if not self.is_stable:
            given = ", ".join(map(str, self.answers)) or "no time to measure"
            return f"{self.name}: not stable ({given}), keeps {self.default}"
        return f"{self.name}: {self.value}" + ("" if self.value != self.default else ", as compiled in")


def settle(
    name: str, candidates: Sequence[Any], default: int, run: Callable[[], int], step: int, has_time: Callable[[], bool]
) -> Settled:
    """Repeat a measurement until it is stable.

    Parameters
    ----------
    candidates : sequence
        Where a setting is a size, in order, so that neighbours are a step apart.
    default : int
        Which of them is compiled in.
    run : callable
        Measures once and returns which of them is best.
    step : int
        How far apart the answers of runs may be that agree: 0 or 1.
    has_time : callable
        Whether another run may begin.
    """
    answers: list[int] = []
    while len(answers) < MOST_RUNS and has_time():
        answers.append(run())
        last = answers[-RUNS:]
        if len(last) == RUNS and max(last) - min(last) <= step:
            value = candidates[statistics.median_low(last)]
            return Settled(name, value, candidates[default], True, [candidates[answer] for answer in answers])
    return Settled(name, candidates[default], candidates[default], False, [candidates[answer] for answer in answers])


def in_turns(contestants: Sequence[Callable[[], float]], rounds: int = ROUNDS) -> list[float]:
    """Seconds of each: the lower quartile of rounds in which they take turns, which others here move least."""
    times = [[seconds() for seconds in contestants] for _ in range(rounds)]
    columns = (sorted(column) for column in zip(*times, strict=True))
    return [column[len(column) // 4] for column in columns]


def best(costs: Sequence[float], default: int) -> int:
    """Which candidate is fastest: the default, unless another one beats it by more than the margin."""
    fastest = min(range(len(costs)), key=lambda i: costs[i])
    return fastest if costs[fastest] < costs[default] * (1 - MARGIN) else default


def mean_cost(of_cases: Sequence[float]) -> float:
    """One number for seconds of several cases, in which each counts by its ratio."""
    return math.exp(statistics.fmean(math.log(seconds) for seconds in of_cases))


def best_threshold(below: Sequence[float], from_on: Sequence[float], default: int) -> int:
    """From which size on, of a ladder of sizes, the second way is taken; as many as there are sizes for never.

    The one that costs least over all sizes, so that a wrong figure of one size moves it little.
    """
    sizes = len(below)
    costs = [mean_cost([*below[:i], *from_on[i:]]) for i in range(sizes + 1)]
    fastest = min(range(sizes + 1), key=lambda i: costs[i])
    # A size that is wrong by the margin moves the mean by its share of it.
    return fastest if costs[fastest] < costs[default] * (1 - MARGIN / sizes) else default


def fewest(costs: Sequence[float], within: float = 0.05) -> int:
    """The first of candidates in order, such as numbers of threads, that is as fast as any but for so much."""
    limit = min(costs) * (1 + within)
    return next(i for i, cost in enumerate(costs) if cost <= limit)
