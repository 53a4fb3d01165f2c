"""Installing: which torch a build takes, what it refuses to do without, and a real sdist, install and wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
LIBRARY = "libkvkernels_ops.so"
HOST = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"

# What one of pip's isolated builds sees of the interpreter's own packages: nothing.
ISOLATED = """\
import os, sys
overlay = os.path.dirname(__file__)
sys.path[:] = [entry for entry in sys.path if entry == overlay or not entry.endswith("-packages")]
"""


def run(command: Sequence[object], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Without the settings of this session, and with its two outputs as one."""
    ours = ("KVKERNELS_", "PYTHONPATH", "PYTHONNOUSERSITE", "MAKEFLAGS", "CXX")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    words = [str(word) for word in command]
    environment |= env
    return subprocess.run(
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=550
    )


def must_run(command: Sequence[object], cwd: Path, **env: str) -> str:
    ran = run(command, cwd, **env)
    assert ran.returncode == 0, f"{command}:\n{ran.stdout[-6000:]}"
    return ran.stdout


def environment(place: Path) -> tuple[Path, Path]:
    """The interpreter of a new environment without packages, and the folder for them."""
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return python, Path(must_run(ask, place).strip())


def flowing(text: str) -> str:
    """A message without its line breaks."""
    return re.sub(r"\s+", " ", text)


