"""How every command ends: 0, 1 for a difference or a failure, 2 for wrong usage; one line, and no traceback."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Parameters
    ----------
    command : click.Command
        Returns the status, or None for 0.
    name : str
        How it was called.
    arguments : sequence of str, optional
        ``sys.argv`` by default.
    """
    try:
        status = command.main(
            None if arguments is None else list(arguments), prog_name=name, standalone_mode=False
        )  # fmt: skip
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return int(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. The interpreter's own flush at exit must not meet the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _say(f"{name}: there is not enough memory")
    except (ValueError, OSError, ImportError) as error:
        return _say(str(error) if isinstance(error, ValueError | ImportError) else _os_text(error))


def print_json(value: Any) -> None:
    """Strict JSON on standard output."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def progress(title: str, total: float) -> Iterator[Callable[[float], object]]:
    """A bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def integer(text: str, option: str, least: int | None = None) -> int:
    """An option's integer.

    Raises
    ------
    ValueError
        It is none, or too small.
    """
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{option} must be an integer, got {text!r}") from None
    if least is not None and value < least:
        raise ValueError(f"{option} must be at least {least}, got {value}")
    return value


def number(text: str, option: str) -> float:
    """An option's number.

    Raises
    ------
    ValueError
        It is none.
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} must be a number, got {text!r}") from None


def _say(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 1


def _os_text(error: OSError) -> str:
    """The path and the reason, without a number."""
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
