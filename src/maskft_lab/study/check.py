"""Checking a recipe before anything runs: every option goes through the parser of the command it is for."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from transformers.trainer_utils import SaveStrategy

from maskft.data.arguments import DATA_FIELDS, KL_DATA, DataArguments, check_sizes
from maskft.data.mixtures import hub_ids, load_examples, parse_mixture
from maskft.data.sources import local_file, split_of
from maskft.data.splits import Splits, load_splits, question_digest
from maskft.training.arguments import TrainConfig
from maskft.training.checks import check_options, check_size
from maskft.training.launch import config_processes
from maskft.training.method_arguments import FIXED_MASK_METHODS, INTERPOLATE, mask_config
from maskft_common.errors import UserError, did_you_mean

from ..evaluation import command_line as evaluate
from .evaluate import evaluation_words
from .identity import options_identity, short_digest
from .path import has_path, heldout_options
from .plan import Plan, build_plan
from .recipe import PRETRAINED, Method, Options, Recipe
from .run_options import SEEDS, options_but_seeds, parsed_run
from .study_run import StudyRun

# Options of `maskft evaluate` that the study itself sets.
_OF_THE_STUDY = {
    "models",
    "model_name_or_path",
    "adapter",
    "change",
    "scale",
    "name",
    "seed",
    "output_dir",
    "overwrite",
    "help",
}
# Keys of `evaluation` that are no options; the recipe has them apart.
_OWN_KEYS = ("heldout", "before")
# Options without which the parser of `maskft evaluate` would complain. With a path, the study names a change too.
_PLACE_HOLDERS = ("--output_dir", "any", "--model_name_or_path", "any")
_CHANGE = ("--change", "none")
_OF_PATH = "path.before."  # begins the name of a section

# Options that decide which rows a run reads, and how.
_OF_ROWS = (*DATA_FIELDS, "dataset_text_field")
# Options that decide which rows the KL term reads.
_OF_KL_ROWS = (KL_DATA, "as_chat", "dataset_text_field", "data_dir", "split_seed")
# Options that decide whether held-out rows choose a checkpoint.
_OF_CHECKPOINTS = ("load_best_model_at_end", "eval_strategy")


def checked_plan(recipe: Recipe) -> Plan:
    """Expand a recipe, and check every option of every run and evaluation.

    Raises:
        UserError: The first mistake.
    """
    recipe = _with_num_processes(recipe)
    plan = build_plan(recipe)

    # Runs that differ in their seeds alone are checked once: parsing takes a while.
    seen: set[tuple] = set()
    for run in plan.runs:
        if run.method.method == PRETRAINED:  # it has no options
            continue
        wrong_seeds = [(name, repr(run.options.get(name))) for name in SEEDS if not _is_seed(run.options.get(name, 0))]
        key = (options_but_seeds(run), *wrong_seeds)
        if key not in seen:
            _check_run(run, recipe)
        seen.add(key)

    _evaluation_args(recipe)
    _check_path_rows(plan)
    return plan


def _is_seed(value: Any) -> bool:
    """Whether the value of an option is a valid seed."""
    return type(value) is int and value >= 0


def _with_num_processes(recipe: Recipe) -> Recipe:
    """The recipe with the number of processes of its accelerate configuration: it is part of a run's name."""
    launch = recipe.launch
    if not launch.accelerate_config or launch.num_processes:
        return recipe
    num_processes = config_processes(launch.accelerate_config)
    launch = launch.model_copy(update={"num_processes": num_processes})
    return recipe.model_copy(update={"launch": launch})


def _check_run(run: StudyRun, recipe: Recipe) -> None:
    """Make every check of ``maskft train`` that needs no data and no model, and holds on any machine."""
    # An error names the run, so that the line of the recipe is found.
    try:
        parsed = parsed_run(run)
        check_options(parsed)
        check_sizes(parsed.data)
        if recipe.path:
            _check_checkpoints(recipe.path.checkpoints, parsed.training)
        if run.method.method in FIXED_MASK_METHODS:
            check_size(run.method.method, mask_config(parsed.mask))
    except UserError as error:
        raise UserError(f"run {run.title!r}: {error}") from None


