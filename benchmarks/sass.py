#!/usr/bin/env python3
"""Reads the machine code of the CUDA kernels: access widths, spills, registers, loads in flight before the first store.

    make sass

Needs no GPU. Needs cuobjdump, from a CUDA toolkit or from the ``triton`` package.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# csrc/cuda/grid.h: warps of a CTA, and what a link to the host has on its way by default.
CTA_WARPS = 8
LINK_BYTES = {"PCIe": 256 << 10, "coherent link": 1 << 20}

# csrc/cuda/bulk_body.h: the rings of a CTA, and their stages.
BULK_WARPS = 4
RING_BYTES = 48 << 10
GENERATIONS = 3
BULK_TILE_BYTES = 8 << 10

WARP_LANES = 32

ARCHITECTURE = re.compile(r"arch = (sm_\w+)")
FUNCTION = re.compile(r"Function ?: (\w+)")
RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# Predicate, opcode and first operand of a line of code, and a label.
CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;,]*)")
WIDTHS = ("128", "64", "U16", "U8")


@dataclass
class Kernel:
    architecture: str
    name: str
    registers: int = 0
    spilled_bytes: int = 0
    spill_instructions: int = 0
    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    # Bulk copies, from global to shared memory and back.
    bulk_loads: int = 0
    bulk_stores: int = 0
    # Most 16-byte loads into registers of their own with no store and no branch between them.
    loads_in_flight: int = 0

    @property
    def bytes_in_flight(self) -> int:
        """What a warp has asked for before it stores."""
        return self.loads_in_flight * 16 * WARP_LANES


def cuobjdump() -> str:
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = None if found else importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        found = shutil.which("cuobjdump", path=str(Path(spec.submodule_search_locations[0], "backends/nvidia/bin")))
    if not found:
        raise SystemExit("cuobjdump was not found: install a CUDA toolkit, or pip install triton")
    return found


def width(opcode: str) -> str:
    """Bits that one thread moves: a modifier says so, and 32 are meant where none does."""
    parts = opcode.split(".")
    return next((bits.removeprefix("U") for bits in WIDTHS if bits in parts), "32")


def read_kernels(library: Path) -> list[Kernel]:
    tool = cuobjdump()
    kernels = {}
    architecture = ""
    usage = subprocess.run([tool, "-res-usage", str(library)], check=True, capture_output=True, text=True).stdout
    for match in re.finditer(f"{ARCHITECTURE.pattern}|{RESOURCES.pattern}", usage):
        if match[1]:
            architecture = match[1]
            continue
        _, name, registers, stack, _, local = match.groups()
        kernels[architecture, name] = Kernel(architecture, name, int(registers), int(stack) + int(local))
    if not kernels:
        raise SystemExit(f"{library} holds no CUDA code: build it with KVKERNELS_CUDA=ON")
    code = subprocess.run([tool, "-sass", str(library)], check=True, capture_output=True, text=True).stdout
    for key, lines in functions(code):
        read_code(kernels[key], lines)
    return list(kernels.values())


def functions(code: str) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Each function's architecture and name, and its lines."""
    architecture, key, lines = "", None, []
    for line in code.splitlines():
        if found := ARCHITECTURE.search(line):
            architecture = found[1]
        elif found := FUNCTION.search(line):
            if key:
                yield key, lines
            key, lines = (architecture, found[1]), []
        else:
            lines.append(line)
    if key:
        yield key, lines


def read_code(kernel: Kernel, lines: list[str]) -> None:
    in_flight: set[str] = set()
    for line in lines:
        found = CODE.search(line)
        if not found:
            continue
        opcode, operand = found.groups()
        operation = opcode.split(".")[0]
        kernel.spill_instructions += operation in ("LDL", "STL")
        kernel.bulk_loads += opcode.startswith("UBLKCP.S.G")
        kernel.bulk_stores += opcode.startswith("UBLKCP.G.S")
        if operation == "LDG":
            kernel.loads[width(opcode)] += 1
            # A register that is loaded again has been used.
            in_flight = set() if operand in in_flight else in_flight
            in_flight |= {operand} if width(opcode) == "128" else set()
            kernel.loads_in_flight = max(kernel.loads_in_flight, len(in_flight))
        elif operation == "STG":
            kernel.stores[width(opcode)] += 1
            in_flight = set()
        elif operation in ("BRA", "BRX", "EXIT", "CALL", "RET", "BSYNC"):
            in_flight = set()


