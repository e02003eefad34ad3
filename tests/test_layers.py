"""Imports run downwards only: the order of the house, and that no circle of files is in it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import polar_ft

PACKAGE = Path(__file__).resolve().parents[1] / "polar_ft"

# The order, from the top; what stands in one line may import what stands in lines below it, and nothing else.
# A folder is one entry, a file next to the folders too. docs/architecture.md shows it.
LAYERS = [
    ["cli"],
    ["fit"],
    ["doctor", "labelling", "migrate", "parity", "rft"],
    ["training", "serving"],
    ["conversion", "evaluation", "client"],
    ["scoring"],
    ["model"],
    ["data", "reward_scale"],
    ["template"],
    ["tokenizer"],
    ["options"],
    ["groups"],
    ["files"],
    ["errors"],
    [""],  # polar_ft/__init__.py: the version, and public names that are imported when first asked for
]

# Packages that only some layers import: a verl or vLLM environment installs polar_ft without them.
HEAVY = {
    "torch": {"doctor", "parity", "training", "serving", "conversion", "evaluation", "scoring", "model"},
    "transformers": {"doctor", "parity", "training", "conversion", "model", "tokenizer"},
    "mmengine": {"training", "conversion"},
    "xtuner": {"training", "conversion"},
    "deepspeed": {"training", "doctor"},
}


def layer_of(module: str) -> str:
    """The layer of a module of ours.

    >>> layer_of("polar_ft.data.records"), layer_of("polar_ft.groups"), layer_of("polar_ft")
    ('data', 'groups', '')
    """
    return [*module.split("."), ""][1]


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name of every module of a package to its file."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports_of(file: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of ours and other packages that a file imports, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else str(node.module)


def graph_of(package: Path) -> dict[str, set[str]]:
    """Module to the modules of the package that it imports."""
    modules = modules_of(package)
    return {
        module: {name for name in imports_of(file, modules) if name in modules and name != module}
        for module, file in modules.items()
    }


def upward_imports(graph: dict[str, set[str]], layers: list[list[str]]) -> list[str]:
    """Imports of another layer that is not below."""
    height = {layer: -number for number, names in enumerate(layers) for layer in names}
    found = []
    for module, imported in sorted(graph.items()):
        assert layer_of(module) in height, f"{module}: its layer has no place in LAYERS"
        for name in sorted(imported):
            here, there = layer_of(module), layer_of(name)
            # The public names of the package are imported when first asked for.
            if here not in ("", there) and height[there] >= height[here]:
                found.append(f"{module} imports {name}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for name in graph[module]:
            if name not in index:
                visit(name)
                low[module] = min(low[module], low[name])
            elif name in stack:
                low[module] = min(low[module], index[name])
        if low[module] == index[module]:
            place = stack.index(module)
            component = stack[place:]
            del stack[place:]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return graph_of(PACKAGE)


def test_imports_run_downwards(graph):
    assert upward_imports(graph, LAYERS) == []


def public_names_in(source: str) -> list[str]:
    """Public names that a file takes from the package, which looks for them when asked, even upwards."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "polar_ft":
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] if node.value.id == "polar_ft" else []
    return [name for name in found if name in polar_ft.__all__ and name != "__version__"]


def test_public_names_are_imported_from_where_they_are():
    found = {
        module: public_names_in(file.read_text(encoding="utf-8"))
        for module, file in modules_of(PACKAGE).items()
    }
    assert {module: names for module, names in found.items() if names} == {}


def test_public_names_from_the_package_are_found():
    assert public_names_in("from polar_ft import RewardScorer, __version__") == ["RewardScorer"]
    assert public_names_in("import polar_ft\npolar_ft.RewardModelClient('a'), polar_ft.__version__") == [
        "RewardModelClient"
    ]


def test_there_is_no_circle_of_files(graph):
    graph = {module: names - {"polar_ft"} for module, names in graph.items() if module != "polar_ft"}
    assert circles(graph) == []


def test_heavy_packages_stay_where_they_are_needed():
    modules = modules_of(PACKAGE)
    found = [
        f"{module} imports {name}"
        for module, file in modules.items()
        for name in imports_of(file, modules)
        if layer_of(module) not in HEAVY.get(name.partition(".")[0], {layer_of(module)})
    ]
    assert found == []


def test_data_and_client_run_without_torch_and_xtuner():
    """As in a verl or vLLM environment that has no such package, or another version of it."""
    names = [
        module
        for module in modules_of(PACKAGE)
        if layer_of(module)
        in ("data", "client", "template", "tokenizer", "groups", "files", "options", "errors")
    ]
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(HEAVY)}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import importlib
for name in {names}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def make_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "house" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "house"


def test_an_upward_import_inside_a_function_is_found(tmp_path):
    package = make_package(
        tmp_path,
        {
            "__init__.py": "",
            "top/__init__.py": "",
            "top/a.py": "from house.low import b\n",
            "low/__init__.py": "",
            "low/b.py": "def late():\n    from house.top.a import b\n",
        },
    )
    found = upward_imports(graph_of(package), [["top"], ["low"], [""]])
    assert found == ["house.low.b imports house.top.a"]
    assert circles(graph_of(package)) == [["house.low.b", "house.top.a"]]


def test_layers_of_one_line_do_not_import_each_other(tmp_path):
    files = {"__init__.py": "", "left.py": "import house.right\n", "right.py": ""}
    package = make_package(tmp_path, files)
    assert upward_imports(graph_of(package), [["left", "right"], [""]]) == ["house.left imports house.right"]
    assert upward_imports(graph_of(package), [["left"], ["right"], [""]]) == []
    assert circles(graph_of(package)) == []
