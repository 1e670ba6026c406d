"""The floors of the house: a file imports strictly lower floors, or its own folder; parsed, not run.

`python tests/test_layers.py` draws them into the README.
"""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
# From the top: (what stands there, what it is). A folder is a floor, or shares one with others that it does not import.
FLOORS = (
    ("main prepare visualise attention benchmark convert.__main__", "what a user types: flags, and errors in one line"),
    ("jobs", "one file for each thing a run can be, and what the other commands do"),
    ("assemble", "a section of the config -> a part of a run"),
    ("evaluators convert chips", "what judges; weights in (reading/) and out (writing/); what chips' compilers say"),
    ("figures", "arrays in, a picture out: nobody else draws"),
    ("train", "experiment, state, step, loop, optimiser, schedule"),
    ("runs", "what lies on disk: the workdir, its checkpoints, a saved run"),
    ("objectives", "one file per method, read top to bottom"),
    ("models", "encoder.py (the contract), ViT, Swin, tokenizers, decoders, heads"),
    (
        "masking targets boxes data",
        "what is hidden, what is predicted, objects' boxes, images from disk (TensorFlow is here alone)",
    ),
    (
        "config sections durations recipes paths provenance tree prng sharding platforms clock logs tokens",
        "machinery; recipes.py has sizes and published settings",
    ),
)
LAYER = {part: -i for i, (parts, _) in enumerate(FLOORS) for part in parts.split()}
LOWEST = min(LAYER.values())
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


def test_every_file_has_a_floor():
    unknown = {part_of(f) for f in CODE} - LAYER.keys()
    assert not unknown, f"give {unknown} a floor here, or move it"


@pytest.mark.parametrize("file", CODE, ids=name_of)
def test_imports_only_lower_floors(file):
    own = part_of(file)
    for part, line in own_imports(file):
        assert part in LAYER, f"{name_of(file)}:{line} imports mim_jax.{part}, which has no floor"
        siblings = part == own or LAYER[part] == LAYER[own] == LOWEST
        assert LAYER[part] < LAYER[own] or siblings, f"{name_of(file)}:{line}: {own} imports {part}, which is not below it"


def test_no_two_files_import_each_other_in_a_circle():
    module = lambda f: ".".join(f.relative_to(REPO).with_suffix("").parts)
    known = {module(f) for f in CODE}
    graph = {}
    for file in CODE:
        named = [(m, names) for m, names, *_ in imports(ast.parse(file.read_text())) if m.split(".")[0] == "mim_jax"]
        found = {x for m, names in named for x in (m, *(f"{m}.{name}" for name in names))}
        graph[module(file)] = found & known
    done = set()
    while len(done) < len(graph):
        ready = {name for name in graph if name not in done and graph[name] <= done}
        assert ready, f"these import each other in a circle, or what does: {sorted(set(graph) - done)}"
        done |= ready


def test_no_two_files_share_a_name():
    """So that a file is found by its name alone."""
    stems = [f.stem for f in CODE if f.stem != "__main__"]
    assert not sorted({stem for stem in stems if stems.count(stem) > 1})


def drawn() -> str:
    """The floors as the README shows them."""
    width = max(len(parts) for parts, _ in FLOORS[:-1])
    lines = [f"{parts:<{width}}  {words}" for parts, words in FLOORS[:-1]]
    parts, words = FLOORS[-1]
    return "\n".join(["```", *lines, parts, f"{'':<{width}}  {words}", "```"])


def test_the_readme_draws_the_floors():
    assert drawn() in (REPO / "README.md").read_text(), "python tests/test_layers.py draws them anew"


@pytest.mark.parametrize("file", CODE, ids=name_of)
def test_heavy_packages_stay_where_they_belong(file):
    own = part_of(file)
    for package, line, inside in outer_imports(file):
        where = f"{name_of(file)}:{line} imports {package}"
        if package in ("tensorflow", "tensorflow_datasets", "tensorboard", "apache_beam"):
            assert own == "data", where
        if package == "clu":
            assert own == "logs" and inside, f"{where}; clu is imported in logs.py only, inside functions"
        if package in ("torch", "safetensors"):
            assert own == "convert", where
        if package in ("PIL", "matplotlib"):
            assert own == "figures" or (package, own) == ("PIL", "data"), f"{where}: nobody else draws"


def test_data_is_imported_lazily_outside_data():
    """`mim_jax.data` imports TensorFlow, so nobody imports it at the top of a file."""
    for file in CODE:
        if part_of(file) == "data":
            continue
        for module, names, line, inside in imports(ast.parse(file.read_text())):
            if module.startswith("mim_jax.data") or (module == "mim_jax" and "data" in names):
                assert inside, f"{name_of(file)}:{line} imports mim_jax.data at the top of the file"


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.py")), ids=name_of)
def test_configs_import_config_and_recipes_alone(file):
    modules = {module for module, *_ in imports(ast.parse(file.read_text()))}
    allowed = {"mim_jax.config", "mim_jax.recipes"}
    assert modules <= allowed, f"{name_of(file)} imports {modules - allowed}"


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
from mim_jax.assemble.methods import objective
from mim_jax.config import load
from mim_jax.jobs.pretrain import Pretrain
from mim_jax.sections import read
objective(read(Pretrain, load("configs/lomar_vitb.py:toy")))
print("loaded", sorted(set({heavy!r}) & set(sys.modules)))
"""


@pytest.mark.parametrize("module", ["mim_jax.jobs.run", "mim_jax.benchmark"])
def test_compute_needs_no_tensorflow(module, run_python):
    done = run_python(BLOCKED.format(heavy=HEAVY, module=module))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[0] == "loaded []"


def test_a_start_imports_no_compiler_of_pixels(run_python):
    """numba and pyarrow take 140 MB of each process of a start: whoever needs them imports them then."""
    script = "import sys, mim_jax.data.sources, mim_jax.runs.same_data; print(sorted({'numba', 'pyarrow'} & set(sys.modules)))"
    done = run_python(script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[0] == "[]"


if __name__ == "__main__":
    page = REPO / "README.md"
    before, rest = page.read_text().split("## Map of the code\n")
    section, after = rest.split("\n## ", 1)
    first, last = section.index("```"), section.rindex("```") + 3
    page.write_text(f"{before}## Map of the code\n{section[:first]}{drawn()}{section[last:]}\n## {after}")
