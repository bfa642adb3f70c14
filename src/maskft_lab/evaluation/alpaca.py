"""AlpacaEval 2.0: answers in the published format, and their win rate by the `alpaca_eval` package.

The judge is one of the package's annotators, or a file of the user's in its format: server, key and prompt are matters
of the package. It keeps verdicts 128 at a time, so that a run that was killed does not ask for them twice.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, RootModel

from maskft.data import prompt_ids
from maskft_base import files
from maskft_base.errors import UserError, did_you_mean, first_line, install_hint

from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from .arguments import ALPACA_EVAL, EvaluationArguments
from .heldout import chat_template_hash
from .journal import Resources, generated
from .load import Loaded

TASK_VERSION = 2
HUB_DATASET, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"
# Length is controlled for by a regression with the difficulty of each of these prompts.
PUBLISHED_REFERENCE, PUBLISHED_NUM_PROMPTS = "gpt4_1106_preview", 805


class _Output(BaseModel):
    instruction: str
    output: str


@dataclass(frozen=True)
class AlpacaEval:
    """What is to be answered, and how it is judged.

    Args:
        references: Instructions with the outputs that answers are compared with.
        annotator: The package's name of a judge, or a file; None: the answers are not judged.
        max_new_tokens: Bound on an answer.
        is_published: Whether the references are the published ones.
    """

    references: Sequence[Mapping[str, Any]]
    annotator: str | None
    max_new_tokens: int
    is_published: bool

    def settings(self) -> dict:
        """What else shapes the numbers, for the result file."""
        annotator = self.annotator
        if annotator and Path(annotator).is_file():
            annotator = f"{Path(annotator).name} {files.digest_file(annotator)[:16]}"
        return {"annotator": annotator, "max_new_tokens": self.max_new_tokens}

    @property
    def data_sha256(self) -> str:
        """`results.data_sha256` of instructions and references."""
        return data_sha256(self.references)


def load_alpaca(options: EvaluationArguments) -> AlpacaEval:
    """Read and check what the options name, before a model is loaded.

    Raises:
        UserError: For every problem with the files, and if the package that judges is not installed.
    """
    path, annotator = _references_file(options.reference_outputs), options.alpaca_annotator
    try:
        references = files.parse_json(files.read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); AlpacaEval's files are JSON lists of objects") from None
    files.read_model(RootModel[list[_Output]], references, path, "AlpacaEval's files are JSON lists of objects")
    if not references:
        raise UserError(f"{path}: the list is empty; give at least one object")
    if annotator is not None:
        if importlib.util.find_spec("alpaca_eval") is None:
            raise UserError(f"alpaca_annotator needs alpaca_eval, which is not installed; {install_hint('alpaca')}")
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

        known = [folder.name for folder in EVALUATORS_CONFIG_DIR.iterdir() if folder.is_dir()]
        if annotator not in known and not Path(annotator).is_file():
            raise UserError(
                f"alpaca_annotator {annotator!r} is no file and not in alpaca_eval{did_you_mean(annotator, known)}"
            )
    is_published = len(references) == PUBLISHED_NUM_PROMPTS and all(
        row.get("generator") == PUBLISHED_REFERENCE for row in references
    )
    is_whole = options.limit is None or options.limit >= len(references)
    return AlpacaEval(references[: options.limit], annotator, options.alpaca_max_new_tokens, is_published and is_whole)


def _references_file(source: str | None) -> Path:
    if source is None or source == HUB_DATASET:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset"))
        except Exception as error:  # many types: no network, no such file, ...
            raise UserError(
                f"{HUB_FILE} of {HUB_DATASET} cannot be downloaded ({first_line(error)}); name a file with "
                "--reference_outputs"
            ) from None
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"reference_outputs {source!r} is no file; leave it out for the published one")
    return path


def evaluate_alpaca(loaded: Loaded, task: AlpacaEval, name: str, folder: Path, resources: Resources) -> dict:
    """Generate the answers, write them to ``folder`` in the published format, and have them judged.

    Args:
        loaded: The model.
        task: From `load_alpaca`.
        name: The model's label, the ``generator`` of its outputs.
        folder: Where the outputs are written.
        resources: Bounds on a batch, journal and console.

    Returns:
        A task record of the result schema; without a judge it has outputs and no metric. ``preference`` is the judge's
        probability that the model's output is the better one, item by item, and 0.5 where it gave no verdict.

    Raises:
        UserError: If the package cannot judge them.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    chats = [{"prompt": [{"role": "user", "content": row["instruction"]}]} for row in task.references]
    prompts = [prompt_ids(chat, tokenizer) for chat in chats]
    answers = generated(model, tokenizer, prompts, task.max_new_tokens, f"{ALPACA_EVAL}: outputs", resources)
    outputs = [
        {"instruction": row["instruction"], "output": answer.strip(), "generator": name}
        for row, answer in zip(task.references, answers, strict=True)
    ]
    file = folder / files.ALPACA_OUTPUTS
    files.write_text(file, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    items = [{"id": str(index), **row} for index, row in enumerate(outputs)]
    metrics, note = {}, f"{len(items)} outputs are in {file}, not judged: name a judge with --alpaca_annotator"
    if task.annotator is not None:
        metrics, note = _judged(items, task, name, folder)
    record = build_task(
        items,
        metrics,
        version=TASK_VERSION,
        num_fewshot=0,
        fingerprint=items_fingerprint(
            {"id": item["id"], "prompt": row["instruction"], "reference": row["output"]}
            for item, row in zip(items, task.references, strict=True)
        ),
        chat_template_hash=chat_template_hash(tokenizer),
    )
    return record | {
        "data_sha256": task.data_sha256,
        "generation_kwargs": {"max_gen_toks": task.max_new_tokens},
        **({"note": note} if note else {}),
    }


def _judged(items: list[dict], task: AlpacaEval, name: str, folder: Path) -> tuple[dict, str | None]:
    """Have ``items`` judged and give each its preference; returns the metrics and a note."""
    from alpaca_eval import evaluate

    verdicts = folder / "alpaca_verdicts.json"  # the package reads and writes it
    length = {"fn_metric": "get_length_controlled_winrate", "metric_kwargs": {"save_weights_dir": None}}
    try:
        leaderboard, annotations = evaluate(
            model_outputs=[{key: item[key] for key in ("instruction", "output", "generator")} for item in items],
            reference_outputs=[dict(row) | {"generator": PUBLISHED_REFERENCE} for row in task.references],
            annotators_config=task.annotator,
            name=name,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            sort_by="win_rate",
            annotation_kwargs={"is_ordered": True},
            caching_path=str(verdicts),
            **(length if task.is_published else {"fn_metric": "get_winrate"}),
        )
    except Exception as error:  # of the package, of a server's client, of the network
        raise UserError(
            f"alpaca_eval could not judge the outputs ({type(error).__name__}: {first_line(error)}); they and the "
            f"verdicts in {verdicts} (remove it to ask again) are kept: check server and key, and run the same command"
        ) from error
    verdicts.unlink(missing_ok=True)
    judged = []
    for item, row in zip(items, annotations, strict=True):
        item["preference"] = 0.5
        if row["preference"] is not None and not math.isnan(row["preference"]):
            item["preference"] = float(row["preference"]) - 1  # 1: the reference is better, 2: the answer
            judged.append(item)
    metrics = {
        # As the package has it: items without verdict do not count.
        "win_rate": metric_from_items(judged, "preference", unit="fraction"),
        "preference": metric_from_items(items, "preference", unit="fraction"),
    }
    if task.is_published:
        # Without an error: the package's is the spread of its predictions, which says how much prompts differ.
        value = float(leaderboard.loc[name, "length_controlled_winrate"]) / 100
        metrics = {"length_controlled_win_rate": metrics["win_rate"] | {"value": value, "stderr": None}} | metrics
    missing = len(items) - len(judged)
    return metrics, f"{missing} of {len(items)} items without verdict" if missing else None
