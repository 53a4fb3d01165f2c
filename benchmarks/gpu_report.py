#!/usr/bin/env python3
"""Makes tables and charts from what benchmarks/gpu.py wrote; needs no GPU and no compiled library.

Several files of several runs may be given: each figure is compared with the ceilings of its own run, and of two runs of
one cell the later one counts. One report a card: gpu-<card>.md and gpu-<card>.png.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import gpu_log
import gpu_plot
from gpu_log import Record, gb_per_s, median_us, quartiles_us
from gpu_results import KIB, Cell, Goal, Results, by_card, slowdowns, sms_of
from gpu_tables import Table
from plot import bytes_in_words

BRIEF_COUNTS = (1_000, 10_000)
BRIEF_LEAVES_OUT = ("pages 4 KiB", "pages 256 KiB", "split TP2", "split TP8")
BRIEF_FRAGMENTS = tuple(kib * KIB for kib in (4, 16, 32, 64, 256))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--closing", action="store_true", help="print what a run ends with, and write nothing")
    parser.add_argument("--no-chart", action="store_true", help="write the tables alone, without matplotlib")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.files if not path.exists()]
    if missing:
        parser.error(f"there is no {', '.join(missing)}")
    if options.closing:
        print(closing(options.files))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for card, results in by_card(gpu_log.read(options.files)).items():
        stem = f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}"
        drawn = not options.no_chart and gpu_plot.draw(options.out / f"{stem}.png", card, results)
        (options.out / f"{stem}.md").write_text(report(card, results, f"{stem}.png" if drawn else ""))
        print(options.out / f"{stem}.md")


def closing(paths: Sequence[Path]) -> str:
    """What a run ends with on the terminal: under 60 lines."""
    texts = []
    for card, results in by_card(gpu_log.read(paths)).items():
        tables = [ceilings(results), *brief_cells(results), brief_budgets(results), brief_device(results)]
        tables += [brief_calls(results), goals(results)]
        bad = [
            f"{r['status']} in {r['part']}: {name_of(r)}: {r['error']}"[:200] for r in results.with_status(*gpu_log.BAD)
        ]
        texts += [card, *(table.text() for table in tables if table.rows), *bad[:2], counts(results)]
    return "\n".join(texts)


def report(card: str, results: Results, chart: str) -> str:
    """The Markdown page."""
    parts = [f"# {card}", "", *(line for text in described(results) for line in (text, ""))]
    for table in (goals(results), ceilings(results)):
        parts += [f"## {table.title}", "", table.markdown(), ""]
    parts += wrong(results)
    if chart:
        parts += [f"![GB/s by executor, fragment and count; by SMs; against others]({chart})", ""]
    for table in [*best_by_size(results), *full_tables(results)]:
        if table.rows:
            parts += [f"## {table.title}", "", table.markdown(), ""]
    parts += [f"## What was not measured\n\n{counts(results)}", "", *left_out(results)]
    return "\n".join(parts).rstrip() + "\n"


def described(results: Results) -> Iterator[str]:
    """The machine and the settings of each run."""
    for record in results.machines.values():
        settings = record["settings"]
        link = ", ".join(f"{name} {value}" for name, value in record["link"].items())
        smi = record["nvidia_smi"]
        smi = smi if isinstance(smi, str) else ", ".join(f"{name} {value}" for name, value in smi.items())
        attributes = ", ".join(f"{name} {value}" for name, value in record["attributes"].items())
        yield (
            f"Measured by `python benchmarks/gpu.py` on {record['gpu']} (compute capability "
            f"{record['compute_capability']}, {record['sms']} SMs); {record['cpu']}, {record['cores']} cores; driver "
            f"{record['driver']}, runtime {record['runtime']}, torch {record['torch']}; commit {record['git_commit']}; "
            f"{settings['stream']} stream, scale {settings['scale']}."
        )
        if record["stand_in"] or settings["scale"] != 1:
            yield "**A dry run: its times and rates say nothing about any GPU.**"
        yield f"Link: {link}. nvidia-smi: {smi}. Attributes: {attributes}."
    yield (
        "Medians of device time, from events behind a kernel that spins until the call has returned, unless said "
        "otherwise. Every byte of both sides was compared before a cell was timed, guard bytes and blocks that no id "
        "names included. GB/s is 1e9 bytes of payload a second."
    )


def goals(results: Results) -> Table:
    table = Table("Goals", ("goal", "wanted", "measured", "verdict"), left=("goal", "wanted", "measured", "verdict"))
    for goal in results.goals():
        table.add(goal.name, goal.wanted, goal.got, verdict(goal))
    return table


def verdict(goal: Goal) -> str:
    return goal.verdict.upper() if goal.met is False else goal.verdict


def ceilings(results: Results) -> Table:
    table = Table("Ceilings", ("way", "by", "first GB/s", "last GB/s", "read + write GB/s"), left=("way", "by"))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for record in results.of("ceilings"):
        place = found.setdefault((record["direction"], record["name"]), {})
        place[record["when"]] = max(place.get(record["when"], 0.0), gb_per_s(record))
    for (direction, name), speeds in found.items():
        cells = [f"{speeds[when]:.1f}" if when in speeds else "" for when in ("first", "last")]
        table.add(direction, name, *cells, f"{2 * max(speeds.values()):.0f}" if direction == "d2d" else "")
    return table


def share_text(results: Results, record: Record) -> str:
    share = results.share(record)
    return "" if share is None else f"{share:.2f}"


def loss_text(cell: Cell) -> str:
    loss = cell.auto_loss
    return "" if loss is None else f"{max(loss, 0.0):.0%}"


def brief_cells(results: Results) -> Iterator[Table]:
    """The best executor of the sizes that matter most, both directions in a line."""
    cells = {cell.place: cell for cell in results.cells() if cell.named}
    names = ("fragment", "count", "h2d best", "GB/s", "share", "auto", "d2h best", "GB/s ", "share ", "auto ")
    table = Table("Best executor, and how far auto is behind it", names, left=("h2d best", "d2h best"))
    for fragment in BRIEF_FRAGMENTS:
        for count in BRIEF_COUNTS:
            line: list[str] = []
            for direction in ("h2d", "d2h"):
                found = [
                    cell for place, cell in cells.items()
                    if place[1:] == (direction, "pools", "random", fragment, count)
                ]  # fmt: skip
                line += brief_cell(results, found[-1]) if found else ["", "", "", ""]
            if any(line):
                table.add(bytes_in_words(fragment), f"{count:,}", *line)
    yield table


def brief_cell(results: Results, cell: Cell) -> list[str]:
    best = cell.best
    return [best["executor"], f"{gb_per_s(best):.1f}", share_text(results, best), loss_text(cell)]


def budget_series(results: Results) -> dict[tuple[str, int, str], list[Record]]:
    """By direction, fragment and executor: the records in the order of their budgets."""
    found: dict[tuple[str, int, str], list[Record]] = {}
    for record in sorted(results.of("budget"), key=lambda r: r["sm_budget"]):
        found.setdefault((record["direction"], record["fragment_bytes"], record["executor"]), []).append(record)
    return found


def brief_budgets(results: Results) -> Table:
    return budgets(results, fragments=(16 * KIB,), executors=("kernel", "bulk"))


def budgets(results: Results, fragments: Sequence[int] = (), executors: Sequence[str] = ()) -> Table:
    """All, or those of some fragments and executors."""
    every = sorted({r["sm_budget"] for r in results.of("budget")})
    names = ("way", "fragment", "executor", *(f"{budget} SMs" for budget in every))
    table = Table("Share of the link by SMs", names, left=("way", "executor"))
    for (direction, fragment, executor), records in sorted(budget_series(results).items()):
        if (not fragments or fragment in fragments) and (not executors or executor in executors):
            shares = {r["sm_budget"]: share_text(results, r) for r in records}
            table.add(direction, bytes_in_words(fragment), executor, *(shares.get(budget, "") for budget in every))
    return table


def device_table(results: Results, records: Sequence[Record], title: str) -> Table:
    names = ("copy", "executor", "SMs", "GB/s", "of the best device copy", "device us", "host us")
    table = Table(title, names, left=("copy", "executor"))
    for record in records:
        table.add(
            record["kind"], record["executor"], str(record["sm_budget"] or "all"), f"{gb_per_s(record):.0f}",
            share_text(results, record), spread(record), f"{median_us(record, 'host_us'):.0f}",
        )  # fmt: skip
    return table


def spread(record: Record) -> str:
    low, high = quartiles_us(record)
    return f"{median_us(record):.1f} ({low:.1f}-{high:.1f})"


def brief_device(results: Results) -> Table:
    """The fastest of each kind of copy inside the device, but of three sizes of pages only one."""
    best: dict[str, Record] = {}
    for record in results.of("d2d"):
        if record["kind"] in BRIEF_LEAVES_OUT:
            continue
        if record["kind"] not in best or gb_per_s(record) > gb_per_s(best[record["kind"]]):
            best[record["kind"]] = record
    return device_table(results, list(best.values()), "Inside the device")


def brief_calls(results: Results) -> Table:
    """What auto costs its caller."""
    names = ("call", "h2d host us", "h2d done us", "d2h host us", "d2h done us")
    table = Table("Host time of a call by auto", names, left=("call",))
    lines: dict[str, dict[str, Record]] = {}
    for record in results.of("calls", executor="auto"):
        lines.setdefault(call_name(record), {})[record["direction"]] = record
    for name, sides in lines.items():
        if ("copy_pages" in name and " 1 pools" not in name) or "batch" in name:
            cells = [
                f"{median_us(sides[direction], clock):.0f}" if direction in sides else ""
                for direction in ("h2d", "d2h")
                for clock in ("host_us", "elapsed_us")
            ]
            table.add(name, *cells)
    return table


def call_name(record: Record) -> str:
    if "rows" in record:
        return f"{record['op']}, {record['rows']:,} rows"
    return f"{record['op']}, {record['blocks']} x {record['pools']} pools"


def best_by_size(results: Results) -> Iterator[Table]:
    """A table a direction, host form and stream: a line a fragment, a column a count."""
    cells = [cell for cell in results.cells() if cell.named]
    for stream, direction, form, ids in sorted({cell.place[:4] for cell in cells}):
        here = {
            (c.place.fragment_bytes, c.place.count): c for c in cells if c.place[:4] == (stream, direction, form, ids)
        }
        every = sorted({count for _, count in here})
        place = f"{direction}, host in {form}, {ids} ids, {stream} stream"
        title = f"{place}: best executor, GB/s, share of the link; auto's loss"
        table = Table(title, ("fragment", *(f"x {count:,}" for count in every)), left=[f"x {c:,}" for c in every])
        for fragment in sorted({fragment for fragment, _ in here}):
            table.add(
                bytes_in_words(fragment),
                *(best_text(results, here[fragment, count]) if (fragment, count) in here else "" for count in every),
            )
        yield table


def best_text(results: Results, cell: Cell) -> str:
    loss = "" if cell.auto_executor == cell.best["executor"] else f"; {cell.auto_executor} -{loss_text(cell)}"
    return f"{cell.best['executor']} {gb_per_s(cell.best):.1f} ({share_text(results, cell.best)}){loss}"


def full_tables(results: Results) -> Iterator[Table]:
    yield cell_by_cell(results)
    yield auto_itself(results)
    yield budgets(results)
    yield device_table(results, results.of("d2d"), "Copies inside the device")
    yield calls(results)
    yield host_memory(results)
    yield rivals(results)
    yield beside(results)


def cell_by_cell(results: Results) -> Table:
    cells = results.cells()
    executors = list(dict.fromkeys(name for cell in cells for name in cell.named))
    names = (
        "way",
        "host",
        "ids",
        "stream",
        "fragment",
        "count",
        *executors,
        "best",
        "its us",
        "host us",
        "ahead",
        "auto",
        "loss",
    )
    table = Table("Cell by cell, GB/s", names, left=("way", "host", "ids", "stream", "best", "auto"))
    for cell in cells:
        if not cell.named:
            continue
        stream, direction, form, ids, fragment, count = cell.place
        speeds = sorted((gb_per_s(record) for record in cell.named.values()), reverse=True)
        ahead = f"{speeds[0] / speeds[1] - 1:.0%}" if len(speeds) > 1 else ""
        times = spread(cell.best), f"{median_us(cell.best, 'host_us'):.0f}"
        table.add(
            direction, form, ids, stream, bytes_in_words(fragment), f"{count:,}",
            *(f"{gb_per_s(cell.named[name]):.1f}" if name in cell.named else "" for name in executors),
            cell.best["executor"], *times, ahead, cell.auto_executor, loss_text(cell),
        )  # fmt: skip
    return table


def auto_itself(results: Results) -> Table:
    """Whether auto is as fast as the executor that it is said to take."""
    names = ("cell", "takes", "auto GB/s", "that executor GB/s", "ratio")
    table = Table("auto measured itself", names, left=("cell", "takes"))
    for cell in results.cells():
        auto, taken = cell.records.get("auto"), cell.named.get(cell.auto_executor)
        if auto is not None:
            ratio = f"{gb_per_s(auto) / gb_per_s(taken):.2f}" if taken else ""
            table.add(
                cell.place.in_words(), cell.auto_executor, f"{gb_per_s(auto):.1f}",
                f"{gb_per_s(taken):.1f}" if taken else "", ratio,
            )  # fmt: skip
    return table


def calls(results: Results) -> Table:
    names = ("way", "call", "executor", "took", "host us", "done after us", "device us", "host ns a fragment")
    table = Table("Calls", names, left=("way", "call", "executor", "took"))
    for record in results.of("calls"):
        fragments = record["bytes"] // record["fragment_bytes"]
        host_us = median_us(record, "host_us")
        table.add(
            record["direction"], call_name(record), record["executor"], record["explained"]["executor"],
            f"{host_us:.1f}", f"{median_us(record, 'elapsed_us'):.1f}", spread(record),
            f"{host_us * 1e3 / fragments:.0f}",
        )  # fmt: skip
    return table


def host_memory(results: Results) -> Table:
    records = results.of("host-memory")
    kinds = list(dict.fromkeys(record["memory"] for record in records))
    names = ("way", "fragment", "executor", *kinds)
    table = Table("Kinds of host memory, GB/s", names, left=("way", "executor"))
    lines: dict[tuple[str, int, str], dict[str, float]] = {}
    for record in records:
        place = record["direction"], record["fragment_bytes"], record["executor"]
        lines.setdefault(place, {})[record["memory"]] = gb_per_s(record)
    for (direction, fragment, executor), speeds in lines.items():
        cells = [f"{speeds[kind]:.1f}" if kind in speeds else "" for kind in kinds]
        table.add(direction, bytes_in_words(fragment), executor, *cells)
    return table


def rival_cell(record: Record) -> str:
    if "kind" in record:
        return f"{record['direction']} {record['kind']}"
    form = "" if record["host_form"] == "pools" else ", host in rows"
    return f"{record['direction']} {bytes_in_words(record['fragment_bytes'])} x {record['count']:,}{form}"


def rival_groups(results: Results) -> dict[str, list[Record]]:
    """By copy: what each side took, ours first. For shards ours is the part d2d's."""
    groups: dict[str, list[Record]] = {}
    for record in results.of("rivals"):
        groups.setdefault(rival_cell(record), []).append(record)
    for record in results.of("d2d"):
        name = rival_cell(record)
        if name in groups:
            groups[name].insert(0, {**record, "rival": "kvkernels"})
    return groups


