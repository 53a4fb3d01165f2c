"""What a GPU run's records say: shares of the ceiling, each cell's best executor, and whether the goals are met."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpu_log import Record, gb_per_s
from plot import bytes_in_words

KIB = 1024
# Of the link's ceiling, from 1,000 fragments on and with at most 12 SMs.
LINK_GOALS = {4 * KIB: 0.70, 16 * KIB: 0.85, 64 * KIB: 0.90, 256 * KIB: 0.93}
GOAL_MIN_COUNT = 1000
GOAL_MOST_SMS = 12
DEVICE_GOAL = 0.90
AUTO_LOSS, AUTO_CELLS, AUTO_WORST = 0.05, 0.95, 0.15


class Place(NamedTuple):
    """What a cell is but for the executor."""

    stream: str
    direction: str
    host_form: str
    ids: str
    fragment_bytes: int
    count: int

    def in_words(self) -> str:
        where = "" if self.host_form == "pools" else ", host in rows"
        where += "" if self.ids == "random" else f", {self.ids}"
        return f"{self.direction} {bytes_in_words(self.fragment_bytes)} x {self.count:,}{where}, {self.stream} stream"


@dataclass
class Cell:
    """Every executor's record of one place."""

    place: Place
    records: dict[str, Record]

    @property
    def named(self) -> dict[str, Record]:
        return {name: record for name, record in self.records.items() if name != "auto"}

    @property
    def best(self) -> Record:
        return max(self.named.values(), key=gb_per_s)

    @property
    def auto_executor(self) -> str:
        return next(iter(self.records.values()))["auto"]["executor"]

    @property
    def auto(self) -> Record | None:
        """The record of the executor that ``auto`` takes; of ``auto`` itself where that executor has none."""
        return self.records.get(self.auto_executor) or self.records.get("auto")

    @property
    def auto_loss(self) -> float | None:
        """How much of the best executor's speed ``auto`` leaves; None where it is not known."""
        return None if self.auto is None or not self.named else 1 - gb_per_s(self.auto) / gb_per_s(self.best)


@dataclass(frozen=True)
class Goal:
    """A figure with what it should be. ``met`` is None where nothing was measured that it could be judged by."""

    name: str
    wanted: str
    got: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def sms_of(record: Record) -> int | None:
    """The most SMs that a call's kernels take; None where that is not known."""
    if record["executor"] == "dma":
        return 0
    device = record["explained"]["device"]
    if "ctas" in device:
        return int(device["ctas"])
    return record["sm_budget"] or None


