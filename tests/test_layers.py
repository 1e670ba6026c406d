"""The layers of the design: a file imports strictly lower layers, or its own package; parsed, not run."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
LAYERS = {
    0: "config tree durations prng sharding clock logs tokens provenance",
    1: "masking targets data",
    2: "models",
    3: "objectives",
    4: "train",
    5: "evaluators convert",
    6: "build supervised transfer evaluation",
    7: "run probe features evaluate costs",
    8: "main benchmark visualise attention convert.__main__",
}
LAYER = {part: number for number, parts in LAYERS.items() for part in parts.split()}
SAME_LAYER = {
    ("run", "probe"),
    ("run", "features"),
    ("run", "evaluate"),
    ("evaluation", "build"),
    ("supervised", "build"),
    ("transfer", "build"),
}  # besides layer 0, whose files may import each other
HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections")
FILES = sorted((REPO / "mim_jax").rglob("*.py"))
CODE = [f for f in FILES if f.name != "__init__.py"]


def name_of(file):
    return str(file.relative_to(REPO))


def part_of(file):
    """The layer's word for a file: its package, or its own name where it lies at the top, or is an entry point."""
    parts = file.relative_to(REPO / "mim_jax").with_suffix("").parts
    return ".".join(parts) if parts[-1] == "__main__" else parts[0]


def imports(tree):
    """-> [(dotted module, names, line, whether inside a function)] of every import, relative ones included."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, (), node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.append((module, tuple(alias.name for alias in node.names), node.lineno, inside))
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def own_imports(file):
    """-> [(part of mim_jax, line)]."""
    found = []
    for module, names, line, _ in imports(ast.parse(file.read_text())):
        assert not module.startswith("."), f"{name_of(file)}:{line} has a relative import"
        words = module.split(".")
        if words[0] == "mim_jax":
            found += [(words[1], line)] if len(words) > 1 else [(name, line) for name in names]
    return found


def outer_imports(file):
    """-> [(top package, line, whether inside a function)]."""
    return [(m.split(".")[0], line, inside) for m, _, line, inside in imports(ast.parse(file.read_text()))]


def test_every_file_has_a_layer():
    unknown = {part_of(f) for f in CODE} - LAYER.keys()
    assert not unknown, f"give {unknown} a layer here and in the README, or move it"


@pytest.mark.parametrize("file", CODE, ids=name_of)
def test_imports_only_lower_layers(file):
    own = part_of(file)
    for part, line in own_imports(file):
        assert part in LAYER, f"{name_of(file)}:{line} imports mim_jax.{part}, which has no layer"
        lower = LAYER[part] < LAYER[own]
        siblings = part == own or LAYER[part] == LAYER[own] == 0 or (own, part) in SAME_LAYER
        assert lower or siblings, f"{name_of(file)}:{line}: {own} (layer {LAYER[own]}) imports {part} (layer {LAYER[part]})"


def test_layer_zero_has_no_cycle():
    graph = {part_of(f): {p for p, _ in own_imports(f)} for f in CODE if LAYER[part_of(f)] == 0}
    done = set()
    while len(done) < len(graph):
        ready = {part for part in graph if part not in done and graph[part] <= done}
        assert ready, f"these import each other in a circle: {set(graph) - done}"
        done |= ready


@pytest.mark.parametrize("file", CODE, ids=name_of)
def test_heavy_packages_stay_where_they_belong(file):
    own = part_of(file)
    for package, line, inside in outer_imports(file):
        where = f"{name_of(file)}:{line} imports {package}"
        if package in ("tensorflow", "tensorflow_datasets", "tensorboard"):
            assert own == "data", where
        if package == "clu":
            assert own == "logs" and inside, f"{where}; clu is imported in logs.py only, inside functions"
        if package in ("torch", "safetensors"):
            assert own == "convert", where


def test_data_is_imported_lazily_outside_data():
    """`mim_jax.data` imports TensorFlow, so nobody imports it at the top of a file."""
    for file in CODE:
        if part_of(file) == "data":
            continue
        for module, names, line, inside in imports(ast.parse(file.read_text())):
            if module.startswith("mim_jax.data") or (module == "mim_jax" and "data" in names):
                assert inside, f"{name_of(file)}:{line} imports mim_jax.data at the top of the file"


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.py")), ids=name_of)
def test_configs_import_nothing_but_config(file):
    modules = {module for module, *_ in imports(ast.parse(file.read_text()))}
    assert modules <= {"mim_jax.config"}, f"{name_of(file)} imports {modules - {'mim_jax.config'}}"


def test_files_are_short_and_well_named():
    long = {name_of(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 300}
    assert not long, f"above 300 lines: {long}"
    vague = [name_of(f) for f in FILES if f.stem in ("utils", "util", "misc", "common", "helpers")]
    assert not vague, f"say what is in them: {vague}"


def test_init_files_are_there_and_empty():
    folders = {f.parent for f in CODE}
    missing = [name_of(folder / "__init__.py") for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing
    assert not [name_of(f) for f in FILES if f.name == "__init__.py" and f.read_bytes()]


# A finder that refuses, as on a machine without the packages; sys.modules[name] = None would mislead einops, which
# asks sys.modules whether TensorFlow is there.
BLOCKED = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent)
import {module}
from mim_jax import build
from mim_jax.config import load
build.objective(load("configs/lomar_vitb.py:toy"))
print("loaded", sorted(set({heavy!r}) & set(sys.modules)))
"""


@pytest.mark.parametrize("module", ["mim_jax.build", "mim_jax.benchmark", "mim_jax.run"])
def test_compute_needs_no_tensorflow(module, run_python):
    file = REPO / (module.replace(".", "/") + ".py")
    if not file.exists():
        pytest.skip(f"{name_of(file)} is not there yet")
    done = run_python(BLOCKED.format(heavy=HEAVY, module=module))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[0] == "loaded []"
