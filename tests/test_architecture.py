"""The rooms of the package and the arrows between them; docs/architecture.md says what each is for."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "maskft"
ROOT_FILES = {"__init__", "_version", "errors", "files", "masking", "models", "runtime"}
# A room may import from the rooms before it, from its own files and from the root.
ROOMS = (
    "tuner",
    "results",
    "adapter",
    "data",
    "sandbox",
    "generation",
    "evaluation",
    "training",
    "integrations",
    "analysis",
    "report",
    "estimate",
    "study",
    "cli",
)


def room_of(parts: tuple[str, ...]) -> str | None:
    """Name of the room of a module, None for a file of the root."""
    return parts[0] if len(parts) > 1 or (parts[:1] and (SOURCE / parts[0]).is_dir()) else None


def imports(file: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, as paths from the package's root."""
    package = file.relative_to(SOURCE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            found |= {tuple(part for part in (*base, name.name) if part) for name in node.names}
    return found


def test_the_root_and_the_rooms_are_those_of_the_plan():
    assert {file.stem for file in SOURCE.glob("*.py")} == ROOT_FILES
    folders = {folder.name for folder in SOURCE.iterdir() if (folder / "__init__.py").exists()}
    assert folders <= set(ROOMS)


def test_arrows_point_down():
    back = set()
    for file in SOURCE.rglob("*.py"):
        here = room_of(file.relative_to(SOURCE).with_suffix("").parts)
        for target in imports(file):
            there = room_of(target)
            if there not in ROOMS or there == here:
                continue
            if (here is None and file.stem != "__init__") or (here and ROOMS.index(there) > ROOMS.index(here)):
                back.add(f"{file.relative_to(SOURCE)} -> {there}")
    assert back == set()


def test_the_main_path_stays_short():
    """The four files that docs/architecture.md tells to read first, and the functions that make a run."""
    files = ["masking.py", "tuner/layer.py", "training/train.py", "cli/train.py"]
    assert sum(len((SOURCE / file).read_text().splitlines()) for file in files) <= 600
    tree = ast.parse((SOURCE / "training/train.py").read_text())
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert lengths["train"] <= 45 and lengths["run"] <= 45


def test_every_room_says_what_it_is_for():
    for room in SOURCE.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), room
