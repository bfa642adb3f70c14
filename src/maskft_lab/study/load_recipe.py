"""Reading a recipe: the YAML file, the controls it asks for, and the files it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskft.data.arguments import DATA_NAMES, KL_DATA, TEMPLATE
from maskft.data.mixtures import rename_sets
from maskft_common.errors import UserError
from maskft_common.files import expand_user, is_there
from maskft_common.layout import DATA_FILE_ENDINGS
from maskft_common.schema import read_model
from maskft_common.yaml_file import read_yaml

from .controls import with_standard_controls
from .option_types import check_option_types
from .recipe import CURRENT_RATE, REVISION, Options, Recipe

# Options of an evaluation that also hold for each set of earlier abilities, unless it has its own: of all tasks, of
# benchmarks, and of held-out rows.
HOW = frozenset(
    {
        "model_revision",
        "chat_template_path",
        "dtype",
        "bf16",
        "device",
        "batch_size",
    }
)
HOW_OF_BENCHMARKS = frozenset(
    {
        "apply_chat_template",
        "allow_unconfined_code",
        "include_path",
        "data_dir",
    }
)
HOW_OF_HELDOUT = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "no_generate",
        "dataset_text_field",
    }
)


def load_recipe(file: str | Path, data_dir: str | Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        file: The YAML file.
        data_dir: Folder in which data files that the recipe names without a folder are looked for.

    Raises:
        UserError: The first mistake, in one line.
    """
    return parse_recipe(read_yaml(file), data_dir, file)


def parse_recipe(
    content: Any,
    data_dir: str | Path | None = None,
    source: str | Path = "study",
) -> Recipe:
    """Build a :class:`Recipe` from the content of the YAML; see :func:`load_recipe`.

    Args:
        content: The YAML's value.
        data_dir: Folder in which data files are looked for.
        source: The file. Names the study where the recipe does not; a relative ``chat_template_path`` anywhere counts
            from it.
    """
    source = Path(source)
    check_option_types(content, source, {"learning_rate": CURRENT_RATE})
    if isinstance(content, dict):
        # A name in the recipe wins.
        content = {"name": source.stem, **content}

    # Controls are added to the plain content, before pydantic checks all methods in one pass.
    try:
        content = _with_controls(content)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None

    recipe = read_model(Recipe, content, source)

    # Files that `train`, the training sets and the methods name.
    kl_data = _kl_data_in(data_dir, recipe.train)
    train = recipe.train | kl_data | _template_of(recipe.train, source)

    data = {}
    for name, part in recipe.data.items():
        options = in_data_dir(part.options, data_dir) | _template_of(part.options, source)
        # Options are extra fields of the model (`extra="allow"`), which `model_copy` updates like declared ones.
        data[name] = part.model_copy(update=options)

    methods = {}
    for name, method in recipe.methods.items():
        options = _kl_data_in(data_dir, method.options) | _template_of(method.options, source)
        methods[name] = method.model_copy(update=options)

    # Files that evaluations name.
    evaluation = recipe.evaluation | _template_of(recipe.evaluation, source)
    has_rows_or_tasks = "tasks" in evaluation or any(name in evaluation for name in DATA_NAMES)
    # in_data_dir adds data_dir, which only rows and tasks read.
    if has_rows_or_tasks:
        evaluation = in_data_dir(evaluation, data_dir)
    # The pre-trained model is evaluated with the template and revision of training too, so that all rows of the table
    # answer the same prompts.
    shared = {}
    for key in (TEMPLATE, REVISION):
        if key in train:
            shared[key] = train[key]
    evaluation = shared | evaluation  # the evaluation's own win

    # Not read by pydantic again: `model_copy` takes the values as they are.
    update = {
        "train": train,
        "data": data,
        "methods": methods,
        "evaluation": evaluation,
        "before": _completed(recipe.before, evaluation, data_dir, source),
    }
    if recipe.path:
        before = _completed(recipe.path.before, evaluation, data_dir, source)
        path = recipe.path.model_copy(update={"before": before})
        update["path"] = path
    return recipe.model_copy(update=update)


