"""What a pool was made with, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvkernels.common.arguments import integer
from kvkernels.layout.layout import KVLayout


@dataclass(frozen=True)
class Settings:
    """As `RemotePool` takes them."""

    layout: KVLayout
    name: str
    host: str
    port: int
    segments: int
    segment_bytes: int
    most_rings: int
    most_retries: int
    silence_s: float
    rejoin_s: float

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535), ("segments", 1, 64), ("segment_bytes", 1, 1 << 28), ("most_rings", 1, 4096),
            ("most_retries", 0, 1000),
        ):  # fmt: skip
            wanted = f"from {least} to {most}"
            if integer(f"RemotePool: {name}", getattr(self, name), wanted, least) > most:
                raise ValueError(f"RemotePool: {name} must be {wanted}, got {getattr(self, name)}")
        for name in ("silence_s", "rejoin_s"):
            check_seconds(f"RemotePool: {name}", getattr(self, name))
        if not isinstance(self.name, str) or not 1 <= len(self.name) <= 64:
            raise ValueError(f"RemotePool: name must be 1 to 64 characters, got {self.name!r}")


def check_seconds(what: str, value: float) -> float:
    """A positive number of seconds, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9 or math.isnan(value):
        raise ValueError(f"{what} must be seconds above 0, got {value!r}")
    return float(value)