def rivals(results: Results) -> Table:
    names = ("copy", "side", "GB/s", "share of the ceiling", "times our device time", "device us", "host us")
    table = Table("Others", names, left=("copy", "side"))
    for name, records in rival_groups(results).items():
        ours = next((median_us(record) for record in records if record["rival"] == "kvkernels"), None)
        for record in records:
            ratio = "" if not ours else f"{median_us(record) / ours:.2f}"
            table.add(
                name, record["rival"], f"{gb_per_s(record):.1f}", share_text(results, record), ratio,
                spread(record), f"{median_us(record, 'host_us'):.0f}",
            )  # fmt: skip
    return table


def beside(results: Results) -> Table:
    names = (
        "way",
        "executor",
        "SM budget",
        "took",
        "SMs",
        "copy alone GB/s",
        "copy slowed",
        "products alone TFLOP/s",
        "products slowed",
    )
    table = Table("Beside a model's matrix products", names, left=("way", "executor", "took"))
    for record in results.of("beside"):
        copies, products = slowdowns(record)
        rate = 2 * record["product_side"] ** 3 / min(record["product_alone_us"]) / 1e6
        sms = sms_of({**record, "executor": record["explained"]["executor"]})
        table.add(
            record["direction"], record["executor"], str(record["sm_budget"] or "default"),
            record["explained"]["executor"], "" if sms is None else str(sms),
            f"{record['bytes'] / min(record['alone_us']) / 1e3:.1f}", f"{copies:.2f}x",
            f"{rate:.0f}", f"{products:.3f}x",
        )  # fmt: skip
    return table


