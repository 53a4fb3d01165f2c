"""What peers ask for: the owner packs and sends it, if it allows that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvkernels.transfer.remote.desk import Desk
from kvkernels.transfer.remote.errors import RefusedError, RemoteError
from kvkernels.transfer.remote.messages import Fetch, FetchRefused, short
from kvkernels.transfer.remote.outgoing import Outgoing
from kvkernels.transfer.remote.routes import Route
from kvkernels.transfer.remote.stats import Stats


class Fetches:
    """Answers them, in the engine's thread."""

    def __init__(
        self, desk: Desk, stats: Stats, allowed: bool | Callable[[str, Sequence[int]], bool],
        cancel: Callable[[Outgoing], None],
    ) -> None:  # fmt: skip
        self._desk, self._stats, self._allowed, self._cancel = desk, stats, allowed, cancel

    def serve(self, route: Route, name: str, message: Fetch) -> None:
        """Send what a peer of this name asks for."""
        if any(outgoing.request == message.request for outgoing in route.outbox.transfers.values()):
            return  # it asks again on a new link, on which the transfer goes on
        try:
            allowed = self._allowed
            if not (allowed(name, message.blocks) if callable(allowed) else allowed):
                raise ValueError("fetch_blocks: the owner must allow it, got allow_fetch that does not")
            outgoing, handle = self._desk.outgoing(
                "fetch_blocks", message.request, message.blocks, message.seconds, self._cancel
            )
        except Exception as error:  # whatever the owner's own function raises, too
            self._stats.failed(RefusedError.cause)
            assert route.link is not None
            route.link.post(FetchRefused(message.request, RefusedError.cause, short(error)))
            return
        ended = outgoing.end

        def end(outcome: str, error: RemoteError | None) -> None:
            ended(outcome, error)
            handle.tell()  # nobody here asked for it

        outgoing.end = end
        route.outbox.add(outgoing)
