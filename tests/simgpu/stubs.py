"""Writes the functions of CUDA that the stand-in does not have, so that torch's libraries load: each fails loudly.

    stubs.py runtime NM LIBCUDART OUT     every function that the real runtime exports
    stubs.py driver COMPILER INCLUDE OUT  every function that cuda.h declares; the real driver comes with a GPU

The definitions are weak: whatever the stand-in implements takes their place when it is linked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEAD = """// Made by tests/simgpu/stubs.py.
namespace fake {{
int {refuse}(const char* call);
}}
#define STUB(name) \\
  extern "C" __attribute__((weak, visibility("default"))) int name() {{ return fake::{refuse}(#name); }}
"""


def runtime_functions(nm: str, library: str) -> set[str]:
    listing = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" T (\w+)", listing))


def driver_functions(compiler: str, include: str) -> set[str]:
    # Preprocessed, because macros give many functions the names of their second versions.
    command = [compiler, "-E", "-P", "-x", "c++", "-I", include, "-"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, input="#include <cuda.h>\n").stdout
    return set(re.findall(r"\bCUresult\s+(cu[A-Z]\w+)\s*\(", text))


def main() -> None:
    which, tool, where, out = sys.argv[1:]
    if which == "runtime":
        functions, refuse = runtime_functions(tool, where), "refuse_runtime_call"
    else:
        functions, refuse = driver_functions(tool, where), "refuse_call"
    if len(functions) < 100:
        sys.exit(f"stubs.py: only {len(functions)} functions found in {where}")
    stubs = "".join(f"STUB({name})\n" for name in sorted(functions))
    Path(out).write_text(HEAD.format(refuse=refuse) + stubs)


main()
