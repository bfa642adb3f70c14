"""Layers, rooms, the arrows between them, and the lines each may have; docs/architecture.md says what each is for."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
# A layer may import from the layers before it; a room from the rooms before it and from itself. Files that are no room
# of their own: what a package offers (__init__), and the files beside its rooms.
LAYERS = {
    "method": [
        *("maskft_base/errors", "maskft_base/files", "maskft/embedded", "maskft/models", "maskft/masking"),
        *("maskft/tuner", "maskft/adapter"),
    ],
    "training": "maskft_base/runtime maskft/data maskft/loss maskft/training".split(),
    "lab": [
        f"maskft_lab/{room}"
        for room in ("store results sandbox generation evaluation analysis report estimate study ready cli".split())
    ],
}
ROOMS = [room for layer in LAYERS.values() for room in layer]
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
# What there is, rounded up: these numbers fall, and where mends make one rise docs/LOG.md says so.
MAX_LINES = {"method": 4_460, "training": 4_820, "lab": 12_500}
MAX_ALL, MAX_TESTS = 21_780, 17_160
# Drawn with, and measured by, what only some commands need; never by a module of these rooms.
WITHOUT = {"maskft_base/errors": "torch", "maskft_base/files": "torch", "maskft_lab/results": "torch"}


def room_of(module):
    """The room of ``maskft_lab.study.plan``; that of a package's own files is the layer's first that it belongs to."""
    parts = module.split(".")
    return next((room for room in ROOMS if room.split("/") == parts[:2]), None)


def imports_of(file, of_types=True):
    """Modules that a file imports, wherever in it: absolute names, each as the deepest module that exists.

    Args:
        file: The file.
        of_types: Also those that only annotations need, which no program runs.
    """
    package, tree = list(file.relative_to(SOURCE).parts[:-1]), ast.parse(file.read_text(encoding="utf-8"))
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unrun = {id(node) for guard in guards for node in ast.walk(guard) if not of_types}
    for node in [node for node in ast.walk(tree) if id(node) not in unrun]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                below = SOURCE.joinpath(*parts, alias.name)
                yield ".".join([*parts, alias.name] if below.is_dir() or below.with_suffix(".py").is_file() else parts)


def files_of(room):
    place = SOURCE / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def lines_of(files):
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_every_module_is_in_a_room():
    own = {SOURCE / package / name for package in ("maskft", "maskft_base", "maskft_lab") for name in OF_PACKAGES}
    roomless = set(SOURCE.rglob("*.py")) - {file for room in ROOMS for file in files_of(room)} - own
    assert not [file for file in roomless if "recipes" not in file.parts]


OF_PACKAGES = ("__init__.py", "__main__.py")


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_points_upward(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    wrong = {
        f"{file.relative_to(SOURCE)} imports {module}"
        for file in files_of(room)
        for module in imports_of(file)
        if room_of(module) not in {None, *allowed}
    }
    assert not wrong


def test_a_package_s_own_files_import_nothing_of_a_layer_above():
    """But ``python -m maskft``, which is the command, of whatever layers are installed."""
    files = [SOURCE / package / name for package in ("maskft_base", "maskft") for name in OF_PACKAGES]
    above = {
        f"{file.relative_to(SOURCE)} imports {module}"
        for file in files
        if file.is_file()
        for module in imports_of(file)
        if room_of(module) in {*LAYERS["training"], *LAYERS["lab"]} or module.startswith("maskft_lab")
    }
    assert above == {"maskft/__main__.py imports maskft_lab.cli.main"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_has_a_circle_of_imports(room):
    """Also none that an import inside a function would hide; graphlib raises CycleError and names the modules."""
    modules = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in files_of(room)}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    TopologicalSorter(
        {name: {*imports_of(file, of_types=False)} & modules.keys() - {name} for name, file in modules.items()}
    ).prepare()


@pytest.mark.parametrize("room", WITHOUT)
def test_what_starts_without_torch_imports_none_of_what_brings_it(room):
    brings = ("torch", "transformers", "peft", "maskft.")
    wrong = set()
    for file in files_of(room):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # not inside functions
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong |= {f"{file.name} imports {name}" for name in names if f"{name}.".startswith(brings)}
    assert not wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_no_more_lines_than_it_may(layer):
    packages = {"method": ("maskft", "maskft_base"), "lab": ("maskft_lab",)}.get(layer, ())
    files = [SOURCE / package / name for package in packages for name in OF_PACKAGES]
    files += [file for room in LAYERS[layer] for file in files_of(room)]
    assert lines_of(file for file in files if file.is_file()) <= MAX_LINES[layer]


def test_the_whole_has_no_more_lines_than_it_may():
    assert lines_of(SOURCE.rglob("*.py")) <= MAX_ALL
    assert lines_of((ROOT / "tests").rglob("*.py")) <= MAX_TESTS


def test_the_main_path_stays_short():
    """The four files that docs/architecture.md tells to read first, and the functions that make a run."""
    files = ["maskft/masking.py", "maskft/tuner/layer.py", "maskft/training/train.py", "maskft_lab/cli/train.py"]
    assert lines_of(SOURCE / file for file in files) <= 600
    tree = ast.parse((SOURCE / "maskft/training/train.py").read_text())
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert lengths["train"] <= 45 and lengths["run"] <= 45


def test_every_room_says_what_it_is_for():
    for room in SOURCE.glob("*/*/__init__.py"):
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), room
