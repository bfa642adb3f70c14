"""Running a study: on this machine one run after another, or on a Ray cluster as many at once as it has room for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import files
from ..errors import UserError
from .dry_run import Estimate, estimate, model_facts
from .execute import Study, make, prepare_base, prepare_data
from .plan import Plan, Run
from .process import last_line
from .recipe import Facts
from .summary import summarise

_LOCK_WAIT_S = 30  # a killed study's child needs a moment to end


def run_study(plan: Plan, folder: str | Path, launcher: str = "local", console: Console | None = None) -> None:
    """Make every run that is not finished, then print and write the table.

    Args:
        plan: The runs.
        folder: The study's folder; finished runs in it are not repeated.
        launcher: ``local`` or ``ray``.
        console: Where to print; default stdout.

    Raises:
        UserError: If a run failed; the others, as far as they do not need it, are made first.
    """
    console = console or Console()
    with locked(folder) as (folder, lock_fd):
        study = Study(folder, plan.recipe, lock_fd)
        failed = make_all(study, plan, launcher, console)
        console.print(summarise(study, plan), highlight=False, markup=False, soft_wrap=True)
        table = folder / files.STUDY_TABLE.format(plan.recipe.name)
        console.print(f"table: {table}; results: {folder / files.RESULTS}", highlight=False, soft_wrap=True)
    refuse_failed(failed)


def make_all(study: Study, plan: Plan, launcher: str, console: Console) -> dict[Run, str]:
    """Make every run that is not finished; returns those that failed, with the reason.

    Raises:
        UserError: For a mistake in the data of any run, before the first is made.
    """
    board = Board(study, plan, console)
    todo = [run for run in plan.runs if not study.is_done(run)]
    console.print(f"{len(plan.runs)} runs, {len(plan.runs) - len(todo)} finished before", highlight=False)
    with board:
        if todo:
            prepare_base(study, todo, board.tick)
            prepare_data(study, todo, board.tick)
            {"local": _run_local, "ray": _run_on_ray}[launcher](study, todo, board)
    return board.failed


def refuse_failed(failed: dict[Run, str]) -> None:
    """Raise the first failure as a UserError; nothing where there is none."""
    if failed:
        run, reason = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"run {run.title!r} failed{others}: {reason}")


def dry_run(plan: Plan, folder: str | Path, console: Console | None = None) -> None:
    """Print what would run, from what, and what it takes; writes nothing."""
    console = console or Console()
    study = Study(Path(folder).absolute(), plan.recipe)
    table = Table("run", "from", "tokens", "memory", "time", "state", title=plan.recipe.name)
    facts = {model: model_facts(plan.recipe.facts, model) for model in plan.recipe.models}
    estimates = {run.id: estimate(plan, run, facts[run.model]) for run in plan.runs}
    for run in plan.runs:
        state = "finished" if study.is_done(run) else "to evaluate" if study.is_trained(run) else "to do"
        parents = ", ".join(parent.id for parent in run.parents) or run.model
        table.add_row(*map(Text, (run.id, parents, *_words(estimates[run.id]), state)))
    # Piped or in a log, nothing may be cut off.
    width = console if console.is_terminal else Console(file=console.file, width=200)
    width.print(table, markup=False)
    left = [estimates[run.id] for run in plan.runs if not study.is_trained(run)]
    tokens, seconds = (
        None if any(value is None for value in values) else sum(values)
        for values in ([e.tokens for e in left], [e.seconds for e in left])
    )
    total = _words(Estimate(tokens, None, seconds))
    width.print(
        f"{len(plan.runs)} runs; training left: {total[0]} tokens, {total[2]}. Memory is weights, gradients and "
        "optimizer of one process, without activations; evaluation comes on top of the time."
        + _about_time(plan.recipe.facts),
        highlight=False,
    )


def _about_time(facts: Facts) -> str:
    if facts.tokens_per_s:
        return ""
    if facts.flops_per_s:
        return (
            "\nTime is counted, not measured: 2 FLOPs per parameter and pass, at the recipe's "
            f"{facts.flops_per_s:.3g} FLOP/s in all; model_facts: {{tokens_per_s: N}}, as maskft train prints it, "
            "is better."
        )
    return (
        "\nTime is not known: say in the recipe how fast your hardware trains (maskft train prints it), "
        "model_facts: {tokens_per_s: N}."
    )


def _words(e: Estimate) -> tuple[str, str, str]:
    tokens = "?" if e.tokens is None else f"{e.tokens:.3g}"
    memory = "?" if e.memory_bytes is None else _in_units(e.memory_bytes, (("GB", 1e9, 1), ("MB", 1e6, 0)))
    time = "?" if e.seconds is None else _in_units(e.seconds, (("h", 3600, 1), ("min", 60, 0), ("s", 1, 0)))
    return tokens, memory, time


def _in_units(value: float, units: tuple[tuple[str, float, int], ...]) -> str:
    """Return a value in the largest of the units of which it has one and a half, else in the smallest."""
    unit, size, digits = next((unit for unit in units if value >= 1.5 * unit[1]), units[-1])
    return f"{value / size:.{digits}f} {unit}"


@contextmanager
def locked(folder: str | Path) -> Iterator[tuple[Path, int]]:
    """Make the folder and hold it: two studies in one folder would write over each other. A kill releases it.

    Yields:
        The folder as an absolute path, and the file descriptor of the lock.
    """
    import fcntl

    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / files.LOCK, os.O_CREAT | os.O_RDWR)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another study is running in {str(folder)!r}; wait for it or stop it") from None
                time.sleep(0.2)
        yield folder, fd
    finally:
        os.close(fd)


class Board:
    """The live table: every run's state, and the last line of the log of those that run."""

    def __init__(self, study: Study, plan: Plan, console: Console):
        self.study, self.plan, self.console = study, plan, console
        self.running: dict[Run, float] = {}
        self.failed: dict[Run, str] = {}
        self.seconds: dict[Run, float] = {}
        self._live = Live(console=console, refresh_per_second=2, auto_refresh=False) if console.is_terminal else None
        self._last_refresh = 0.0

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._live:
            try:
                self._live.update(self._table(), refresh=True)
            finally:
                self._live.stop()

    def started(self, run: Run) -> None:
        """Note that a run has begun."""
        self.running[run] = time.monotonic()
        if not self._live:
            self.console.print(f"{self._position(run)} {run.title}: started", highlight=False, markup=False)

    def ended(self, run: Run, reason: str | None = None) -> None:
        """Note that a run is finished, or that it failed and why."""
        self.seconds[run] = time.monotonic() - self.running.pop(run, time.monotonic())
        if reason is not None:
            self.failed[run] = reason
        if not self._live:
            state = "finished" if reason is None else f"failed: {reason}"
            self.console.print(
                f"{self._position(run)} {run.title}: {state}, {self.seconds[run]:.0f} s", highlight=False, markup=False
            )

    def tick(self) -> None:
        """Refresh the table, about twice a second."""
        now = time.monotonic()
        if self._live and now - self._last_refresh > 0.5:
            self._last_refresh = now
            self._live.update(self._table(), refresh=True)

    def _position(self, run: Run) -> str:
        return f"[{self.plan.runs.index(run) + 1}/{len(self.plan.runs)}]"

    def _table(self) -> Table:
        table = Table("run", "state", "time", "last line", expand=True)
        for run in self.plan.runs:
            if run in self.running:
                cells = "running", f"{time.monotonic() - self.running[run]:.0f} s"
                cells += (last_line(self.study.run_folder(run) / files.LOG)[:100],)
            elif run in self.failed:
                cells = "failed", "", self.failed[run][:100]
            else:
                done = self.study.is_done(run)
                cells = (
                    "finished" if done else "waiting",
                    f"{self.seconds[run]:.0f} s" if run in self.seconds else "",
                    "",
                )
            table.add_row(*map(Text, (run.title, *cells)))  # plain: a log may hold [/INST] or the like
        return table


