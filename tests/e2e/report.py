"""The tables at the end, and the verdict."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from suite import ROOT, Case


def report(cases: list[Case], expect_defects: bool, console: Console) -> bool:
    """Prints what the engines did, and returns whether all is as it must be.

    With ``expect_defects`` a case with a seeded defect is right if every check that should find it did. Without, it is
    a case like any other, and fails.
    """
    seeded = [case for case in cases if case.defect and expect_defects]
    plain = [case for case in cases if case not in seeded]
    for kind in ("stress", "failures"):
        compare_tokens([case for case in cases if case.kind == kind])
    print_trips([case for case in plain if "cold_ms" in case.result], console)
    print_stress([case for case in plain if "evictions" in case.result], console)
    print_ttft([case for case in plain if "ttft_ms" in case.result], console)
    for case in seeded:
        missed = f"; NOT by {', '.join(sorted(case.missed_checks))}" if case.missed_checks else ""
        found = ", ".join(sorted(case.failed_checks)) or "nothing"
        console.print(f"{case.kind} with {case.defect}, {case.spec}: found by {found}{missed}")
    wrong = [case for case in plain if case.findings]
    for case in wrong:
        console.print(f"\n{case.name} is wrong (its log: {case.log.relative_to(ROOT)}):", style="bold")
        for finding in case.findings[:20]:
            console.print(f"  {finding}", markup=False, highlight=False)
        if len(case.findings) > 20:
            console.print(f"  and {len(case.findings) - 20} more")
    return not wrong and not any(case.missed_checks for case in seeded)


def compare_tokens(cases: list[Case]) -> None:
    """Adds a finding where a request's tokens are not those that the engine without a connector gave."""
    expected = next((case.result["tokens"] for case in cases if case.spec is None and "tokens" in case.result), None)
    for case in cases:
        if expected is None:
            case.findings.append("tokens: the engine without a connector gave none to compare with")
        elif "tokens" in case.result:
            pairs = zip(expected, case.result["tokens"], strict=True)
            differing = [request for request, (want, got) in enumerate(pairs) if got is not None and want != got]
            if differing:
                case.findings.append(f"tokens: requests {differing} differ from those without a connector")


def print_trips(cases: list[Case], console: Console) -> None:
    table = Table(
        title="A long prompt, computed, then brought back from the host pool (medians of 5; TTFT: time to first token)"
    )
    for column in ("model", "spec", "blocks a chunk"):
        table.add_column(column)
    for column in ("TTFT cold", "TTFT warm", "tokens not recomputed", "bytes moved", "store", "load"):
        table.add_column(column, justify="right")
    for case in cases:
        result = case.result
        table.add_row(
            case.model,
            case.spec,
            str(case.blocks_per_chunk),
            f"{result['cold_ms']:.0f} ms",
            f"{result['warm_ms']:.0f} ms",
            f"{result['not_recomputed']:.0f} of {result['prompt_tokens']}",
            f"{result['moved_bytes'] / 1e6:.1f} MB",
            f"{result['store_gb_per_s']:.1f} GB/s",
            f"{result['load_gb_per_s']:.1f} GB/s",
        )
    if cases:
        console.print(table)


def print_ttft(cases: list[Case], console: Console) -> None:
    """What offloading saves, and what it costs a request that never hits: the two cold columns."""
    for case in cases:
        times = ", ".join(f"{where} {ms:.1f} ms" for where, ms in case.result["ttft_ms"].items())
        console.print(f"TTFT of 2000 tokens, {case.model}, {case.spec or 'no connector'}: {times}")


def print_stress(cases: list[Case], console: Console) -> None:
    for case in cases:
        result = case.result
        console.print(
            f"stress, {case.spec}: {len(result['tokens'])} requests, {result['preemptions']} preemptions, "
            f"{result['evictions']} chunks evicted, {result['waits']} waits, {result['jobs']} jobs, "
            f"{result['loads']} of them loads, "
            f"{result['moved_bytes'] / 1e6:.1f} MB, {result['reused_tokens']} tokens not recomputed"
        )
