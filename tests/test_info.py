"""What the package says about itself: info(), the command line, explain(), and imports that cannot use the library."""

from __future__ import annotations

import ctypes.util
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kvkernels
from kvkernels.common.text import tensor_of
from kvkernels.registration import library, schemas
from kvkernels.registration.library import FILE_NAME, LIBRARY

PACKAGE = Path(kvkernels.__file__).parent
EXECUTORS = {"cpu", "kernel", "bulk", "dma", "staged", "triton", "reference"}


def python(*arguments: str, path: Path | None = None, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``cwd`` with ``path`` before the installed packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "KVKERNELS_ALLOW_REFERENCE")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment | env, text=True, capture_output=True, timeout=300)


def copy_package(to: Path, library: bytes | None = None) -> Path:
    """The package's Python files in ``to``, with ``library`` for its compiled one."""
    package = to / "kvkernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    if library is not None:
        (package / FILE_NAME).write_bytes(library)
    return package


def test_info_is_json_and_covers_every_op_and_combination():
    found = kvkernels.info()
    assert json.loads(json.dumps(found)) == found
    assert found["compiled"] == LIBRARY.compiled and found["why"]
    assert set(found["ops"]) == set(schemas.PUBLIC)
    for op, places in found["ops"].items():
        assert set(places) == {"cpu to cpu", "cpu to cuda", "cuda to cpu", "cuda to cuda"}
        for service in places.values():
            assert set(service["executors"]) <= EXECUTORS and service["why"]
            # Without CUDA code `auto` takes nothing for a device's tensor, but a caller may name the reference.
            unserved = service["executors"] == [] or (found["compiled"] and service["executors"] == ["reference"])
            assert (service["auto"] is None) == unserved, op
            assert set(re.findall(r"\w+", service["auto"] or "")) - {"or"} <= set(service["executors"]), (op, service)
        assert places["cpu to cpu"]["auto"] == ("cpu" if found["compiled"] else "reference"), op


