"""Runs CMakeLists.txt for setuptools; everything else about the package stands in pyproject.toml.

KVKERNELS_COMPILED=AUTO (the default) builds the compiled library where a C++ compiler and torch are there and installs
the pure-torch package where they are not; ON fails instead, OFF never builds. Which it was, and why, is written to
``kvkernels/_build.json`` for ``kvkernels.info()``. KVKERNELS_CUDA=AUTO|ON|OFF and KVKERNELS_WERROR=ON|OFF go to CMake.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def why_not_compiled() -> str:
    """The reason for not building the compiled library, or "" where it is to be built."""
    wanted = os.environ.get("KVKERNELS_COMPILED", "AUTO")
    if wanted not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"KVKERNELS_COMPILED must be AUTO, ON or OFF, got {wanted!r}")
    if wanted == "OFF":
        return "KVKERNELS_COMPILED=OFF was set when the package was built"
    missing = []
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        missing.append("no C++ compiler was found")
    if importlib.util.find_spec("torch") is None:
        missing.append("torch was not there (install it first and use pip install --no-build-isolation)")
    if missing and wanted == "ON":
        raise SystemExit("KVKERNELS_COMPILED=ON: " + " and ".join(missing))
    return "when the package was built, " + " and ".join(missing) if missing else ""


class CMakeBuild(build_ext):
    """Builds both artifacts with CMake and ninja and installs them beside the package's modules."""

    def run(self) -> None:
        # setuptools copies only Extensions that it knows, so an editable build is installed in place.
        target = ROOT / "kvkernels" if self.editable_mode else Path(self.build_lib).resolve() / "kvkernels"
        target.mkdir(parents=True, exist_ok=True)
        reason = why_not_compiled()
        if reason:
            print(f"kvkernels: building without the compiled library: {reason}", file=sys.stderr)
        else:
            self.cmake(target)
        (target / "_build.json").write_text(json.dumps({"compiled": not reason, "reason": reason}) + "\n")

    def cmake(self, target: Path) -> None:
        # An editable install comes again after each edit, with a new build_temp each time; it keeps its objects here.
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve() / "cmake"
        defaults = {"KVKERNELS_CUDA": "AUTO", "KVKERNELS_WERROR": "OFF"}
        options = [f"-D{name}={os.environ.get(name, default)}" for name, default in defaults.items()]
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run([*configure, *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target), "--strip"], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("kvkernels._host", [])], cmdclass={"build_ext": CMakeBuild})