# What `kvkernels bench` needs of benchmarks/: swap.py and whatever that imports, which tests/test_cli.py runs.
BENCHMARK = [f"{name}.py" for name in ("swap", "contest", "geometry", "harness", "machine", "models", "plot", "verify")]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources in which an editable build of another day has left its files."""
    copy = tmp_path_factory.mktemp("source") / "kvkernels"
    left_out = shutil.ignore_patterns(
        ".*", "build", "dist", "tests", "*.so", "_build.json", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


# What setup.py decides, seen by a cmake that only writes down what it is asked for.


def fake_torch(site: Path) -> Path:
    """A torch that a build may look at and must not import."""
    folder = site / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    return folder


def link(site: Path, *packages: str) -> None:
    for package in packages:
        (site / package).symlink_to(importlib.util.find_spec(package).submodule_search_locations[0])


@dataclass
class Builder:
    """An interpreter with all that building needs but torch."""

    python: Path
    site: Path  # the packages of its environment
    tools: Path  # the packages that building needs, which is also what an isolated build has
    source: Path
    tmp: Path

    def build(self, isolated: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        if isolated:
            (self.tools / "sitecustomize.py").write_text(ISOLATED)
            env["PYTHONNOUSERSITE"] = "1"
        env = {"PYTHONPATH": str(self.tools), "ASKED": str(self.tmp / "asked"), **env}
        places = ["--build-lib", self.tmp / "lib", "--build-temp", self.tmp / "temp"]
        return run([self.python, "setup.py", "build_ext", *places], self.source, **env)

    @property
    def asked(self) -> list[str]:
        """The arguments that CMake was called with."""
        log = self.tmp / "asked"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def package(self) -> Path:
        return self.tmp / "lib" / "kvkernels"

    def record(self) -> dict[str, object]:
        return json.loads((self.package / "_build.json").read_text())

    def torch(self) -> str:
        return next(a for a in self.asked if a.startswith("-DKVKERNELS_TORCH=")).partition("=")[2]


@pytest.fixture
def builder(source, tmp_path) -> Builder:
    python, site = environment(tmp_path / "env")
    tools = tmp_path / "tools"
    for program in ("cmake", "ninja"):  # each as pip installs it: a package that says where its program is
        folder = tools / program
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"CMAKE_BIN_DIR = BIN_DIR = {str(folder)!r}\n")
        (folder / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@" >>"$ASKED"\nexit ${CMAKE_STATUS:-0}\n')
        (folder / program).chmod(0o755)
    link(tools, "setuptools", "_distutils_hack", "pybind11")
    return Builder(python, site, tools, source, tmp_path)


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not-isolated"])
def test_a_build_takes_its_environments_torch(builder, isolated):
    folder = fake_torch(builder.site)
    ran = builder.build(isolated)
    assert ran.returncode == 0, ran.stdout
    assert builder.torch() == str(folder)
    assert builder.record() == {"compiled": True, "reason": ""}


def test_an_isolated_build_takes_the_users_own_torch(builder):
    """That of `pip install --user`, which a virtual environment would not have."""
    builder.python = Path(sys._base_executable)
    user = builder.tmp / "user"
    environment = {"PYTHONUSERBASE": str(user)}
    ask = [builder.python, "-c", "import site; print(site.getusersitepackages())"]
    folder = fake_torch(Path(must_run(ask, builder.tmp, **environment).strip()))
    ran = builder.build(isolated=True, **environment)
    assert ran.returncode == 0, ran.stdout
    assert builder.torch() == str(folder)


def test_the_torch_on_pythonpath_comes_first_where_there_is_no_isolation(builder):
    fake_torch(builder.site)
    folder = fake_torch(builder.tools)
    assert builder.build().returncode == 0
    assert builder.torch() == str(folder)


def test_what_an_environment_prints_at_its_start_is_no_torch(builder):
    folder = fake_torch(builder.site)
    (builder.site / "noise.pth").write_text("import sys; sys.stdout.write('starting\\nup')\n")
    assert builder.build(isolated=True).returncode == 0
    assert builder.torch() == str(folder)


@pytest.mark.parametrize("has_torch", [True, False], ids=["beside-another", "alone"])
def test_kvkernels_torch_is_the_torch(builder, has_torch):
    if has_torch:
        fake_torch(builder.site)
    given = fake_torch(builder.tmp / "elsewhere")
    ran = builder.build(isolated=True, KVKERNELS_TORCH=str(given))
    assert ran.returncode == 0, ran.stdout
    assert builder.torch() == str(given)


def assert_refused(builder: Builder, ran: subprocess.CompletedProcess[str], reason: str) -> None:
    """The reason, each way out, and nothing that could be installed."""
    assert ran.returncode == 1
    said = flowing(ran.stdout)
    assert f"kvkernels: the compiled library cannot be built: {reason}. " in said
    for way in (
        "KVKERNELS_TORCH",
        "--no-build-isolation",
        "KVKERNELS_COMPILED=OFF",
        "print(torch.__path__[0])",
        "$CXX",
    ):
        assert way in said
    assert not (builder.package / "_build.json").exists()


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not-isolated"])
def test_no_torch_is_an_error(builder, isolated):
    assert_refused(builder, builder.build(isolated), "no torch was found")
    assert builder.asked == []


@pytest.mark.parametrize(
    "environment,names",
    [
        ({"CXX": "no-such-compiler -O2"}, "no-such-compiler"),
        ({"PATH": "/no/such/folder"}, "c++, g++, clang++"),
        ({"PATH": "/no/such/folder", "CXX": ""}, "c++, g++, clang++"),
    ],
)
def test_no_compiler_is_an_error(builder, environment, names):
    fake_torch(builder.site)
    assert_refused(builder, builder.build(**environment), f"no C++ compiler was found ({names})")
    assert builder.asked == []


def test_a_compiler_may_be_a_command_with_arguments(builder):
    fake_torch(builder.site)
    assert builder.build(CXX=f"{sys.executable} -c pass").returncode == 0


@pytest.mark.parametrize("tool", ["cmake", "ninja", "pybind11"])
def test_a_tool_that_an_isolated_build_would_install_is_named(builder, tool):
    fake_torch(builder.site)
    place = builder.tools / tool
    place.unlink() if place.is_symlink() else shutil.rmtree(place)
    compilers = builder.tmp / "compilers"
    compilers.mkdir()
    (compilers / "c++").symlink_to(sys.executable)
    reason = f"no {tool} was found (pip install {tool})"
    assert_refused(builder, builder.build(PATH=str(compilers)), reason)


def test_a_package_that_does_not_know_its_program_leaves_it_to_the_path(builder):
    """pip's ninja, in isolation. An empty place on a PATH would be the current directory."""
    fake_torch(builder.site)
    programs = builder.tmp / "programs"
    programs.mkdir()
    (builder.tools / "ninja" / "ninja").rename(builder.source / "ninja")
    (builder.tools / "ninja" / "__init__.py").write_text("BIN_DIR = ''\n")
    try:
        assert_refused(builder, builder.build(PATH="", CXX=sys.executable), "no ninja was found (pip install ninja)")
        (builder.source / "ninja").rename(programs / "ninja")
        ran = builder.build(PATH=str(programs), CXX=sys.executable)
        assert ran.returncode == 0, ran.stdout
    finally:
        (builder.source / "ninja").unlink(missing_ok=True)


def test_all_that_is_missing_is_said_at_once(builder):
    ran = builder.build(PATH="/no/such/folder")
    assert_refused(builder, ran, "no C++ compiler was found (c++, g++, clang++) and no torch was found")


