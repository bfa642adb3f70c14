"""What a training shows while it runs, and what trackers are told."""

import io
import re

from rich.console import Console
from transformers import TrainerControl, TrainerState

from maskft.training.bar import TrainingProgress
from maskft.training.record import read_record
from maskft_common import progress_bar


def shown(console: Console, max_steps: int = 12000, resumed_at: int = 0) -> str:
    """What is shown of a run that measures twice, and gets worse."""
    state = TrainerState(max_steps=max_steps, global_step=resumed_at, log_history=[])
    if resumed_at:
        state.log_history = [{"eval_loss": 3.25, "step": 0}]
    args, progress = (None, state, TrainerControl()), TrainingProgress(console)
    progress.on_train_begin(*args)
    progress.on_log(*args, logs={"eval_loss": 11.51})
    for loss in (10.1234, 9.8765):
        state.global_step += 1
        progress.on_step_end(*args)
        progress.on_log(*args, logs={"loss": loss})
    progress.on_log(*args, logs={"eval_loss": 12.0625})
    progress.close()
    return console.file.getvalue()


def test_a_terminal_gets_one_bar_with_time_left_and_losses():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    frames = [frame for frame in re.split(r"[\r\n]+|\x1b\[[?\d;]*[A-Za-z]", shown(console)) if frame.strip()]
    assert all(len(frame) <= 80 for frame in frames)
    assert re.fullmatch(
        r"step +2/12000 [━╸ ]{8} \d+ \w+ left  held-out 12\.0625 \(best 11\.5100\)  loss 9\.8765 *", frames[-1]
    )


def test_a_log_gets_a_line_per_measurement_and_now_and_then_one_between(monkeypatch):
    lines = shown(Console(file=io.StringIO(), width=80)).splitlines()
    assert lines[0] == "  step     0/12000  held-out 11.5100"
    assert re.fullmatch(
        r"  step     2/12000  held-out 12\.0625 \(best 11\.5100\)  loss 9\.8765  \d+ \w+ left", lines[1]
    )
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    assert len(shown(Console(file=io.StringIO(), width=80)).splitlines()) == 6


def test_a_resumed_run_knows_the_best_measured_before():
    assert "(best 3.2500)" in shown(Console(file=io.StringIO(), width=80), resumed_at=5)


def test_with_a_budget_the_kl_is_shown_and_the_lowest_loss_is_not_called_the_best():
    """It may be of a checkpoint beyond the budget."""
    console = Console(file=io.StringIO(), width=80)
    state = TrainerState(max_steps=9, global_step=5, log_history=[{"eval_loss": 1.0, "eval_kl": 0.5, "step": 3}])
    args, progress = (None, state, TrainerControl()), TrainingProgress(console, has_budget=True)
    progress.on_train_begin(*args)
    progress.on_log(*args, logs={"eval_loss": 2.0, "eval_kl": 0.0625})
    progress.close()
    assert "held-out 2.0000, KL 0.0625" in console.file.getvalue() and "best" not in console.file.getvalue()


def test_trackio_gets_loss_heldout_loss_removed_share_and_flips(call, tmp_path, monkeypatch):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    for module in (trackio, trackio.utils, trackio.sqlite_storage, trackio.run):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    status, err = call(report_to="trackio", logging_steps=1, max_steps=4)
    assert status == 0, err
    run = str(tmp_path / "out")
    assert SQLiteStorage.get_runs("maskft") == [run]
    rows = SQLiteStorage.get_logs("maskft", run)
    history = read_record(tmp_path / "out").summary.history
    names = ["train/loss", "eval/loss", "train/mask_removed_share", "train/mask_flips_per_step"]
    for name, key in zip(
        names, ["loss", "eval_loss", *(name.removeprefix("train/") for name in names[2:])], strict=True
    ):
        values = [(row["step"], row[key]) for row in history if key in row]
        assert values and [(row["train/global_step"], row[name]) for row in rows if name in row] == values, name


def test_a_tracker_that_is_not_there_is_told_before_a_model_is_loaded(call, tmp_path):
    for name, said in (("trakio", "trakio is not supported, only"), ("clearml", "requires 'clearml'")):
        status, err = call(report_to=name)
        assert status == 2 and f"error: report_to: {said}" in err.replace("ClearMLCallback ", "") and "Trace" not in err
    assert not (tmp_path / "out").exists()
