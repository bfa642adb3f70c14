"""Where a study's files are."""

from __future__ import annotations

import math
from collections.abc import Set
from functools import cached_property
from pathlib import Path

from maskft.training.arguments import TrainingArguments
from maskft_common import files, layout
from maskft_common.errors import UserError

from .damage import damage_of_result, damage_of_run
from .identity import evaluation_identity, short_digest
from .recipe import PRETRAINED, Recipe
from .run_record import RunRecord, read_run_record
from .study_run import BEST, StudyRun


class Study:
    """A study's folder, and the names of the files in it.

    Nothing here writes. Records and results are read again at each question: runs on other machines may write them.

    Args:
        folder: Absolute: adapters name their base model by it.
        recipe: The study's recipe.
        lock_fd: Descriptor of the study's lock, which its commands hold too; None on other machines.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        lock_fd: int | None = None,
    ):
        self.folder = folder
        self.recipe = recipe
        self.lock_fd = lock_fd

        # Finished runs, also those that other studies made under other names.
        self._folders_by_hash: dict[str, Path] = {}
        self.rescan()

    def rescan(self) -> None:
        """Look for finished runs; several studies may share a folder, and use each other's runs."""
        # Only folders with a run.json: without it, a run is unfinished, and another study must not write into its
        # folder.
        runs_folder = self.folder / layout.RUNS
        records = runs_folder.glob(f"*/{layout.RUN}")
        self._folders_by_hash = {}
        for record in sorted(records):  # in a fixed order: of two folders with one hash, the last counts
            run_folder = record.parent
            self._folders_by_hash[_hash_of(run_folder)] = run_folder

    def note_finished(self, run_folder: Path) -> None:
        """Let other names of the same run find its folder."""
        self._folders_by_hash.setdefault(_hash_of(run_folder), run_folder)

    def without_lock(self) -> Study:
        """The same for another machine, where a descriptor means nothing."""
        other = Study(self.folder, self.recipe)
        # Results have one name on all machines, also if a file of the evaluation is changed while the study runs.
        other.evaluation = self.evaluation
        return other

    # Runs

    def run_folder(self, run: StudyRun) -> Path:
        """Folder of a run: model or adapter, log, ``run.json``; another study's, if that has made the same run."""
        # Its own first: it may hold the checkpoints of an interrupted training.
        own = self.folder / layout.RUNS / run.id
        if own.exists():
            return own
        # The name before the hash is the method's in a recipe; another study may have another name for it.
        return self._folders_by_hash.get(run.hash, own)

    def record(self, run: StudyRun) -> RunRecord:
        """Record of a finished run; its best checkpoint is the one by held-out loss, whatever ``path.choose`` takes."""
        return read_run_record(self.run_folder(run))

    def has_record(self, run: StudyRun) -> bool:
        """Whether a run's training is over: its record is written last."""
        record = self.run_folder(run) / layout.RUN
        return record.is_file()

    def is_trained(self, run: StudyRun) -> bool:
        """Whether the run's models are there, as they were written."""
        if not self.has_record(run):
            return False
        folder = self.run_folder(run)
        return damage_of_run(folder) is None

    # Models

    def base(self, run: StudyRun) -> str:
        """The base model as the commands take it; the embedded one is unpacked once, for all runs."""
        if run.model == layout.EMBEDDED_MODEL:
            return str(self.folder / layout.BASE)
        return run.model

    def start(self, run: StudyRun) -> str:
        """The model that a run starts from."""
        if run.start is None:
            return self.base(run)
        return self.model(run.start, BEST)

    def model(self, run: StudyRun, role: str) -> str:
        """Folder or name of one of a finished run's models; with ``path.choose``, the checkpoint of the chosen point.

        Raises:
            UserError: If the run diverged while settings were tried, and has no model.
        """
        if run.method.method == PRETRAINED:
            return self.base(run)  # not from the record, which names the place where it was then
        if run.point is not None:
            share, _ = run.point
            return str(self.checkpoint(run, share))

        record = self.record(run)
        name = record.models.get(role)
        if name is None:
            raise UserError(f"the loss of {run.title!r} was not finite; lower learning_rate or check the data")
        # A folder relative to the study's, a folder elsewhere, or a name on the hub. `/` with an absolute path on its
        # right gives that path.
        inside = self.folder / name
        if inside.exists():
            return str(inside)
        return name

    def checkpoint(self, run: StudyRun, share: float) -> Path:
        """Checkpoint of a finished run after a share of its steps, in (0, 1]; needs a run with steps.

        It is the nearest of those that were saved, see :func:`step_at`. Of the checkpoint that a run with a
        ``kl_budget`` has kept it is the run's own folder: there is the part of the change that is within the budget,
        while checkpoints hold the whole.

        Raises:
            UserError: If no checkpoint was saved at that step.
        """
        folder = self.run_folder(run)
        step = self.step(run, share)
        if step == self._kept_step(run):
            return folder
        return folder / f"checkpoint-{step}"

    def step(self, run: StudyRun, share: float) -> int:
        """Step of the checkpoint that :meth:`checkpoint` gives; it has the same errors."""
        num_steps = self.record(run).num_steps
        interval = run.options.get("save_steps", TrainingArguments.save_steps)
        if run.options.get("save_strategy") == "epoch":
            interval = 0  # not used
        folder = self.run_folder(run)
        saved = _saved_steps(folder)
        # Its checkpoint is not needed and may have been deleted.
        kept_step = self._kept_step(run)
        if kept_step is not None:
            saved.add(kept_step)
        return _nearest_step(step_at(share, num_steps, interval), saved, folder.name)

    def _kept_step(self, run: StudyRun) -> int | None:
        """Step of the checkpoint that a run with a ``kl_budget`` has kept; None for other runs."""
        if run.options.get("kl_budget") is None:
            return None
        training = files.read_json(self.run_folder(run) / layout.TRAINING)["summary"]
        step = training["kl"]["step"]
        # Without a choice the last one is kept.
        return training["num_steps"] if step is None else step

    def checkpoints(self, run: StudyRun) -> dict[float, Path]:
        """Share of training -> checkpoint of every point of a finished run's path."""
        path = self.recipe.path
        if path is None or not run.method.is_trained:
            return {}
        num_steps = self.record(run).num_steps
        if not num_steps:  # it diverged, or took no step
            return {}

        found = {}
        # Every share, and not only the chosen one: the path is measured before a point is chosen.
        for share, _ in path.points:  # of points at the end of training, all scales have one checkpoint
            found[share] = self.checkpoint(run, share)
        return found

    # Results

    def result_file(self, run: StudyRun, role: str) -> Path:
        """Result file of one of the run's models."""
        name = evaluation_id(
            run,
            role,
            self.evaluation,
            self.recipe.name,
        )
        result_folder = self.folder / layout.RESULTS / name
        return result_folder / layout.RESULT

    @cached_property
    def evaluation(self) -> dict:
        """Identity of the evaluation, part of each result's name; cached, because it looks at every data file."""
        return evaluation_identity(self.recipe.evaluation, self.recipe.before)

    def check_damage(self, run: StudyRun) -> None:
        """Raise if files of a finished run, or its results, are not as they were written."""
        # The run, and the results of its models.
        found: dict[Path, str | None] = {}  # folder -> its damage
        if self.has_record(run):
            folder = self.run_folder(run)
            found[folder] = damage_of_run(folder)
        for role in run.labels:
            file = self.result_file(run, role)
            if file.is_file():
                found[file.parent] = damage_of_result(file)

        # The damage is said and not mended: deleting hours of training is the user's decision.
        for place, problem in found.items():
            if problem:
                raise UserError(f"{run.title}: {problem}; delete {str(place)!r} to run it again")

    def check_no_folder_links(self) -> None:
        """Raise if a folder in the study is a link: runs would be written, and checkpoints deleted, elsewhere."""
        names = (
            layout.RUNS,
            layout.RESULTS,
            layout.PREPARED,
            layout.SLURM,
        )
        for name in names:
            own = self.folder / name
            # Three levels: `runs`, a run, and its checkpoints.
            places = (own, *own.glob("*"), *own.glob("*/*"))
            for place in places:
                if place.is_symlink() and place.is_dir():
                    raise UserError(
                        f"{str(place)!r} is a link to a folder; a study writes and deletes in its folders: remove the "
                        "link, or name another --output_dir"
                    )

    def inside(self, name: str) -> str:
        """A path inside the study's folder relative to it, so that the folder can be moved; others unchanged."""
        path = Path(name)  # a name on the hub is not below the folder either
        if path.is_relative_to(self.folder):
            return str(path.relative_to(self.folder))
        return name