def wrong(results: Results) -> list[str]:
    """Wrong bytes and errors stand above all figures."""
    bad = results.with_status(*gpu_log.BAD, "lost")
    if not bad:
        return []
    lines = [f"- **{r['status']}** in {r['part']}: {name_of(r)}: {r['error']}" for r in bad]
    return ["## Wrong bytes and errors", "", *lines, ""]


def counts(results: Results) -> str:
    """How many cells came to what, in a line."""
    found: dict[str, int] = {}
    for record in results.records:
        if record["part"] in ("machine", "end"):
            continue
        cells = len(record["cells"]) if record["status"] == "dropped" else 1
        found[record["status"]] = found.get(record["status"], 0) + cells
    return "Cells: " + ", ".join(f"{count} {status}" for status, count in found.items()) + "."


def left_out(results: Results) -> Iterator[str]:
    """Why cells have no figure: each reason once, with the cells that it left out."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for record in results.with_status("refused", "not run", "skipped"):
        reasons.setdefault((record["part"], record["status"], record["error"]), []).append(name_of(record))
    for record in results.with_status("dropped"):
        names = [name_of(cell) for cell in record["cells"]]
        reasons.setdefault((record["part"], "dropped", record["error"]), []).extend(names)
    for (part, status, reason), names in reasons.items():
        yield f"- {part}, {status}: {reason} ({some_of(names)})"
    shown = [name_of(record) for record in results.with_status("measured") if record.get("hidden") is False]
    if shown:
        yield f"- Device times that may hold some of the caller's, which no spin hid: {some_of(shown)}."


def some_of(names: Sequence[str], most: int = 6) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def name_of(record: Record) -> str:
    """What identifies a cell, in words."""
    words: list[str] = []
    for name in ("direction", "kind", "op", "rival", "memory", "executor", "name", "host_form", "ids"):
        if name in record and record[name] not in ("pools", "random"):
            words.append(str(record[name]))
    if "fragment_bytes" in record:
        words.append(bytes_in_words(record["fragment_bytes"]))
    words += [
        f"{name} {record[name]}" for name in ("count", "rows", "blocks", "pools", "sm_budget") if record.get(name)
    ]
    return " ".join(words)


if __name__ == "__main__":
    main()
