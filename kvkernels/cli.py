"""The command line: ``python -m kvkernels info [--json]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from kvkernels.info import info, info_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(prog="kvkernels", description="Moves KV-cache blocks.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="which executors serve which op here, and why")
    show.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = info()
    print(json.dumps(found, indent=2) if options.json else info_text(found))
    return 0