def test_an_old_setuptools_is_an_error(builder):
    (builder.tools / "setuptools").unlink()
    (builder.tools / "setuptools" / "command").mkdir(parents=True)
    (builder.tools / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = setup = None\n")
    (builder.tools / "setuptools" / "command" / "__init__.py").touch()
    for name in ("build_ext", "build_py"):
        (builder.tools / "setuptools" / "command" / f"{name}.py").write_text(f"{name} = object\n")
    ran = builder.build()
    assert ran.returncode == 1
    assert "kvkernels: setuptools must be 77 or later, got 65.5.0: pip install --upgrade setuptools" in ran.stdout


def test_a_build_that_fails_leaves_nothing_to_install(builder):
    fake_torch(builder.site)
    assert_refused(builder, builder.build(CMAKE_STATUS="1"), "CMake failed, and says why above")


def test_off_needs_nothing_and_removes_what_an_earlier_build_left(builder):
    builder.package.mkdir(parents=True)
    for name in (LIBRARY, HOST):
        (builder.package / name).touch()
    ran = builder.build(KVKERNELS_COMPILED="OFF", PATH="/no/such/folder")
    assert ran.returncode == 0, ran.stdout
    assert builder.record() == {
        "compiled": False,
        "reason": "KVKERNELS_COMPILED=OFF was set when the package was built",
    }
    assert [path.name for path in builder.package.iterdir()] == ["_build.json"]
    assert builder.asked == []


@pytest.mark.parametrize("value", ["AUTO", "off", ""])
def test_other_values_are_errors(builder, value):
    ran = builder.build(KVKERNELS_COMPILED=value)
    assert ran.returncode == 1
    assert f"kvkernels: KVKERNELS_COMPILED must be ON or OFF, got {value!r}" in ran.stdout


def test_settings_go_to_cmake(builder):
    fake_torch(builder.site)
    assert builder.build(KVKERNELS_CUDA="OFF", KVKERNELS_WERROR="ON").returncode == 0
    assert {"-DKVKERNELS_CUDA=OFF", "-DKVKERNELS_WERROR=ON", f"-DPython_EXECUTABLE={builder.python}"} <= {
        *builder.asked
    }


def test_what_an_earlier_cmake_found_is_forgotten(builder):
    """Its tools, compilers and folders may be gone; the objects stay."""
    fake_torch(builder.site)
    build = builder.source / "build" / "cmake"
    kept = build / "CMakeFiles" / "kvkernels_core.dir" / "core.cpp.o"
    stale = [build / "CMakeCache.txt", build / "CMakeFiles" / "3.31.6" / "CMakeCXXCompiler.cmake"]
    for file in (kept, *stale):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    try:
        assert builder.build().returncode == 0
        assert kept.exists() and not any(file.exists() for file in stale)
    finally:
        shutil.rmtree(build)


# What CMake itself says of a folder.


@pytest.mark.parametrize(
    "version,library,says",
    [
        (None, False, "KVKERNELS_TORCH must be a torch's folder, got '{}', which has no lib/libtorch_cpu.so"),
        ((2, 10), False, "KVKERNELS_TORCH must be a torch's folder, got '{}', which has no lib/libtorch_cpu.so"),
        (None, True, "kvkernels is built on torch 2.10 or later, and the one in {} is older"),
        ((2, 9), True, "kvkernels is built on torch 2.10 or later, and the one in {} is older"),
    ],
)
def test_a_folder_that_is_no_torch_to_build_on_is_an_error(tmp_path, version, library, says):
    folder = tmp_path / "torch"
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    (folder / "lib").mkdir()
    if version:
        names = zip(("MAJOR", "MINOR", "PATCH"), (*version, 0), strict=True)
        header.write_text("".join(f"#define TORCH_VERSION_{name} {number}\n" for name, number in names))
    if library:
        (folder / "lib" / "libtorch_cpu.so").touch()
    options = ["-DKVKERNELS_CUDA=OFF", f"-DKVKERNELS_TORCH={folder}", f"-DPython_EXECUTABLE={sys.executable}"]
    # A shell's CMake may be too old; make and setup.py take the pip package's as well.
    ran = run([sys.executable, "-m", "cmake", "-S", ROOT, "-B", tmp_path / "build", *options], tmp_path)
    assert ran.returncode == 1
    assert says.format(folder) in flowing(ran.stdout)


# A real one: the sdist is made, unpacked, installed twice and packed as a wheel, all on one build of the C++ code.


def pip(python: Path, *arguments: object, cwd: Path) -> str:
    return must_run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *arguments], cwd, KVKERNELS_CUDA="OFF"
    )


