"""Layers, rooms and the arrows between them; docs/architecture.md says what each is for."""

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
        *("maskft_common/errors", "maskft_common/layout", "maskft_common/files", "maskft_common/schema"),
        *("maskft_common/yaml_file", "maskft_common/command_line", "maskft_common/method_options"),
        "maskft_common/value_check",
        *("maskft/gguf", "maskft/embedded", "maskft/models", "maskft/weights"),
        # The plain tuner, and the add-ons over it; none of them is needed by the tuner.
        *("maskft/masking", "maskft/tuner", "maskft/masks", "maskft/fast", "maskft/fsdp", "maskft/learners"),
        *("maskft/quant", "maskft/baselines", "maskft/axolotl"),
    ],
    "training": [
        *("maskft_common/processes", "maskft_common/locks", "maskft_common/memory", "maskft_common/environment"),
        *(
            "maskft_common/progress_bar",
            "maskft_common/quiet",
            "maskft_common/time_limit",
            "maskft/data",
            "maskft/loss",
            "maskft/training",
        ),
    ],
    "lab": [
        f"maskft_lab/{room}"
        for room in ("store results sandbox generation evaluation analysis report estimate study ready cli".split())
    ],
}
ROOMS = [room for layer in LAYERS.values() for room in layer]
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
# Commands that only read files start without torch.
WITHOUT_TORCH = [room for room in ROOMS if room.startswith("maskft_common/")] + ["maskft_lab/results"]


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


def test_every_module_is_in_a_room():
    own = {SOURCE / package / name for package in ("maskft", "maskft_common", "maskft_lab") for name in OF_PACKAGES}
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
    files = [SOURCE / package / name for package in ("maskft_common", "maskft") for name in OF_PACKAGES]
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


def test_the_plain_tuner_has_four_floors_and_needs_no_add_on():
    files = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in files_of("maskft/tuner")}
    files.pop("maskft.tuner.__init__")

    def floor(module):
        below = {*imports_of(files[module], of_types=False)} & files.keys() - {module}
        return 1 + max(map(floor, below), default=0)

    assert {module: floor(module) for module in files if floor(module) > 4} == {}
    rooms = {room_of(module) for file in files.values() for module in imports_of(file)} - {None}
    assert rooms <= {"maskft/tuner", "maskft/masking", *(room for room in ROOMS if room.startswith("maskft_common/"))}


def test_a_study_has_six_floors():
    """The highest runs the study; below it are the checks of a plan, the plan, and what a plan is made of."""
    files = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in files_of("maskft_lab/study")}

    def floor(module):
        below = set(imports_of(files[module])) & files.keys() - {module}
        return 1 + max(map(floor, below), default=0)

    assert {module: floor(module) for module in files if floor(module) > 6} == {}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_starts_without_torch_imports_none_of_what_brings_it(room):
    brings = ("torch", "transformers", "peft", "maskft.")
    wrong = set()
    for file in files_of(room):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # not inside functions
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong |= {f"{file.name} imports {name}" for name in names if f"{name}.".startswith(brings)}
    assert not wrong


def test_every_room_says_what_it_is_for():
    for room in SOURCE.glob("*/*/__init__.py"):
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), room