class Results:
    """The records of one card's runs."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.machines = {r["run"]: r for r in self.records if r["part"] == "machine"}
        self._ceilings: dict[tuple[int, str], float] = {}
        for record in self.of("ceilings"):
            place = record["run"], record["direction"]
            self._ceilings[place] = max(self._ceilings.get(place, 0.0), gb_per_s(record))

    def of(self, part: str, status: str = "measured", **key: Any) -> list[Record]:
        wanted = {"part": part, "status": status, **key}
        return [r for r in self.records if all(r.get(name) == value for name, value in wanted.items())]

    def with_status(self, *statuses: str) -> list[Record]:
        return [r for r in self.records if r.get("status") in statuses]

    def stream_of(self, record: Record) -> str:
        return str(self.machines[record["run"]]["settings"]["stream"])

    def ceiling(self, record: Record) -> float | None:
        """In GB/s, of the record's direction and in its run."""
        return self._ceilings.get((record["run"], record["direction"]))

    def share(self, record: Record) -> float | None:
        ceiling = self.ceiling(record)
        return gb_per_s(record) / ceiling if ceiling else None

    def cells(self) -> list[Cell]:
        """The grid's places with what was measured there; of two runs of one cell the later counts."""
        found: dict[Place, dict[str, Record]] = defaultdict(dict)
        for record in self.of("grid") + self.of("auto"):
            place = Place(self.stream_of(record), *(record[name] for name in Place._fields[1:]))
            found[place][record["executor"]] = record
        return [Cell(place, found[place]) for place in sorted(found)]

    def goals(self) -> list[Goal]:
        cells = self.cells()
        link = [self._link_goal(cells, direction, fragment) for direction in ("h2d", "d2h") for fragment in LINK_GOALS]
        return [*link, self._device_goal("pages"), self._device_goal("concat"), *self._auto_goals(cells)]

    def _link_goal(self, cells: list[Cell], direction: str, fragment_bytes: int) -> Goal:
        """The worst count's best executor within the budget of SMs, on the side stream from pools of random pages."""
        shares: list[tuple[float, Record, str]] = []
        budgeted = self.of("budget", direction=direction, fragment_bytes=fragment_bytes)
        budgeted = [record for record in budgeted if self.stream_of(record) == "side"]
        for cell in cells:
            place = cell.place
            if place[:5] != ("side", direction, "pools", "random", fragment_bytes) or place.count < GOAL_MIN_COUNT:
                continue
            fitting = [*cell.named.values(), *(r for r in budgeted if r["count"] == place.count)]
            fitting = [r for r in fitting if (sms_of(r) or 0) <= GOAL_MOST_SMS and sms_of(r) is not None]
            known = [(share, r) for r in fitting if (share := self.share(r)) is not None]
            by_auto = self.share(cell.auto) if cell.auto else None
            if known:
                beside = "" if by_auto is None else f"; auto {by_auto:.2f}"
                shares.append((*max(known, key=lambda pair: pair[0]), beside))
        wanted = LINK_GOALS[fragment_bytes]
        name = f"{direction} {bytes_in_words(fragment_bytes)} from {GOAL_MIN_COUNT:,} fragments on, at most 12 SMs"
        if not shares:
            return Goal(name, f"{wanted:.2f} of the link", "", None)
        share, record, auto = min(shares, key=lambda found: found[0])
        got = f"{share:.2f} ({record['executor']}, {sms_of(record)} SMs, {record['count']:,} fragments{auto})"
        return Goal(name, f"{wanted:.2f} of the link", got, share >= wanted)

    def _device_goal(self, kind: str) -> Goal:
        records = [r for r in self.of("d2d") if r["kind"].startswith(kind) and r["sm_budget"] == 0]
        name, wanted = f"d2d {kind}", f"{DEVICE_GOAL:.2f} of the best device copy"
        best: dict[str, tuple[float, Record]] = {}
        for record in records:
            share = self.share(record)
            if share is not None and share > best.get(record["kind"], (0.0, record))[0]:
                best[record["kind"]] = share, record
        if not best:
            return Goal(name, wanted, "", None)
        share, record = min(best.values(), key=lambda pair: pair[0])
        return Goal(name, wanted, f"{share:.2f} ({record['kind']}, {record['executor']})", share >= DEVICE_GOAL)

    def _auto_goals(self, cells: list[Cell]) -> list[Goal]:
        losses = [(loss, cell) for cell in cells if (loss := cell.auto_loss) is not None]
        near, worst = f"auto within {AUTO_LOSS:.0%} of the best executor", "auto's worst cell"
        if not losses:
            return [
                Goal(near, f"in {AUTO_CELLS:.0%} of the cells", "", None),
                Goal(worst, f"at most {AUTO_WORST:.0%} behind", "", None),
            ]
        share = sum(loss <= AUTO_LOSS for loss, _ in losses) / len(losses)
        loss, cell = max(losses, key=lambda pair: pair[0])
        return [
            Goal(near, f"in {AUTO_CELLS:.0%} of the cells", f"in {share:.1%} of {len(losses)}", share >= AUTO_CELLS),
            Goal(
                worst,
                f"at most {AUTO_WORST:.0%} behind",
                f"{loss:.1%} behind: {cell.place.in_words()}, {cell.auto_executor} for {cell.best['executor']}",
                loss <= AUTO_WORST,
            ),
        ]


def by_card(records: Iterable[Record]) -> dict[str, Results]:
    """The results of each card that the runs were on."""
    records = list(records)
    cards = {r["run"]: str(r["gpu"]) for r in records if r["part"] == "machine"}
    names = dict.fromkeys(cards.values())
    return {name: Results(r for r in records if cards[r["run"]] == name) for name in names}


def slowdowns(record: Record) -> tuple[float, float]:
    """Of copies and of matrix products: how many times as long one takes beside the other as alone."""

    def ratio(beside: str, alone: str) -> float:
        return float(min(record[beside]) / min(record[alone]))

    return ratio("beside_us", "alone_us"), ratio("product_beside_us", "product_alone_us")