def _check_checkpoints(shares: Iterable[float], training) -> None:
    """Check that a checkpoint is saved at every share of training."""
    strategy = SaveStrategy(training.save_strategy)
    if strategy in (SaveStrategy.NO, SaveStrategy.BEST):
        raise UserError(
            f"a path needs the checkpoints of path.checkpoints, which save_strategy {strategy.value!r} does not save; "
            "set save_strategy to steps or epoch"
        )
    if strategy == SaveStrategy.EPOCH:
        _check_epochs(shares, training)
        return
    interval = training.save_steps
    if training.max_steps > 0:
        saved = [training.max_steps]  # always; with save_steps 0 nothing else
        if 0 < interval < 1:
            interval = math.ceil(interval * training.max_steps)  # as transformers rounds it
        if interval:
            saved += range(int(interval), training.max_steps, int(interval))
        for share in shares:
            step = share * training.max_steps
            nearest = min(saved, key=partial(_distance, step))
            # Nearer than one step, as the path looks for it.
            if _distance(step, nearest) >= 1:
                raise UserError(
                    f"path.checkpoints has {share:g}, which must be a multiple of save_steps: of "
                    f"{training.max_steps} steps, {nearest} is the nearest that is saved"
                )
        return

    # Without max_steps, the number of steps is known only with the data; shares can be compared with a share.
    if not 0 < interval < 1:
        return
    for share in shares:
        if share == 1:
            continue  # the last step is always saved
        num_intervals = share / interval
        is_multiple = abs(num_intervals - round(num_intervals)) <= 1e-6  # 0.3 / 0.1 is 2.9999999999999996
        if not is_multiple:
            raise UserError(f"path.checkpoints has {share:g}, which must be a multiple of save_steps")


def _check_epochs(shares: Iterable[float], training) -> None:
    """Check that an epoch ends at every share of training."""
    # With max_steps the number of epochs is known only with the data.
    if training.max_steps > 0:
        return
    for share in shares:
        if share == 1:
            continue  # the last step is always saved
        num_epochs = share * training.num_train_epochs
        is_whole = abs(num_epochs - round(num_epochs)) <= 1e-6  # a third of 3 is not exactly 1
        if not is_whole:
            raise UserError(
                f"path.checkpoints has {share:g}, but save_strategy epoch saves at the end of each of "
                f"{training.num_train_epochs:g} epochs; give a share at which one ends, or set save_strategy to steps"
            )


def _distance(step: float, saved: int) -> float:
    return abs(saved - step)


def _check_path_rows(plan: Plan) -> None:
    """Check that the model before training is measured on the held-out rows of every run."""
    first_runs: dict[str, str] = {}  # digest of the rows' options -> the first run with them
    for run in plan.runs:
        if has_path(plan.recipe, run):
            options = heldout_options(plan.recipe, run)
            identity = options_identity(options)
            digest = short_digest(identity)
            first_runs.setdefault(digest, run.title)

    # The base model is measured once, and the gain of every method is a difference from that measurement.
    if len(first_runs) > 1:
        first, second, *_ = first_runs.values()
        raise UserError(
            f"path: {first!r} and {second!r} have different held-out rows; give all methods the first of data, "
            f"{plan.recipe.first_data!r}, and options of its rows there or in train"
        )


# Checks that read the data


def check_before_running(plan: Plan) -> list[str]:
    """Check tasks and data, and that nothing is chosen on rows that are reported on.

    Returns:
        Notes for the reader of the table: of rows that are trained and reported on.
    """
    sets = _evaluation_args(plan.recipe)
    rows = {}  # section -> its rows
    try:
        for where, args in sets.items():
            rows[where] = evaluate.check_inputs(args)
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None

    # Section -> the prompts that the study reports on; rows of a path only choose.
    prompts: dict[str, set[str]] = {}
    for where, rows_there in rows.items():
        if not where.startswith(_OF_PATH):
            prompts[where] = {question_digest(row) for row in rows_there}
    reported: set[str] = set()
    for prompts_there in prompts.values():
        reported |= prompts_there

    # Training and tuning, and then the choice of points, which looks at the rows of earlier abilities too.
    notes = _check_training_rows(plan, prompts, reported)
    path = plan.recipe.path
    if path is None or path.choose is None:
        return notes
    for where, rows_there in rows.items():
        has_loss = not sets[where].kl  # sets with kl have no loss to choose by
        if where.startswith(_OF_PATH) and has_loss:
            _check_not_reported(rows_there, reported, f"{where} would choose points on")
    return notes


