"""The rooms of the package and the arrows between them; docs/architecture.md says what each is for."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src"
SOURCE = ROOT / "maskft"
# A layer may import from the layers before it; a room from the rooms before it, from its own files and from the roots.
LAYERS = {
    "maskft_base": ("errors", "files", "runtime"),
    "maskft": ("tuner", "adapter", "data", "training"),
    "maskft_lab": (
        "results",
        "sandbox",
        "generation",
        "evaluation",
        "analysis",
        "report",
        "estimate",
        "study",
        "cli",
    ),
}


def test_the_main_path_stays_short():
    """The four files that docs/architecture.md tells to read first, and the functions that make a run."""
    files = ["masking.py", "tuner/layer.py", "training/train.py", "../maskft_lab/cli/train.py"]
    assert sum(len((SOURCE / file).read_text().splitlines()) for file in files) <= 600
    tree = ast.parse((SOURCE / "training/train.py").read_text())
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert lengths["train"] <= 45 and lengths["run"] <= 45


def test_every_room_says_what_it_is_for():
    for room in ROOT.glob("*/*/__init__.py"):
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), room
