"""Runs CMakeLists.txt for setuptools; everything else about the package stands in pyproject.toml.

KVKERNELS_COMPILED=ON (the default) builds the compiled library or fails; OFF leaves it out. Which it was is written to
``kvkernels/_build.json`` for ``kvkernels.info()``. The library is built on the headers of the torch in KVKERNELS_TORCH,
or else of the one that the environment has. KVKERNELS_CUDA=AUTO|ON|OFF and KVKERNELS_WERROR=ON|OFF go to CMake.
"""

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Without isolation the environment's own is used, however old, and reads pyproject.toml with errors a page long. One
# that does not know its version says 0.
if 0 < int(__version__.partition(".")[0]) < 77:
    raise SystemExit(f"kvkernels: setuptools must be 77 or later, got {__version__}: pip install --upgrade setuptools")

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libkvkernels_ops.so", f"_host{sysconfig.get_config_var('EXT_SUFFIX')}")

# What `kvkernels bench` runs, which is benchmarks/swap.py: a clone has it there, a wheel in the commands' package.
BENCHMARK = [f"{name}.py" for name in ("swap", "contest", "geometry", "harness", "machine", "models", "plot", "verify")]

# The end of every refusal to build.
WAYS = """\
The build needs a C++20 compiler (c++, g++, clang++ or $CXX) and torch 2.10 or later, of which it takes, isolated or
not, the one that is installed where pip installs kvkernels. A tool that builds in an environment of its own (uv,
python -m build) hides it: set KVKERNELS_TORCH to torch's folder, which is what
python -c 'import torch; print(torch.__path__[0])' prints, or build with --no-build-isolation. KVKERNELS_COMPILED=OFF
installs kvkernels without the compiled library: every op then runs on the pure-torch reference, correct and slow."""


def refusal(reason: str) -> SystemExit:
    return SystemExit(f"kvkernels: the compiled library cannot be built: {reason}.\n{WAYS}")


def library_wanted() -> bool:
    wanted = os.environ.get("KVKERNELS_COMPILED", "ON")
    if wanted not in ("ON", "OFF"):
        raise SystemExit(f"kvkernels: KVKERNELS_COMPILED must be ON or OFF, got {wanted!r}")
    return wanted == "ON"


def torch_folder() -> str:
    """The torch to build on, or "" where there is none. It is looked for and not imported."""
    given = os.environ.get("KVKERNELS_TORCH")
    if given:
        return str(Path(given).resolve())
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return str(Path(spec.origin).parent)
    # pip's isolation is these two variables: without them the same interpreter sees the environment's own packages.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    ask = "import importlib.util as u; spec = u.find_spec('torch'); print(); print(spec and spec.origin or '', end='')"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, cwd="/", stdout=subprocess.PIPE, text=True)
    origin = asked.stdout.rpartition("\n")[2]
    return str(Path(origin).parent) if origin else ""


def search_path() -> str:
    """The PATH of the build: pip's cmake and ninja first, whose environment need not be an activated one."""
    folders = []
    for package, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        if importlib.util.find_spec(package):
            folders.append(getattr(importlib.import_module(package), attribute))
    folders.append(os.environ.get("PATH", os.defpath))
    return os.pathsep.join(filter(None, folders))  # ninja's is "" in isolation, whose own PATH has it


def missing(torch: str, path: str) -> list[str]:
    """What the build needs and does not find."""
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    found = {
        f"no C++ compiler was found ({', '.join(compilers)})": any(shutil.which(name) for name in compilers),
        "no torch was found": torch,
        "no cmake was found (pip install cmake)": shutil.which("cmake", path=path),
        "no ninja was found (pip install ninja)": shutil.which("ninja", path=path),
        "no pybind11 was found (pip install pybind11)": importlib.util.find_spec("pybind11"),
        "Python's C headers were not found (apt-get install python3-dev)": Path(
            sysconfig.get_path("include"), "Python.h"
        ).exists(),
    }
    return [problem for problem, there in found.items() if not there]


class PyBuild(build_py):
    """Packs the benchmark beside the modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "kvkernels_cli" / "benchmarks"
        target.mkdir(parents=True, exist_ok=True)
        for name in BENCHMARK:
            shutil.copy(ROOT / "benchmarks" / name, target)


class CMakeBuild(build_ext):
    """Builds both artifacts with CMake and ninja and installs them beside the package's modules."""

    def run(self) -> None:
        # setuptools copies only Extensions that it knows, so an editable build is installed in place.
        target = ROOT / "kvkernels" if self.editable_mode else Path(self.build_lib).resolve() / "kvkernels"
        target.mkdir(parents=True, exist_ok=True)
        compiled = library_wanted()
        if compiled:
            self.cmake(target)
        else:
            for name in LIBRARIES:  # of an earlier build, which would be loaded or packed
                (target / name).unlink(missing_ok=True)
        reason = "" if compiled else "KVKERNELS_COMPILED=OFF was set when the package was built"
        (target / "_build.json").write_text(json.dumps({"compiled": compiled, "reason": reason}) + "\n")

    def cmake(self, target: Path) -> None:
        torch, path = torch_folder(), search_path()
        problems = missing(torch, path)
        if problems:
            raise refusal(" and ".join(problems))
        # Objects stay for the next build. What CMake found does not: the tools of an isolated build are gone by then.
        build = ROOT / "build" / "cmake"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (build / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(found)
        defaults = {"KVKERNELS_CUDA": "AUTO", "KVKERNELS_WERROR": "OFF"}
        options = [f"-D{name}={os.environ.get(name, default)}" for name, default in defaults.items()]
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DKVKERNELS_TORCH={torch}"]
        cmake = str(shutil.which("cmake", path=path))
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options],
            [cmake, "--build", str(build)],
            [cmake, "--install", str(build), "--prefix", str(target), "--strip"],
        ):
            if subprocess.run(command, env={**os.environ, "PATH": path}).returncode:
                raise refusal("CMake failed, and says why above")

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("kvkernels._host", [])], cmdclass={"build_ext": CMakeBuild, "build_py": PyBuild})