def in_order(kernels: list[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: (kernel.name, int(kernel.architecture.strip("sm_af"))))


def ctas_for(cta_bytes: int) -> list[str]:
    """How many CTAs that have so much in flight a copy over each link gets."""
    return [str(-(-link_bytes // cta_bytes)) if cta_bytes else "" for link_bytes in LINK_BYTES.values()]


def table(kernels: list[Kernel]) -> str:
    columns = ("kernel", "target", "registers", "spills", "128-bit loads", "stores", "narrower loads", "stores")
    columns += ("loads in flight", "bytes in flight of a warp", *(f"CTAs, {link}" for link in LINK_BYTES))
    rows = [f"| {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * (len(columns) - 2)}"]
    for kernel in in_order(kernels):
        wide = kernel.loads["128"], kernel.stores["128"]
        narrow = kernel.loads.total() - wide[0], kernel.stores.total() - wide[1]
        spills = kernel.spilled_bytes + kernel.spill_instructions
        rows.append(
            f"| {kernel.name.removeprefix('kvkernels_')} | {kernel.architecture} | {kernel.registers} | {spills} "
            f"| {wide[0]} | {wide[1]} | {narrow[0]} | {narrow[1]} | {kernel.loads_in_flight} "
            f"| {kernel.bytes_in_flight} | {' | '.join(ctas_for(kernel.bytes_in_flight * CTA_WARPS))} |"
        )
    return "\n".join(rows)


def ring(fragment_bytes: int) -> tuple[int, int, int]:
    """Of fragments of a size: the tiles of a generation, a stage's bytes, and a CTA's loads on their way in bytes."""
    stage_bytes = min(-(-fragment_bytes // 128) * 128, BULK_TILE_BYTES)
    lanes = min(RING_BYTES // GENERATIONS // stage_bytes, WARP_LANES)
    return lanes, stage_bytes, (GENERATIONS - 1) * lanes * min(stage_bytes, fragment_bytes) * BULK_WARPS


def bulk_table(kernels: list[Kernel]) -> str:
    """The bulk kernels' copies."""
    rows = ["| kernel | target | registers | spills | bulk loads (UBLKCP.S.G) | bulk stores (UBLKCP.G.S) |"]
    rows.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for kernel in in_order(kernels):
        if kernel.bulk_loads or kernel.bulk_stores:
            name = kernel.name.removeprefix("kvkernels_")
            spills = kernel.spilled_bytes + kernel.spill_instructions
            copies = f"{kernel.bulk_loads} | {kernel.bulk_stores}"
            rows.append(f"| {name} | {kernel.architecture} | {kernel.registers} | {spills} | {copies} |")
    return "\n".join(rows)


def ring_table() -> str:
    """What the bulk kernels' rings keep on its way."""
    columns = ("fragment", "tiles of a generation", "stage", "on its way, by CTA")
    columns += tuple(f"CTAs, {link}" for link in LINK_BYTES)
    rows = [f"| {' | '.join(columns)} |", f"|{' ---: |' * len(columns)}"]
    for fragment_bytes in (512, 1024, 2048, 4096, 8192, 65536):
        lanes, stage_bytes, cta = ring(fragment_bytes)
        ctas = " | ".join(ctas_for(cta))
        rows.append(f"| {fragment_bytes} B | {lanes} | {stage_bytes} B | {cta // 1000} kB | {ctas} |")
    return "\n".join(rows)


def tables(kernels: list[Kernel]) -> list[str]:
    """Of the kernels that copy through registers, of those that use bulk copies, and of their rings."""
    is_bulk = {kernel.name: "_bulk_" in kernel.name for kernel in kernels}
    return [table([kernel for kernel in kernels if not is_bulk[kernel.name]]), bulk_table(kernels), ring_table()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = Path(__file__).resolve().parents[1] / "kvkernels" / "libkvkernels_ops.so"
    parser.add_argument("library", type=Path, nargs="?", default=built)
    kernels = read_kernels(parser.parse_args().library)
    print(*tables(kernels), sep="\n\n")


if __name__ == "__main__":
    main()