def _check_training_rows(
    plan: Plan,
    prompts: Mapping[str, set[str]],
    reported: set[str],
) -> list[str]:
    """Refuse to tune or choose on prompts that the study reports on, or on a test split; note those it trains on.

    Checkpoints are chosen on held-out rows as well. Where nothing else is, training with the test rows as held-out data
    may be what someone wants to look at: that is a note.

    Args:
        plan: The runs.
        prompts: Section of the recipe -> the prompts that it reports on.
        reported: All of these.
    """
    read: dict[str, Splits | UserError] = {}  # most runs have the same rows, and reading them takes a while
    checked: set[tuple] = set()
    notes: list[str] = []
    for run in plan.runs:
        if run.method.method == PRETRAINED:
            continue
        rows_key = _values_of(run, _OF_ROWS)
        verb = how_chosen(run.method, run.options)
        name = plan.recipe.data_name(run.method)
        # Everything that the checks and the notes below depend on. A mask that is not trained may have the rows of a
        # method that is, and come first.
        key = (
            rows_key,
            verb is None,
            run.method.is_trained,
            _values_of(run, _OF_CHECKPOINTS),
            name,
        )
        if key in checked:
            continue
        checked.add(key)

        parsed = parsed_run(run)
        data = parsed.data
        would = f"method {run.method.name!r} would be {verb} on"
        if verb is not None:
            _check_no_test_split(data, would)
        # Of runs that choose nothing, files alone are read: a hub data set may be prepared, and nowhere else.
        elif hub_ids(data.dataset_name or "") or hub_ids(data.eval_dataset_name or ""):
            continue

        if rows_key not in read:
            read[rows_key] = _splits(parsed)
        splits = read[rows_key]
        if isinstance(splits, UserError):
            if verb is not None:
                raise splits
            continue  # the preparation of the data says it
        if verb is not None:
            _check_not_reported(splits.heldout, reported, would)
        elif run.method.is_trained and parsed.training.load_best_model_at_end:
            notes += _notes_on_checkpoints(splits.heldout, reported, name)
        if run.method.is_trained:
            notes += _notes_on_trained_rows(splits.train, prompts, f"training rows of {name!r}")
    notes += _notes_on_kl_rows(plan, prompts)
    return list(dict.fromkeys(notes))


def _values_of(run: StudyRun, names: Iterable[str]) -> str:
    """The values of some options of a run as text: a value may be a list, which has no hash."""
    return repr([run.options.get(name) for name in names])


def _notes_on_kl_rows(plan: Plan, prompts: Mapping[str, set[str]]) -> list[str]:
    """A note for each section that reports on rows of ``kl_dataset_name``, near which the model is held to its base.

    Args:
        plan: The runs.
        prompts: Section of the recipe -> the prompts that it reports on.
    """
    read: set[str] = set()
    notes: list[str] = []
    for run in plan.runs:
        mixture = run.options.get(KL_DATA)
        key = _values_of(run, _OF_KL_ROWS)
        if not isinstance(mixture, str) or key in read or hub_ids(mixture):
            continue
        read.add(key)
        parsed = parsed_run(run)
        try:
            rows = load_examples(
                mixture,
                as_chat=parsed.data.as_chat,
                tokenizer=None,
                text_field=parsed.training.dataset_text_field,
                data_dir=parsed.data.data_dir,
                seed=parsed.data.split_seed,
            )
        except UserError:
            continue  # the preparation of the data says it
        notes += _notes_on_trained_rows(rows, prompts, f"rows of {KL_DATA}")
    return notes


def _splits(parsed: TrainConfig) -> Splits | UserError:
    """Rows of a run, or why they cannot be read."""
    data = parsed.data
    text_field = parsed.training.dataset_text_field
    try:
        return load_splits(data, data.split_seed, None, text_field)
    except UserError as error:
        return error


def _notes_on_checkpoints(
    heldout: Iterable[dict],
    reported: set[str],
    name: str,
) -> list[str]:
    """A note if rows that choose checkpoints are reported on."""
    num_rows, num_reported = _count_reported(heldout, reported)
    if not num_reported:
        return []
    return [
        f"Note: {num_reported:,} of the {num_rows:,} held-out rows of {name!r}, which choose checkpoints, "
        "have prompts that evaluation reports on: its scores are better than on new rows; hold out other rows "
        "(eval_split_size)."
    ]