def _blocked(run: Run, failed: dict) -> str | None:
    parent = next((parent for parent in run.parents if parent in failed), None)
    return None if parent is None else f"it needs {parent.title!r}, which failed"


def _run_local(study: Study, todo: list[Run], board: Board) -> None:
    for run in todo:
        reason = _blocked(run, board.failed)
        if reason is None:
            board.started(run)
            try:
                make(study, run, board.tick)
            except UserError as error:
                reason = str(error)
        board.ended(run, reason)


def _run_on_ray(study: Study, todo: list[Run], board: Board) -> None:
    """Hand each run to the cluster as soon as those it needs are finished. The folder must be one all nodes see."""
    try:
        import ray
    except ImportError:
        raise UserError("--launcher ray needs Ray; run: pip install 'maskft[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)  # RAY_ADDRESS names a cluster; without it, this machine
    launch = study.recipe.launch
    # A file descriptor means nothing in another process; the driver holds the lock.
    remote_study = Study(study.folder, study.recipe)
    task = ray.remote(num_cpus=launch.num_cpus, num_gpus=launch.num_gpus, max_retries=0)(_make_remotely)
    waiting, pending, queued = list(todo), {}, {}
    while waiting or pending:
        for run in list(waiting):
            reason = _blocked(run, board.failed)
            if reason is not None:
                board.ended(run, reason)
                waiting.remove(run)
            elif not any(parent in waiting or parent in pending.values() for parent in run.parents):
                pending[task.remote(remote_study, run)] = run
                queued[run] = time.time()
                waiting.remove(run)
        for run in [run for run, since in queued.items() if _writes(study, run, since)]:
            board.started(run)
            del queued[run]
        done, _ = ray.wait(list(pending), timeout=0.5) if pending else ([], [])
        for reference in done:
            run = pending.pop(reference)
            if queued.pop(run, None):
                board.started(run)
            try:
                board.ended(run, ray.get(reference))
            except ray.exceptions.RayError as error:
                board.ended(run, " ".join(str(error).split())[:300])
        board.tick()


def _writes(study: Study, run: Run, since: float) -> bool:
    """Whether a run that was handed out has begun: until there is room for it, the cluster keeps it in a queue."""
    log = study.run_folder(run) / files.LOG
    return log.is_file() and log.stat().st_mtime >= since


def _make_remotely(study: Study, run: Run) -> str | None:
    """Make a run on a worker; returns why it failed."""
    try:
        make(study, run)
    except UserError as error:
        return str(error)
    return None