@pytest.mark.parametrize("op", schemas.PUBLIC)
def test_the_executors_that_info_lists_are_those_that_serve(op):
    pool, out = torch.ones(1, 4, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.uint8)
    pair, run = torch.tensor([[0, 0]]), torch.tensor([[0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
    arguments = {
        "swap_blocks": (pool, out, 4, pair),
        "swap_blocks_batch": tuple(torch.tensor([n]) for n in (pool.data_ptr(), out.data_ptr(), 4)),
        "gather_blocks": ([pool], torch.tensor([0]), out),
        "scatter_blocks": (pool, torch.tensor([0]), [out]),
        "copy_pages": ([pool], [out], pair, run),
        "concat_tp_shards": ([pool], 0),
        "concat_tp_shards_out": ([pool], 0, out),
        "split_tp_shards": (pool, 0, [out]),
    }[op]
    listed = kvkernels.info()["ops"][op]["cpu to cpu"]["executors"]
    assert "reference" in listed
    for executor in EXECUTORS:
        out.zero_()
        if executor in listed:
            made = getattr(kvkernels, op)(*arguments, executor=executor)
            assert (out if made is None else made).tolist() == [[1] * 4]
        else:
            with pytest.raises(ValueError, match=f"executor '{executor}' cannot serve this call: "):
                getattr(kvkernels, op)(*arguments, executor=executor)


def test_command_line(tmp_path):
    env = {} if LIBRARY.compiled else {"KVKERNELS_ALLOW_REFERENCE": "1"}
    asked = python("-m", "kvkernels", "info", "--json", path=PACKAGE.parent, cwd=tmp_path, **env)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["compiled"] == LIBRARY.compiled
    from kvkernels.cli import main
    from kvkernels.info import info_text

    assert f"compiled: {'yes' if LIBRARY.compiled else 'no'} (" in info_text(kvkernels.info())
    assert main(["info"]) == 0
    with pytest.raises(SystemExit):
        main(["no-such-command"])


def test_schemas_and_tags_are_those_of_the_registered_ops():
    for op, schema in {**schemas.PUBLIC, **schemas.PRIVATE}.items():
        registered = getattr(torch.ops.kvkernels, op).default
        assert registered._schema == torch._C.parse_schema(f"kvkernels::{op}{schema}"), op
        assert set(registered.tags) == set(schemas.tags(op)), op


def test_version_is_the_projects():
    project = Path(__file__).parent.parent / "pyproject.toml"
    assert re.search(r'^version = "(.+)"$', project.read_text(), re.M)[1] == kvkernels.__version__


@pytest.mark.parametrize("module", ["ops", "explain", "info", "policy"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"kvkernels.{module}"))
    assert result.attempted > 0 and result.failed == 0


def small_calls():
    """Every op once, on the CPU, with a tensor that it writes."""
    u8 = torch.uint8
    page, other = torch.full((2, 16), 7, dtype=u8), torch.zeros(2, 16, dtype=u8)
    pair, run = torch.tensor([[0, 1]]), torch.tensor([[0, 0, 0, 0, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
    addresses = torch.tensor([page.data_ptr()]), torch.tensor([other.data_ptr()]), torch.tensor([16])
    return {
        "swap_blocks": ((page, other, 16, pair), other),
        "swap_blocks_batch": (addresses, other),
        "gather_blocks": (([page], torch.tensor([1, 0]), other), other),
        "scatter_blocks": ((page, torch.tensor([1, 0]), [other]), other),
        "copy_pages": (([page], [other], pair, run), other),
        "concat_tp_shards": (([page, page], 0), other),
        "concat_tp_shards_out": (([page[:1], page[:1]], 0, other), other),
        "split_tp_shards": ((page, 0, [other[:1], other[1:]]), other),
    }


@pytest.mark.parametrize("op", schemas.PUBLIC)
def test_explain_moves_nothing_and_agrees_with_the_counters(op):
    args, written = small_calls()[op]
    explanation = kvkernels.explain(op, *args)
    assert written.sum() == 0
    assert (explanation.op, explanation.direction) == (op, "h2h")
    assert kvkernels.explain(getattr(kvkernels, op), *args) == explanation
    kvkernels.reset_counters()
    getattr(kvkernels, op)(*args)
    assert op == "concat_tp_shards" or written.sum() > 0
    issued = kvkernels.counters()
    assert issued[explanation.executor] == {
        "calls": 1,
        "launches": explanation.launches,
        "descriptors": explanation.descriptors,
        "bytes": explanation.bytes,
    }
    assert all(sum(counts.values()) == 0 for executor, counts in issued.items() if executor != explanation.executor)


def test_explain_raises_what_the_op_raises_and_ends_its_scope():
    pool, out = torch.ones(2, 4, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(IndexError, match=r"gather_blocks: block_ids\[0\] = 5 is out of range"):
        kvkernels.explain("gather_blocks", [pool], torch.tensor([5]), out)
    kvkernels.gather_blocks([pool], torch.tensor([1]), out)
    assert out.tolist() == [[1] * 4]
    with pytest.raises(ValueError, match=r"explain: op must be one of swap_blocks, .*, got copy"):
        kvkernels.explain("copy")


def test_check_device_raises_what_the_device_recorded(monkeypatch):
    faults = map(tensor_of, ['{"count": 3, "first_row": 17, "op": "gather_blocks"}', "{}"])
    module = importlib.import_module("kvkernels.explain")
    monkeypatch.setattr(module, "_private", SimpleNamespace(_check_device=lambda index: next(faults)))
    with pytest.raises(IndexError) as raised:
        kvkernels.check_device("cuda:0")
    assert str(raised.value) == "gather_blocks: 3 pairs had ids out of range on cuda:0, the first in row 17"
    assert kvkernels.check_device(0) is None
    with pytest.raises(ValueError, match="check_device: device must be a cuda device, got cpu"):
        kvkernels.check_device("cpu")


WITHOUT_A_LIBRARY = """
import json, sys
import torch, kvkernels
assert not torch.cuda.is_initialized()
found = kvkernels.info()
assert not found["compiled"] and found["library"] is None
torch.cuda.is_initialized = lambda: False  # opcheck initialises CUDA, and then the reference takes no raw addresses
sys.path.insert(0, {tests!r})
from test_info import small_calls
for op, (args, written) in small_calls().items():
    torch.library.opcheck(getattr(torch.ops.kvkernels, op).default, args)
    assert kvkernels.explain(op, *args).executor == "reference"
    written.zero_()
    getattr(torch.ops.kvkernels, op)(*args)
    assert op == "concat_tp_shards" or written.sum() > 0, op
try:
    torch.ops.kvkernels.concat_tp_shards([], 0)
except ValueError as error:
    assert str(error) == "concat_tp_shards: shards must not be empty"
else:
    raise AssertionError("an empty list must raise")
assert kvkernels.counters()["reference"]["calls"] > 0
assert kvkernels.check_device(0) is None
print(json.dumps(found["why"]))
"""


def test_without_a_library_every_op_runs_on_the_reference(tmp_path):
    package = copy_package(tmp_path)
    script = WITHOUT_A_LIBRARY.format(tests=str(Path(__file__).parent))
    ignored = ("-W", "ignore::DeprecationWarning")  # opcheck imports what warns
    ran = python(*ignored, "-c", script, path=tmp_path, cwd=tmp_path, KVKERNELS_ALLOW_REFERENCE="1")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == f"no compiled library was built: there is no {FILE_NAME} in {package}"


@pytest.mark.parametrize(
    "record,why",
    [
        ('{"compiled": false, "reason": "KVKERNELS_COMPILED=OFF was set"}', "KVKERNELS_COMPILED=OFF was set"),
        ('{"compiled": true, "reason": ""}', "the build made a compiled library, but {package}/{library} is gone"),
        ("no JSON", "no compiled library was built: there is no {library} in {package}"),
    ],
)
def test_the_builds_record_says_why_there_is_no_library(tmp_path, monkeypatch, record, why):
    (tmp_path / "_build.json").write_text(record)
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    assert library._why_not_built() == why.format(package=tmp_path, library=FILE_NAME)


def test_import_is_silent_needs_no_path_and_leaves_cuda_alone(tmp_path):
    env = {} if LIBRARY.compiled else {"KVKERNELS_ALLOW_REFERENCE": "1"}
    script = "import kvkernels, torch; assert not torch.cuda.is_initialized(); print(kvkernels.info()['compiled'])"
    ran = python("-c", script, path=PACKAGE.parent, cwd=tmp_path, **env, PATH="")
    assert (ran.returncode, ran.stdout.strip()) == (0, str(LIBRARY.compiled)), ran.stderr


def test_a_library_that_does_not_load_says_why(tmp_path):
    package = copy_package(tmp_path, b"not a shared library")
    ran = python("-c", "import kvkernels", path=tmp_path, cwd=tmp_path, KVKERNELS_ALLOW_REFERENCE="1")
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: kvkernels: {package / FILE_NAME} does not load with torch {torch.__version__}: "
    )
    assert "file too short" in last or "invalid ELF header" in last
    assert "rebuild it" in last


def differing_ops(package: Path) -> list[str]:
    """The ops that importing ``package`` refuses its library for."""
    ran = python("-c", "import kvkernels", path=package.parent, cwd=package.parent)
    last = ran.stderr.strip().splitlines()[-1]
    start = (
        f"ImportError: kvkernels: {package / FILE_NAME} was built from other sources than this package, they differ in "
    )
    assert ran.returncode == 1 and last.startswith(start) and "rebuild it" in last
    return last.removeprefix(start).partition(";")[0].split(", ")


def test_a_library_without_the_ops_is_refused(tmp_path):
    other = Path("/proc/self/maps").read_text()
    libm = re.search(r"(/\S*/libm[.-]\S*)$", other, re.M) or pytest.skip(f"no {ctypes.util.find_library('m')} to copy")
    package = copy_package(tmp_path, Path(libm[1]).read_bytes())
    assert differing_ops(package) == sorted({**schemas.PUBLIC, **schemas.PRIVATE})


@pytest.mark.skipif(not LIBRARY.compiled, reason="no compiled library to change")
def test_a_library_built_for_other_schemas_is_refused(tmp_path):
    """Its functions would take their arguments for others: nothing of it may be called."""
    built = (PACKAGE / FILE_NAME).read_bytes()
    ours, older = b"split_tp_shards(Tensor input, int dim", b"split_tp_shards(Tensor input, int axe"
    assert built.count(ours) == 1
    assert differing_ops(copy_package(tmp_path, built.replace(ours, older))) == ["split_tp_shards"]


def shadowing_text(shadow: Path, compiled: Path) -> str:
    return (
        f"kvkernels: the copy in {shadow} has no compiled library and shadows the installed one in {compiled}; "
        "run Python from another directory, or build in place with pip install -e . "
        "(KVKERNELS_ALLOW_REFERENCE=1 accepts the reference)"
    )


def test_the_repositorys_root_does_not_shadow_the_installed_package_unnoticed(tmp_path):
    shadow = copy_package(tmp_path / "source")
    compiled = copy_package(tmp_path / "installed", b"never loaded")
    # As `python` does in the repository's root: the current directory comes first.
    script = (
        f"import sys; sys.path.insert(1, {str(compiled.parent)!r}); "
        "import kvkernels; print(kvkernels.info()['compiled'])"
    )
    ran = python("-c", script, cwd=shadow.parent)
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1] == f"ImportError: {shadowing_text(shadow, compiled)}"
    accepted = python("-c", script, cwd=shadow.parent, KVKERNELS_ALLOW_REFERENCE="1")
    assert (accepted.returncode, accepted.stdout.strip()) == (0, "False"), accepted.stderr


@pytest.mark.parametrize("how", ["on sys.path", "as an editable install", "the same copy"])
def test_installed_packages_are_found(tmp_path, monkeypatch, how):
    shadow, compiled = (tmp_path / name / "kvkernels" for name in ("source", "installed"))
    for package in (shadow, compiled):
        package.mkdir(parents=True)
    (compiled / FILE_NAME).touch()
    site = tmp_path / "site"
    record = site / "kvkernels-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: kvkernels\nVersion: 0.1.0\n")
    url = {"url": compiled.parent.as_uri(), "dir_info": {"editable": True}}
    (record / "direct_url.json").write_text(json.dumps(url))
    places = {"on sys.path": compiled.parent, "as an editable install": site, "the same copy": shadow.parent}
    monkeypatch.setattr(sys, "path", [str(shadow.parent), str(places[how])])
    monkeypatch.setattr(library, "PACKAGE", shadow)
    if how == "the same copy":
        return library._refuse_to_shadow()
    with pytest.raises(ImportError) as raised:
        library._refuse_to_shadow()
    assert str(raised.value) == shadowing_text(shadow, compiled)
