"""The docstrings' examples are run, and say what a caller must know."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import torch

import kvkernels
import kvkernels.capture
import kvkernels.memory
import kvkernels.observe
import kvkernels.transfer
import kvkernels_records
from kvkernels import reference
from kvkernels.registration import LIBRARY, fake, schemas

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    found.name
    for package in (kvkernels, kvkernels_records)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if "__main__" not in found.name and importlib.util.find_spec(found.name).origin.endswith(".py")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.startswith("kvkernels.triton."):
        pytest.importorskip("triton")
    if name.startswith("kvkernels.transfer.remote"):
        pytest.importorskip("msgspec")
        pytest.importorskip("xxhash")
    if name.startswith("kvkernels.connectors.vllm"):
        pytest.importorskip("vllm")
    if name == "kvkernels.connectors.sums":
        pytest.importorskip("xxhash")
    if name in ("kvkernels.transfer.mover", "kvkernels.connectors.worker") and not LIBRARY.compiled:
        pytest.skip("movers need the compiled library")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0


@pytest.mark.parametrize("op", schemas.PUBLIC)
def test_each_op_has_an_example_that_runs(op):
    examples = doctest.DocTestFinder(recurse=False).find(getattr(kvkernels, op), op)
    assert sum(len(test.examples) for test in examples) > 1


@pytest.mark.parametrize("op", schemas.PUBLIC)
@pytest.mark.parametrize("word", ["Parameters", "Raises", "ValueError", "stream", "graph"])
def test_each_op_says(op, word):
    """Its arguments, its errors, its order on a stream, and whether a CUDA graph may capture it."""
    assert word in getattr(kvkernels, op).__doc__


#: How many blocks of Python a page has, which are run one after the other.
PAGES = {
    "README.md": 5,
    "docs/capture.md": 2,
    "docs/index.md": 1,
    "docs/layouts.md": 7,
    "docs/memory.md": 10,
    "docs/mover.md": 1,
    "docs/observe.md": 2,
    "docs/paths.md": 1,
    "docs/remote.md": 3,
    "docs/tune.md": 1,
}
#: A line of a page's code and the error that the comment under it promises.
RAISES = re.compile(r"^(\S.*)\n# (\w+Error): (.*)\n", re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write to build/
    (tmp_path / "build").mkdir()
    if name == "docs/observe.md":
        pytest.importorskip("prometheus_client")
    if name == "docs/remote.md":
        pytest.importorskip("msgspec")
    if name in ("README.md", "docs/memory.md", "docs/observe.md", "docs/remote.md"):
        pytest.importorskip("xxhash")
        pytest.importorskip("blake3")
    if name in ("README.md", "docs/mover.md", "docs/paths.md", "docs/observe.md") and not LIBRARY.compiled:
        pytest.skip("movers and the cpu executor need the compiled library")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert len(blocks) == PAGES[name]
    names: dict[str, object] = {}
    for block in blocks:
        while promised := RAISES.search(block):
            exec(block[: promised.start()], names)
            with pytest.raises(Exception) as raised:
                exec(promised[1], names)
            assert (raised.typename, str(raised.value)) == (promised[2], promised[3])
            block = block[promised.end() :]
        exec(block, names)


def links_into_the_repository(docname, text):
    """As docs/conf.py has it, which is loaded as Sphinx does."""
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))["links_into_the_repository"](docname, text)


def test_links_of_the_documentation_to_other_folders_are_the_repositorys():
    text = "[a](../csrc/core) [b](paths.md#x) ![c](../benchmarks/results/pages.png) [d](https://e.org/../f) [g](#h)"
    linked = links_into_the_repository("index", text)
    assert re.fullmatch(r"\[a\]\(https://\S+/csrc/core\) (.*)", linked)[1] == text.split(" ", 1)[1]
    assert "/README.md#ops)" in links_into_the_repository("api/index", "[a](../../README.md#ops)")
    with pytest.raises(FileNotFoundError, match="links to csrc/gone, which is not there"):
        links_into_the_repository("index", "[a](../csrc/gone)")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_repositorys_pages_are_there(name):
    text = (ROOT / name).read_text()
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
               for line in text.splitlines() if line.startswith("#")}  # fmt: skip
    for path, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)]*))?\)", text):
        if "://" not in path:
            assert (ROOT / path).exists(), path
            assert path or anchor in anchors, anchor


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


@pytest.mark.parametrize("function", ["convert_blocks", "copy_slots", "copy_groups"])
@pytest.mark.parametrize("word", ["Parameters", "Raises", "IndexError", "ValueError", "stream", "graph", ">>>"])
def test_each_conversion_says(function, word):
    assert word in getattr(kvkernels.layout, function).__doc__


@pytest.mark.parametrize("op", schemas.PUBLIC)
@pytest.mark.parametrize("functions", [kvkernels, reference.ops, fake], ids=lambda module: module.__name__)
def test_each_op_has_the_schemas_defaults(op, functions):
    given = {name: one.default for name, one in inspect.signature(getattr(functions, op)).parameters.items()}
    arguments = getattr(torch.ops.kvkernels, op).default._schema.arguments
    assert given == {one.name: one.default_value if one.has_default_value() else inspect.Parameter.empty
                     for one in arguments}  # fmt: skip


DEFAULTS = {
    "convert_blocks": {"layer": None, "allow_partial": False, "unit_tokens": None, "skip_negative": False},
    "copy_slots": {"pattern": "K L T H D", "skip_first": 0},
    "copy_groups": {"first_blocks": None},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_conversions_have_the_defaults_of_the_ops(name):
    parameters = inspect.signature(getattr(kvkernels.layout, name)).parameters
    given = {key: one.default for key, one in parameters.items() if one.default is not inspect.Parameter.empty}
    assert given == {**DEFAULTS[name], "executor": "auto", "sm_budget": 0}


@pytest.mark.parametrize(
    "module",
    [
        kvkernels,
        kvkernels.capture,
        kvkernels.layout,
        kvkernels.memory,
        kvkernels.observe,
        kvkernels.transfer,
    ],
    ids=lambda module: module.__name__,
)
def test_everything_public_has_a_docstring(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert isinstance(value, str | tuple) or value.__doc__, name


def test_everything_public_of_remote_has_a_docstring():
    pytest.importorskip("msgspec")
    pytest.importorskip("xxhash")
    test_everything_public_has_a_docstring(importlib.import_module("kvkernels.transfer.remote"))
