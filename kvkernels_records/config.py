"""What is to be captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: When a cache is looked at, in the order in which a request comes to it.
CAPTURE_POINTS = ("after_transfer", "after_prefill", "during_decode")


@dataclass(frozen=True)
class CaptureConfig:
    """What a capture takes, and from where.

    Parameters
    ----------
    url : str
        Where the server is, ``http://localhost:8000``.
    prompt : str
    output : str
        The file to write, ``.npz`` or ``.safetensors``; ``.npz`` is added where it has neither ending.
    layers : sequence of int, optional
        Those to capture; all by default.
    capture_points : sequence of str
        Of ``CAPTURE_POINTS``. ``after_prefill`` has the prompt's tokens, ``after_transfer`` those that came from
        outside of the engine, ``during_decode`` the prompt's and the first ``max_tokens - 1`` generated ones.
    tp_size : int
        Tensor-parallel ranks.
    max_tokens : int
        Tokens to generate.

    Examples
    --------
    >>> CaptureConfig("", "hello", "out.npz", layers=[0, -2], max_tokens=0).faults()
    ['url must not be empty', 'layers must be from 0 on, got -2', 'max_tokens must be at least 1, got 0']
    """

    url: str
    prompt: str
    output: str
    layers: Sequence[int] | None = None
    capture_points: Sequence[str] = ("after_prefill",)
    tp_size: int = 1
    max_tokens: int = 1

    def faults(self) -> list[str]:
        """Everything that is wrong, a sentence each; empty where nothing is."""
        found = [f"{name} must not be empty" for name in ("url", "prompt", "output") if not getattr(self, name).strip()]
        return found + faults_of(self.layers, self.capture_points, self.max_tokens, self.tp_size)

    def check(self) -> None:
        """Raise for what is wrong.

        Raises
        ------
        ValueError
            It names every fault.
        """
        raise_faults("CaptureConfig", self.faults())


def faults_of(layers: Sequence[int] | None, points: Sequence[str], max_tokens: int, tp_size: int = 1) -> list[str]:
    """What is wrong with the arguments that every way to capture shares."""
    found = []
    if layers is not None:
        if not layers:
            found.append("layers must name at least one, got none")
        found += [f"layers must be from 0 on, got {layer}" for layer in layers if layer < 0]
        found += [f"layers must be named once, got {layer} again" for layer in _repeated(layers)]
    if tp_size < 1:
        found.append(f"tp_size must be at least 1, got {tp_size}")
    if not points:
        found.append("capture_points must name at least one, got none")
    known = ", ".join(CAPTURE_POINTS)
    found += [f"capture_points must be of {known}, got {point!r}" for point in points if point not in CAPTURE_POINTS]
    found += [f"capture_points must be named once, got {point!r} again" for point in _repeated(points)]
    if max_tokens < 1:
        found.append(f"max_tokens must be at least 1, got {max_tokens}")
    elif "during_decode" in points and max_tokens < 2:
        found.append(f"max_tokens must be at least 2 for during_decode, got {max_tokens}")
    return found


def raise_faults(what: str, faults: list[str]) -> None:
    """One error of all faults."""
    if faults:
        raise ValueError(f"{what}: {'; '.join(faults)}")


def _repeated(values: Sequence[object]) -> list[object]:
    return sorted({value for value in values if list(values).count(value) > 1}, key=str)
