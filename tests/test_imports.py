"""Nothing imports upward and nothing in a circle: the floors of docs/design.md, in kvkernels and in csrc."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up, modules and folders. One imports from itself and from lower floors, so nothing from a neighbour.
# _host is compiled, from csrc/host.
FLOORS = (
    ("_host", "common", "version"),
    ("reference", "triton"),
    ("registration",),
    ("ops",),
    ("layout", "explain", "names", "policy"),
    ("capture", "info", "memory", "observe", "prepared"),
    ("transfer",),
    ("connectors",),
    ("__init__", "cli"),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# What a folder of csrc includes, and the headers of others that it knows.
INCLUDES = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "host": {"core", "cpu", "host"},
    "ops": {"core", "cpu", "cuda", "ops", "transfer"},
    "transfer": {"core", "transfer"},
}
FOREIGN = {"core": set(), "cpu": set(), "cuda": {"cuda"}, "host": {"pybind11"}, "ops": {"torch"}, "transfer": set()}


def modules_of(package: Path) -> dict[str, Path]:
    """Each module's dotted name and file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    """The module or folder beside the package's ``__init__`` that a module is, or is in."""
    return module.split(".")[1] if "." in module else "__init__"


def names_imported(module: str, path: Path) -> Iterator[str]:
    """Whatever is imported anywhere in a file, as dotted names that may end in something else than a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def imports_of(package: Path) -> dict[str, set[str]]:
    """For each module of the package, those of it that it imports."""
    modules = modules_of(package)
    known = modules.keys() | {f"{package.name}._host"}

    def module_of(name: str) -> str:
        while name not in known:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {module_of(name) for name in names_imported(module, path) if name.split(".")[0] == package.name}
        for module, path in modules.items()
    }


def upward(imports: dict[str, set[str]]) -> list[str]:
    """The imports that are from no lower floor."""
    pairs = [(module, other) for module, others in imports.items() for other in sorted(others)]
    return [
        f"{module} imports {other}"
        for module, other in pairs
        if part_of(module) != part_of(other) and FLOOR_OF[part_of(module)] <= FLOOR_OF[part_of(other)]
    ]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, the first of them again at the end."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_is_on_a_floor_and_every_floor_is_there():
    assert {part_of(module) for module in modules_of(ROOT / "kvkernels")} == FLOOR_OF.keys() - {"_host"}


def test_nothing_imports_upward():
    assert upward(imports_of(ROOT / "kvkernels")) == []


def test_nothing_imports_in_a_circle():
    assert circle(imports_of(ROOT / "kvkernels")) == []


@pytest.mark.parametrize(
    "module,text,imported",
    [
        ("common.text", "import kvkernels", "kvkernels"),
        ("ops", "from kvkernels import KVLayout", "kvkernels"),
        ("ops", "from kvkernels.layout import plan", "kvkernels.layout.plan"),
        ("explain", "import kvkernels.layout.plan as p", "kvkernels.layout.plan"),
        ("ops", "def f():\n    from .layout.plan import Plan", "kvkernels.layout.plan"),
        ("ops", "if TYPE_CHECKING:\n    from kvkernels.layout import Plan", "kvkernels.layout"),
        ("ops", "importlib.import_module('kvkernels.info')", "kvkernels.info"),
        ("info", "from . import ops\nimport kvkernels._host, torch\nfrom .layout import plan, Plan", None),
    ],
)
def test_each_way_to_import_is_seen(tmp_path, module, text, imported):
    for name in ("__init__", "common/text", "explain", "info", "ops", "layout/__init__", "layout/plan"):
        path = tmp_path / "kvkernels" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name == module.replace(".", "/") else "")
    found = [f"kvkernels.{module} imports {imported}"] if imported else []
    assert upward(imports_of(tmp_path / "kvkernels")) == found


def test_a_circle_inside_a_folder_is_seen(tmp_path):
    folder = tmp_path / "kvkernels" / "layout"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from kvkernels.layout.plan import Plan")
    (folder / "plan.py").write_text("def f():\n    from kvkernels.layout import KVLayout")
    assert upward(imports_of(folder.parent)) == []
    assert set(circle(imports_of(folder.parent))) == {"kvkernels.layout", "kvkernels.layout.plan"}


def test_every_folder_of_csrc_is_on_a_floor():
    assert {path.relative_to(ROOT / "csrc").parts[0] for path in (ROOT / "csrc").rglob("*")} == INCLUDES.keys()


@pytest.mark.parametrize("folder", INCLUDES)
def test_csrc_includes_only_its_floor_and_lower_ones(folder):
    own, foreign = set(), set()
    for path in filter(Path.is_file, (ROOT / "csrc" / folder).rglob("*")):
        text = path.read_text()
        own |= set(re.findall(r'^\s*#\s*include "([^"/]*)', text, re.M))
        foreign |= set(re.findall(r"^\s*#\s*include <(torch|cuda|pybind11)", text, re.M))
    assert own and own <= INCLUDES[folder]
    assert foreign == FOREIGN[folder]


def imported_at_once(path: Path) -> set[str]:
    """The packages that importing a file imports: what stands in functions comes later."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ["kvkernels_records", "kvkernels_cli"])
def test_what_starts_without_torch_imports_it_in_functions_alone(package):
    """explaining is a command's second half, which is imported when its arguments have been read."""
    for name, path in modules_of(ROOT / package).items():
        if name != "kvkernels_cli.explaining":
            assert not imported_at_once(path) & {"torch", "kvkernels"}, name


def test_records_know_none_of_the_others():
    for name, path in modules_of(ROOT / "kvkernels_records").items():
        packages = {imported.split(".")[0] for imported in names_imported(name, path)}
        assert not packages & {"kvkernels", "kvkernels_cli", "click"}, name


def test_the_library_does_not_know_its_commands():
    for name, path in modules_of(ROOT / "kvkernels").items():
        assert not {"kvkernels_cli"} & {imported.split(".")[0] for imported in names_imported(name, path)}, name
