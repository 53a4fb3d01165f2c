"""The docstrings' examples are run, and say what a caller must know."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import kvkernels
from kvkernels.registration import schemas

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(kvkernels.__path__, "kvkernels.")
    if "__main__" not in found.name and importlib.util.find_spec(found.name).origin.endswith(".py")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.startswith("kvkernels.triton."):
        pytest.importorskip("triton")
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


def test_the_code_of_the_layouts_page_runs():
    page = (Path(__file__).resolve().parents[1] / "docs" / "layouts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


@pytest.mark.parametrize("function", ["convert_blocks", "copy_slots", "copy_groups"])
@pytest.mark.parametrize("word", ["Parameters", "Raises", "IndexError", "ValueError", "stream", "graph", ">>>"])
def test_each_conversion_says(function, word):
    assert word in getattr(kvkernels.layout, function).__doc__


@pytest.mark.parametrize("module", [kvkernels, kvkernels.layout], ids=lambda module: module.__name__)
def test_everything_public_has_a_docstring(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert isinstance(value, str) or value.__doc__, name
