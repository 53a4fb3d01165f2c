"""What random submissions to a mover must come to, by its rules and one transfer after the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kvkernels.transfer import Mover, Transfer, TransferFailed

THREADS = 4


@dataclass
class Sent:
    """A transfer, and what the model knows of it."""

    transfer: Transfer
    apply: Callable[[], None]  # what the model does where the transfer is done
    reads: set[tuple[int, int]]  # tensor and block
    writes: set[tuple[int, int]]
    after: list[int]
    is_doomed: bool = False
    is_cancelled: bool = False


class Client(Protocol):
    """One thread's submissions; an error that ends them is kept."""

    sent: list[Sent]
    error: BaseException | None

    def run(self, count: int) -> None: ...


def round_of(
    mover: Mover, clients: Sequence[Client], count: int, tensors: Sequence[torch.Tensor], model: Sequence[np.ndarray]
) -> Counter[str]:
    """The clients' threads make so many submissions in all, whose ends and bytes are checked; transfers by state."""
    threads = [threading.Thread(target=one.run, args=(count // len(clients),)) for one in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        if client.error is not None:
            raise client.error
    assert mover.drain(timeout=120)
    sent = [one for client in clients for one in client.sent]
    check_ends(sent)
    for tensor, expected in zip(tensors, model, strict=True):
        assert np.array_equal(tensor.cpu().numpy(), expected)
    mover.poll()
    return Counter(one.transfer.state for one in sent)


def check_ends(sent: list[Sent]) -> None:
    """That each ended as it must, in the order of submission, which the model follows."""
    by_ticket = {one.transfer.ticket: one for one in sent}
    failed = {one.transfer.ticket for one in sent if one.transfer.result().state != "done"}
    for one in sorted(sent, key=lambda one: one.transfer.ticket):
        result, ticket = one.transfer.result(), one.transfer.ticket
        assert one.is_cancelled == (result.state == "cancelled")
        if result.state == "done":
            assert not one.is_doomed and not failed.intersection(one.after)
            one.apply()
        elif isinstance(result.error, TransferFailed):
            cause = int(str(result.error).split("transfer ")[1].split(",")[0])
            assert cause < ticket and cause in failed and result.undefined == ()
            assert cause in one.after or one.reads & by_ticket[cause].writes
        elif result.state == "failed":
            assert one.is_doomed and isinstance(result.error, ValueError)
