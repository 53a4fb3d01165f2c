"""The command line: ``python -m kvkernels info``, ``policy``, ``tune`` and ``replay``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvkernels import policy
from kvkernels.info import info, info_text
from kvkernels.memory.replay import command as replay
from kvkernels.registration import LIBRARY
from kvkernels.transfer import calibrate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(prog="kvkernels", description="Moves KV-cache blocks.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="which executors serve which op here, and why")
    show.add_argument("--json", action="store_true", help="print JSON")
    table = commands.add_parser("policy", help="the tables that calls go by, as JSON for KVKERNELS_POLICY")
    table.add_argument("--default", action="store_true", help="the one that is compiled in")
    calibrate.add_arguments(commands.add_parser("tune", help="measure this machine, and write what serves best here"))
    replay.add_arguments(commands.add_parser("replay", help="what eviction policies would have hit on a trace"))
    options = parser.parse_args(arguments)
    if options.command == "replay":
        return replay.run(options)
    if options.command == "tune":
        return calibrate.run(options)
    if options.command == "policy":
        return _print_policy(policy.default() if options.default else policy.in_force())
    found = info()
    print(json.dumps(found, indent=2) if options.json else info_text(found))
    return 0


def _print_policy(table: Mapping[str, Any]) -> int:
    if not LIBRARY.compiled:
        print(f"there is no policy: {LIBRARY.why}", file=sys.stderr)
        return 1
    print(policy.text_of(table))
    return 0
