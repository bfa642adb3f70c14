"""Before the first training of a study: its base model is unpacked, its data read and tokenised."""

from __future__ import annotations

import sys
from dataclasses import fields

from maskft.data.arguments import KL_DATA, TEMPLATE, DataArguments
from maskft_common import layout

from .folder import Study
from .process import PYTHON, Tick, command_words, no_tick, run_command
from .recipe import PRETRAINED, REVISION
from .study_run import StudyRun

# Options of TRL that decide how rows become tokens.
_TOKENISATION = ("max_length", "completion_only_loss", "dataset_text_field")


def prepare_base(
    study: Study,
    runs: list[StudyRun],
    tick: Tick = no_tick,
) -> None:
    """Unpack the embedded model, once for all runs."""
    folder = study.folder / layout.BASE
    is_embedded = any(run.model == layout.EMBEDDED_MODEL for run in runs)
    if not is_embedded or folder.exists():
        return

    # In a child process, so that the board is refreshed meanwhile.
    code = f"from maskft.training.build import unpack_embedded; unpack_embedded({str(folder)!r})"
    words = [sys.executable, "-c", code]
    run_command(words, study.folder / layout.LOG, tick, study.lock_fd)


def prepare_data(
    study: Study,
    runs: list[StudyRun],
    tick: Tick = no_tick,
) -> None:
    """Read and tokenise the data of all trainings to come, so that mistakes in it are found before any starts.

    Raises:
        UserError: The first mistake, of whichever run.
    """
    # Runs with equal values of these options train on the same tokens: one of them prepares the data of all.
    deciding = {field.name for field in fields(DataArguments)}
    deciding.update(_TOKENISATION)
    deciding.update((TEMPLATE, REVISION, KL_DATA))

    prepared: list[dict] = []
    for run in runs:
        is_to_train = run.method.method != PRETRAINED and not study.is_trained(run)
        if not is_to_train:
            continue

        options = {}
        for key, value in run.options.items():
            if key in deciding:
                options[key] = value
        # Not by a set: the values may be lists, which have no hash.
        if options in prepared:
            continue
        prepared.append(options)

        # The command writes the prepared rows, from which the trainings read, and ends before it loads a model.
        command = options | {
            "prepared_data_dir": str(study.folder / layout.PREPARED),
            "prepare_only": True,
            "model_name_or_path": study.base(run),
            "output_dir": str(study.run_folder(run)),
            # Not one of the deciding options: it changes the speed of reading, and not the rows.
            "dataset_num_proc": run.options.get("dataset_num_proc"),
        }
        if KL_DATA in options:
            # Rows of a KL term are refused without one.
            command["kl_to_base"] = 1.0
        words = [*PYTHON, "train", *command_words(command)]
        run_command(words, study.folder / layout.LOG, tick, study.lock_fd)
