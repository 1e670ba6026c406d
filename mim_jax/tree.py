"""Parameter trees as {path: leaf}: names, sizes, rules by regular expression, comparison with a checkpoint."""

import re

import jax
import numpy as np


def path_name(path) -> str:
    """A key path of jax.tree_util -> `encoder/block_07/attn/qkv/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree) -> dict:
    """{path: leaf} in the order of the tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(fn, tree):
    """Maps `fn(path, leaf)` over the tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), tree)


def nest(flat: dict) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def count(tree) -> int:
    """The number of scalars in the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def matches(patterns, path: str) -> bool:
    """Whether any of the regular expressions is found in the path."""
    return any(re.search(pattern, path) for pattern in patterns)


def shape_conflicts(wanted, found) -> dict[str, list[str]]:
    """Compares two trees by path and shape -> {"missing", "unexpected", "shape"}: lists of readable lines."""
    wanted, found = flatten(wanted), flatten(found)
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "shape": [
            f"{path}: checkpoint {tuple(found[path].shape)}, model {tuple(wanted[path].shape)}"
            for path in wanted
            if path in found and tuple(wanted[path].shape) != tuple(found[path].shape)
        ],
    }


def overview(params) -> str:
    """One line per parameter: path, shape, number of scalars; and the total."""
    rows = [f"  {path:<56} {leaf.shape!s:<22} {int(np.prod(leaf.shape)):>12,}" for path, leaf in flatten(params).items()]
    return "\n".join(rows + [f"  {'total':<56} {'':<22} {count(params):>12,}"])
