"""The secret that peers share, and what is made of it: proofs for the handshake, keys for a session."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

LEAST_SECRET_BYTES = 16
SECRET_VARIABLE = "KVKERNELS_REMOTE_SECRET"
_LABEL = b"kvkernels remote 1 "


def load_secret(file: str | os.PathLike[str] | None) -> bytes:
    """From a file, or else from the environment; one line end at the file's end is not part of it.

    ValueError where there is none, or one of fewer than 16 bytes. No message has a byte of it.
    """
    if file is not None:
        where, secret = f"the file {os.fspath(file)}", Path(file).read_bytes().removesuffix(b"\n").removesuffix(b"\r")
    else:
        where, secret = f"the variable {SECRET_VARIABLE}", os.environb.get(SECRET_VARIABLE.encode(), b"")
    if len(secret) < LEAST_SECRET_BYTES:
        raise ValueError(
            f"RemotePool: secret must have at least {LEAST_SECRET_BYTES} bytes, got {len(secret)} from {where}"
        )
    return secret


def proof(secret: bytes, role: str, transcript: bytes) -> bytes:
    """That who plays a role in this handshake knows the secret."""
    return hmac.digest(secret, _LABEL + b"proof " + role.encode() + b" " + transcript, "sha256")


def session_key(secret: bytes, transcript: bytes, sender: str) -> bytes:
    """The key of one direction of a session: HKDF-SHA256 (RFC 5869), whose output is one block."""
    extracted = hmac.digest(transcript, secret, "sha256")
    return hmac.digest(extracted, _LABEL + b"frames of the " + sender.encode() + b"\x01", "sha256")
