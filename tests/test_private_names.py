"""Private names of dependencies: each that is used stands in docs/reliability.md, with what replaces it."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("maskft_common", "maskft", "maskft_lab")
NOISE = ("_abc_", "_member", "_value", "_new_member", "_unhashable", "_generate_next", "_use_args", "_is_protocol")
# Keys and suffixes of our own that look like names; of autograd functions, whose backward torch makes.
OURS = {
    *("_acc", "_each", "_implementation", "_is_better", "_num_tokens", "_loss", "_output", "_proj", "_stderr"),
    *("_backward_cls", "_file", "_kl", "_kl_whole", "_model_name_or_path", "_part", "_token_id"),
}
DOCUMENTED = {"_replace", "_exit"}  # of named tuples, of os: public in spite of the underscore


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def used_in(trees):
    """Private names that are imported from, or looked up in, what is not ours."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    own = {part.name for each in classes for part in each.body if isinstance(part, ast.FunctionDef)}
    own |= {part.target.id for each in classes for part in each.body if isinstance(part, ast.AnnAssign)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if ast.unparse(node) == f"self.{node.attr}" and _is_set(node)}
    found = {node.attr for node in attributes} - own
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {part for name in node.names for part in (*node.module.split("."), name.name)}
        elif isinstance(node, ast.Import):
            found |= {part for name in node.names for part in name.name.split(".")}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z]\w+", str(node.value)):
            found.add(node.value)  # getattr, setattr, mock.patch
    return {name for name in found if is_private(name)} - DOCUMENTED


def _is_set(node):
    return isinstance(node.ctx, ast.Store)


def overridden():
    """Private methods of dependencies that our classes put their own in the place of."""
    found = set()
    packages = ((name, importlib.import_module(name).__path__) for name in PACKAGES)
    for module in (found for name, path in packages for found in pkgutil.walk_packages(path, f"{name}.")):
        # The first three override nothing of others; the last needs a host that is not installed.
        if any(part in module.name for part in (".cli.", ".sandbox.", "__main__", "maskft.axolotl")):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__ == module.name:
                # Of all that it inherits: a mixin of ours meets their class in a third.
                mine, theirs = set(), set()
                for base in kind.__mro__:
                    (mine if base.__module__.startswith("maskft") else theirs).update(filter(is_private, vars(base)))
                found |= mine & theirs
    return {name for name in found if not name.startswith(NOISE)}


def test_every_private_name_of_a_dependency_is_listed_with_what_replaces_it():
    text = (ROOT / "docs" / "reliability.md").read_text().partition("## Private names of dependencies")[2]
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(_\w+)`", row.split("|")[1])}
    trees = [ast.parse(file.read_text()) for name in PACKAGES for file in (ROOT / "src" / name).rglob("*.py")]
    used = (used_in(trees) | overridden()) - OURS
    assert sorted(used - listed) == [], "used and not listed"
    assert sorted(listed - used) == [], "listed and not used"
    assert all(row.count("|") == 5 and row.split("|")[4].strip() for row in rows)