def evaluation_id(
    run: StudyRun,
    role: str,
    evaluation: dict,
    study: str,
) -> str:
    """Folder name of an evaluation of one of the run's models.

    It ends with a hash of the evaluation and a hash of the study's name: studies in one folder copy each other's
    numbers, but each has its own names of models.

    Args:
        run: The run.
        role: Which of its models.
        evaluation: The options, see :func:`evaluation_identity`.
        study: Name of the study.
    """
    # The hash of the run covers its options, data and parents.
    settings = {
        "run": run.hash,
        "role": role,
        "evaluation": evaluation,
    }
    if run.point is not None:  # only then: another key would rename all published evaluations
        settings["point"] = list(run.point)

    # For people, the method, the seed and the role; the hashes alone would do.
    prefix, _, _ = run.id.rpartition("-")
    hash_of_evaluation = short_digest(settings)
    digest_of_study = short_digest({"study": study})
    hash_of_study = digest_of_study[:4]
    return f"{prefix}-{role}-{hash_of_evaluation}-{hash_of_study}"


def step_at(
    share: float,
    num_steps: int,
    interval: float,
) -> float:
    """Step of the checkpoint after a share of training.

    With a share as interval it is the nearest that is saved: transformers rounds the interval up to whole steps, so of
    33 steps, a quarter is 9, and 18 the nearest to a half. Without, a share of the steps, which may fall between two.

    Args:
        share: Of training, in (0, 1], a multiple of an interval below 1.
        num_steps: All steps.
        interval: ``save_steps``: a number of steps or, below 1, a share of them; 0 if it is not used.
    """
    step = share * num_steps
    if not 0 < interval < 1:
        return step
    whole_interval = math.ceil(interval * num_steps)
    # The last step is saved too.
    saved = [*range(whole_interval, num_steps, whole_interval), num_steps]
    return min(saved, key=lambda saved_step: abs(saved_step - step))


def _hash_of(run_folder: Path) -> str:
    """The hash at the end of a run's folder name."""
    return run_folder.name.rpartition("-")[2]


def _saved_steps(folder: Path) -> set[int]:
    """Steps of the checkpoints in a run's folder."""
    steps = set()
    for path in folder.glob("checkpoint-[1-9]*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal():  # not `checkpoint-12.damaged`
            steps.add(int(number))
    return steps


def _nearest_step(
    step: float,
    saved: Set[int],
    run_name: str,
) -> int:
    """The saved step nearest to a step, less than one step away: a share of the steps may fall between two."""

    def distance(number: int) -> float:
        return abs(number - step)

    nearest = min(saved, key=distance, default=None)
    if nearest is None or distance(nearest) >= 1:
        raise UserError(
            f"path: {run_name} has no checkpoint at step {step:g} (it has {sorted(saved)}): path.checkpoints must "
            "be multiples of save_steps; delete runs made with other path settings first"
        )
    return nearest