def _notes_on_trained_rows(
    rows: Iterable[dict],
    prompts: Mapping[str, set[str]],
    what: str,
) -> list[str]:
    """A note for each section that reports on prompts of training rows.

    Args:
        rows: The training rows.
        prompts: Section of the recipe -> the prompts that it reports on.
        what: What the rows are, for the note.
    """
    trained = {question_digest(row) for row in rows}
    notes = []
    for where, prompts_there in prompts.items():
        num_trained = len(prompts_there & trained)
        if num_trained:
            notes.append(
                f"Note: {num_trained:,} of the {len(prompts_there):,} prompts of {where} are {what} "
                "too: scores on them say nothing of new rows; take them out of one of the two."
            )
    return notes


def _check_no_test_split(data: DataArguments, would: str) -> None:
    """Refuse the test split of a hub data set as held-out rows, whether or not the study reports on it."""
    # The rows are those of eval_dataset_name, of another split of the training data, or a part of the training rows.
    asked = data.dataset_eval_split
    if not asked and not data.eval_dataset_name:
        asked = data.dataset_train_split

    for each in parse_mixture(data.eval_dataset_name or data.dataset_name):
        split = split_of(each.name, asked)
        # A split says little about a user's own files, unless data_dir has a set's file of that split.
        file = local_file(each.name, data.data_dir, split)
        if file is not None and not file.name.partition(".")[0].endswith(f"_{split}"):
            continue
        # A split may be an expression of `datasets`, as test[:10%]+train.
        parts = set()
        for part in split.split("+"):
            split_name, _, _ = part.partition("[")
            parts.add(split_name.strip())
        if "test" in parts:
            raise UserError(f"{would} the split {split!r} of {each.name!r}; hold out rows of the training data")


def _check_not_reported(
    heldout: Iterable[dict],
    reported: set[str],
    would: str,
) -> None:
    num_rows, num_reported = _count_reported(heldout, reported)
    if num_reported:
        raise UserError(
            f"{would} {num_rows:,} held-out rows, and evaluation reports on the prompts of "
            f"{num_reported:,} of them; hold out other rows (eval_split_size), or take these out of the test"
        )


def _count_reported(heldout: Iterable[dict], reported: set[str]) -> tuple[int, int]:
    """The number of held-out rows, and of those whose prompt is reported on."""
    is_reported = [question_digest(row) in reported for row in heldout]
    return len(is_reported), sum(is_reported)


def how_chosen(method: Method, options: Options) -> str | None:
    """``tuned`` or ``chosen`` if held-out rows choose more of a method than its checkpoint, else None.

    Args:
        method: The method.
        options: Its options of ``maskft train``, with those of all methods.
    """
    if method.tune is not None:
        return "tuned"
    # The best of several mixtures with the model before, or of several drawn masks.
    if method.method == INTERPOLATE:
        return "chosen"
    num_candidates = options.get("num_candidates", 1)
    if method.method == "random_mask" and num_candidates > 1:
        return "chosen"
    return None


# Options of evaluations


def _evaluation_args(recipe: Recipe) -> dict[str, Namespace]:
    """Section -> its options of ``maskft evaluate``, parsed.

    Raises:
        UserError: For an option that ``maskft evaluate`` would refuse.
    """
    sections = {"evaluation": recipe.evaluation}
    # Named as the user finds them in the recipe, for errors.
    for name, options in recipe.before.items():
        sections[f"evaluation.before.{name}"] = options
    if recipe.path:
        for name, options in recipe.path.before.items():
            sections[f"{_OF_PATH}{name}"] = options

    # argparse has no public list of its options.
    parser = evaluate.make_parser()
    all_options = {action.dest for action in parser._actions}
    known = all_options - _OF_THE_STUDY
    place_holders = [*_PLACE_HOLDERS, *(_CHANGE if recipe.path else ())]
    parsed = {}
    for where, options in sections.items():
        if options.get("kl") and not recipe.path:
            raise UserError(
                f"{where} has kl, which is measured of a change along a path; add `path` to the recipe, or remove kl"
            )
        # The names. The parser knows options too that the study itself sets.
        allowed = set(known)
        if where.startswith(_OF_PATH):
            allowed.discard("tasks")  # points are measured on rows
        for option in options:
            if option not in allowed:
                keys = _OWN_KEYS if where == "evaluation" else ()
                hint = did_you_mean(option, [*keys, *allowed])
                kinds = ", ".join([*keys, "options of maskft evaluate"])
                raise UserError(f"{where} has an unknown option {option!r}{hint}; it may have: {kinds}")

        # The values.
        try:
            words = [*place_holders, *evaluation_words(options)]
            args = parser.parse_args(words)
            evaluate.read(args)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        parsed[where] = args
    return parsed