def with_this_torch(place: Path) -> Path:
    """The interpreter of a new environment that has nothing but this one's packages."""
    python, site = environment(place)
    (site / "torch.pth").write_text(f"{TORCH.parent}\n")
    return python


def moves_bytes(python: Path, cwd: Path) -> Path:
    """Whether the installed package is compiled and works; where it is."""
    script = (
        "import pathlib, torch, kvkernels, kvkernels._host\n"
        "assert kvkernels.info()['compiled'], kvkernels.info()['why']\n"
        "pool, out = torch.arange(64, dtype=torch.uint8).view(4, 16), torch.zeros(1, 16, dtype=torch.uint8)\n"
        "kvkernels.gather_blocks([pool], torch.tensor([2]), out)\n"
        "assert torch.equal(out, pool[2:3])\n"
        "assert pathlib.Path(kvkernels._host.__file__).parent == pathlib.Path(kvkernels.__file__).parent\n"
        "print(pathlib.Path(kvkernels.__file__).parent)\n"
    )
    return Path(must_run([python, "-c", script], cwd).strip())


@pytest.fixture(scope="module")
def unpacked(source, tmp_path_factory) -> Path:
    """What the sdist has in it."""
    place = tmp_path_factory.mktemp("sdist")
    for name in (LIBRARY, HOST, "_build.json"):
        (source / "kvkernels" / name).touch()
    must_run([sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(place)!r})"], source)
    for name in (LIBRARY, HOST, "_build.json"):
        (source / "kvkernels" / name).unlink()
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(place)
    return place / archive.name.removesuffix(".tar.gz")


def test_an_sdist_has_the_sources_and_nothing_that_was_built(unpacked):
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("kvkernels*/**/*.py")}
    modules |= {f"benchmarks/{name}" for name in BENCHMARK}
    assert sources and modules and sources | modules | {"setup.py", "CMakeLists.txt", "kvkernels/py.typed"} <= packed
    assert not [name for name in packed if name.endswith(".so") or name == "kvkernels/_build.json"]


@pytest.fixture(scope="module")
def editable(unpacked, tmp_path_factory) -> Path:
    """The interpreter of an environment into which pip has installed the sdist, isolated and editable."""
    python = with_this_torch(tmp_path_factory.mktemp("editable") / "env")
    pip(python, "--editable", unpacked, cwd=unpacked.parent)
    return python


def ages(tree: Path) -> dict[Path, int]:
    """The objects of the core, which know neither torch nor a package of the build, and when each was compiled."""
    objects = (tree / "build" / "cmake" / "CMakeFiles" / "kvkernels_core.dir").rglob("*.o")
    return {path: path.stat().st_mtime_ns for path in objects}


def test_an_isolated_install_beside_a_torch_is_compiled(editable, unpacked, tmp_path):
    assert moves_bytes(editable, tmp_path) == unpacked / "kvkernels"


def test_a_second_isolated_install_finds_its_objects_and_not_the_first_ones_tools(editable, unpacked, tmp_path):
    before = ages(unpacked)
    for name in (LIBRARY, HOST):
        (unpacked / "kvkernels" / name).unlink()
    pip(editable, "--editable", unpacked, cwd=unpacked.parent)
    assert moves_bytes(editable, tmp_path) == unpacked / "kvkernels"
    assert before and before == ages(unpacked)


def test_make_wheel_makes_one_for_this_python_without_torch(editable, unpacked, tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, unpacked)
    stale = (
        unpacked / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "kvkernels" / "gone.py"
    )
    stale.parent.mkdir(parents=True)
    stale.touch()
    objects = ages(unpacked)
    # Nothing is installed into this session's environment, which has the requirements.
    as_it_is = [f"VENV={sys.prefix}", "-o", Path(sys.prefix, ".requirements-dev")]
    must_run(["make", "wheel", "KVKERNELS_CUDA=OFF", *as_it_is], unpacked)
    assert objects and objects == ages(unpacked)
    (wheel,) = (unpacked / "dist").glob("*.whl")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"kvkernels-[\d.]+-{version}-{version}-manylinux_\d+_\d+_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if not name.endswith("/")]
    assert sorted(Path(name).name for name in names if ".so" in name) == sorted([HOST, LIBRARY])
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("kvkernels*/**/*.py")}
    modules |= {f"kvkernels_cli/benchmarks/{name}" for name in BENCHMARK}
    assert {name for name in names if name.endswith(".py")} == modules
    python = with_this_torch(tmp_path / "env")
    pip(python, "--no-index", wheel, cwd=tmp_path)
    assert moves_bytes(python, tmp_path).is_relative_to(tmp_path / "env")
