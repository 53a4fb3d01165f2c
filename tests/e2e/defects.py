"""Seeded defects: wrong copies and wrong workers, each of which must make the run fail.

Each is planted in a worker before the audit begins to watch it, and names the checks that must find it, so that no
check can go blind behind another.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkernels.connectors.copies import Mappings

    # Submits a job's mappings, (device block, host row) for each group, with so much of each page from its start.
    Copy = Callable[[Mappings, float], None]

# Where the damage can be seen in all that the engine says and all that is compared.
EVERYWHERE = {"job", "pages", "tokens", "log-probabilities", "bytes"}


def break_copies(worker: Any, broken: Callable[[Copy, Mappings, bool], None]) -> None:
    """Puts ``broken`` between the worker and its copies: it is given the real one, and whether this is a load."""
    from kvkernels.connectors.copies import Copies

    host = worker.host_worker
    whole, submit = host._copies, host._copies.submit
    half = [[types.SimpleNamespace(tensor_idx=ref.tensor_idx, page_size_bytes=ref.page_size_bytes // 2) for ref in refs]
            for refs in host.groups]  # fmt: skip
    halves = Copies(host.device, host.host, half, host._states)

    def broken_submit(mover: Any, mappings: Mappings, is_store: bool, expedited: bool, transfers: list[Any]) -> None:
        def copy(mappings: Mappings, fraction: float) -> None:
            (submit if fraction == 1.0 else halves.submit)(mover, mappings, is_store, expedited, transfers)

        broken(copy, mappings, not is_store)

    whole.submit = broken_submit


def each(mappings: Mappings, change: Callable[[Any], Any]) -> Mappings:
    changed = [None if mapping is None else change(mapping.copy()) for mapping in mappings]
    return [None if mapping is None or not len(mapping) else mapping for mapping in changed]


def copy_nothing(worker: Any) -> None:
    break_copies(worker, lambda copy, mappings, loading: None)


def drop_last_block(worker: Any) -> None:
    break_copies(worker, lambda copy, mappings, loading: copy(each(mappings, lambda pairs: pairs[:-1]), 1.0))


def half_a_page(worker: Any) -> None:
    break_copies(worker, lambda copy, mappings, loading: copy(mappings, 0.5))


def exchange_two_blocks_on_load(worker: Any) -> None:
    def exchanged(pairs: Any) -> Any:
        if len(pairs) >= 2:
            pairs[[-1, -2], 0] = pairs[[-2, -1], 0]
        return pairs

    break_copies(worker, lambda copy, mappings, loading: copy(each(mappings, exchanged) if loading else mappings, 1.0))


def one_block_too_many(worker: Any) -> None:
    def broken(copy: Copy, mappings: Mappings, loading: bool) -> None:
        if loading:
            used = {int(block) for pairs in mappings if pairs is not None for block in pairs[:, 0]}
            untouched = next(row for row in reversed(range(len(worker.host_worker.device[0]))) if row not in used)
            first = next(pairs for pairs in mappings if pairs is not None)
            extra = first[:1].copy()
            extra[0, 0] = untouched
            copy([extra if pairs is first else None for pairs in mappings], 1.0)
        copy(mappings, 1.0)

    break_copies(worker, broken)


def some_copies_by_torch(worker: Any) -> None:
    calls = 0

    def broken(copy: Copy, mappings: Mappings, loading: bool) -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            copy(mappings, 1.0)
            return
        host = worker.host_worker
        for refs, pairs in zip(host.groups, mappings, strict=True):
            for ref in refs if pairs is not None else ():
                page = slice(0, ref.page_size_bytes)
                device, rows = host.device[ref.tensor_idx][:, page], host.host[ref.tensor_idx][:, page]
                if loading:
                    device[pairs[:, 0]] = rows[pairs[:, 1]]
                else:
                    rows[pairs[:, 1]] = device[pairs[:, 0]]

    break_copies(worker, broken)


def without_last_layer(worker: Any) -> None:
    from kvkernels.connectors.copies import Copies

    host = worker.host_worker
    host._copies = Copies(host.device, host.host, [refs[:-1] for refs in host.groups], host._states)


def long_loads_reversed(worker: Any) -> None:
    def reversed_too(pairs: Any) -> Any:
        if len(pairs) > 64:
            pairs[:, 0] = pairs[::-1, 0].copy()
        return pairs

    def broken(copy: Copy, mappings: Mappings, loading: bool) -> None:
        copy(each(mappings, reversed_too) if loading else mappings, 1.0)

    break_copies(worker, broken)


def damage_between_jobs(worker: Any) -> None:
    get_finished = worker.get_finished

    def broken(self: Any) -> list[Any]:
        finished = get_finished()
        if finished:
            self.host_worker.device[0][-1] += 1
        return finished

    worker.get_finished = types.MethodType(broken, worker)


def wrong_byte_counts(worker: Any) -> None:
    get_finished = worker.get_finished

    def broken(self: Any) -> list[Any]:
        finished = get_finished()
        for result in finished:
            result.transfer_size += 1
        return finished

    worker.get_finished = types.MethodType(broken, worker)


# What each must be found by, at the least.
DEFECTS: dict[Callable[[Any], None], set[str]] = {
    copy_nothing: {*EVERYWHERE, "op calls"},
    drop_last_block: EVERYWHERE,
    half_a_page: EVERYWHERE,
    # Neither the tokens nor the log-probabilities need show it: attention does not look at the order of blocks.
    exchange_two_blocks_on_load: {"job", "pages"},
    one_block_too_many: {"job", "bytes"},
    some_copies_by_torch: {"bytes"},
    without_last_layer: EVERYWHERE,
    long_loads_reversed: {"job", "pages"},
    damage_between_jobs: {"job"},
    wrong_byte_counts: {"bytes"},
}
BY_NAME = {defect.__name__: defect for defect in DEFECTS}