def _with_controls(content: Any) -> Any:
    """The content with the methods that ``controls`` asks for; anything of a wrong type is left to pydantic."""
    if not isinstance(content, dict):
        return content
    controls = content.get("controls")
    methods = content.get("methods")
    names_masks = isinstance(controls, list)
    is_asked_for = names_masks or controls == "standard"
    if not is_asked_for or not isinstance(methods, dict | None):
        return content

    masks = controls if names_masks else None  # None: all learned masks
    # The controls depend on the options of all masks, and a grid may vary the length of one.
    train = _section(content, "train")
    grid = _section(content, "grid")
    methods = with_standard_controls(methods or {}, train, masks, grid)
    return content | {"methods": methods}


def _section(content: dict, name: str) -> dict:
    """A section of the file; empty if it is missing or of a wrong type."""
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _template_of(options: Options, source: Path) -> Options:
    """Only ``chat_template_path``, with relative names counted from the recipe; empty if the options name none."""
    name = options.get(TEMPLATE)
    if name is None:
        return {}
    named = expand_user(str(name))
    template = source.parent / named  # `named` itself if it is absolute
    if not template.is_file():
        raise UserError(f"{source}: {TEMPLATE} {str(template)!r} does not exist; relative names count from the recipe")
    return {TEMPLATE: str(template)}


def _completed(
    sets: dict[str, Options],
    evaluation: Options,
    data_dir: str | Path | None,
    source: Path,
) -> dict[str, Options]:
    """Sets of earlier abilities with the options they share with ``evaluation``.

    Args:
        sets: Name of a set -> its own options.
        evaluation: Options of the study's evaluation.
        data_dir: Folder in which data files are looked for.
        source: The recipe's file.
    """
    how = {}
    how_of_benchmarks = {}
    how_of_heldout = {}
    for key, value in evaluation.items():
        if key in HOW:
            how[key] = value
        elif key in HOW_OF_BENCHMARKS:
            how_of_benchmarks[key] = value
        elif key in HOW_OF_HELDOUT:
            how_of_heldout[key] = value

    completed = {}
    for name, options in sets.items():
        # A set of rows takes the options of held-out rows too; benchmarks know nothing of them.
        shared = dict(how)
        tasks = options.get("tasks") or ["heldout"]  # without tasks, a set is of rows
        if "heldout" in tasks:
            shared |= how_of_heldout
        if any(task != "heldout" for task in tasks):
            shared |= how_of_benchmarks
        own = in_data_dir(options, data_dir) | _template_of(options, source)
        completed[name] = shared | own
    return completed


def _kl_data_in(data_dir: str | Path | None, options: Options) -> Options:
    """Only ``kl_dataset_name``, with its files found; empty if the options have none."""
    # Without `data_dir`, which is an option of the training set.
    if KL_DATA not in options:
        return {}
    found = in_data_dir({KL_DATA: options[KL_DATA]}, data_dir)
    return {KL_DATA: found[KL_DATA]}


def in_data_dir(options: Options, data_dir: str | Path | None) -> Options:
    """Options with ``data_dir``; names of files that do not exist here become those of the same name in it."""
    if data_dir is None:
        return options

    def found(name: str) -> str:
        # Other names are those of hub data sets. A file in the working directory comes before one in data_dir.
        is_file_name = name.lower().endswith(DATA_FILE_ENDINGS)
        if not is_file_name or is_there(name):
            return name

        file = expand_user(data_dir) / name
        if not file.is_file():
            raise UserError(f"data file {name!r} is neither here nor in data_dir {str(data_dir)!r}")
        return str(file)

    # A mixture names several sets, each with its share.
    renamed = dict(options)
    for key in (*DATA_NAMES, KL_DATA):
        mixture = options.get(key)
        if isinstance(mixture, str):
            renamed[key] = rename_sets(mixture, found)
    return renamed | {"data_dir": str(data_dir)}
