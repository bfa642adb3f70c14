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

from maskft.data import prompt_ids
from maskft.data.sources import read_file
from maskft_base import files
from maskft_base.errors import UserError, first_line, install_hint

from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from .arguments import ALPACA_EVAL, EvaluationArguments
from .heldout import chat_template_hash
from .journal import Resources, generated
from .load import Loaded

TASK_VERSION = 2
HUB_DATASET, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"
# Length is controlled for by a regression with the difficulty of each of these prompts.
PUBLISHED_REFERENCE, PUBLISHED_NUM_PROMPTS = "gpt4_1106_preview", 805


@dataclass(frozen=True)
class AlpacaEval:
    """What is to be answered, with the outputs that answers are compared with, and how it is judged."""

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
    given, annotator = options.reference_outputs, options.alpaca_annotator
    path = _published_file() if given is None else Path(given).expanduser()
    references = [row for _, row in read_file(path)]
    if not references or not all(_is_output(row) for row in references):
        raise UserError(f"{path}: AlpacaEval's files are JSON lists of objects with instruction and output")
    if annotator is not None:
        if importlib.util.find_spec("alpaca_eval") is None:
            raise UserError(f"alpaca_annotator needs alpaca_eval, which is not installed; {install_hint('alpaca')}")
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

        if not (EVALUATORS_CONFIG_DIR / annotator).is_dir() and not Path(annotator).is_file():
            raise UserError(f"alpaca_annotator {annotator!r} is no file, and no annotator of alpaca_eval; name another")
    references = references[: options.limit]
    is_published = len(references) == PUBLISHED_NUM_PROMPTS and all(
        row.get("generator") == PUBLISHED_REFERENCE for row in references
    )
    return AlpacaEval(references, annotator, options.alpaca_max_new_tokens, is_published)


def _is_output(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("instruction", "output"))


def _published_file() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset"))
    except Exception as error:  # many types: no network, no such file, ...
        raise UserError(
            f"the hub did not give {HUB_FILE} ({first_line(error)}); name a file: --reference_outputs"
        ) from None


def evaluate_alpaca(loaded: Loaded, task: AlpacaEval, name: str, folder: Path, resources: Resources) -> dict:
    """Generate the answers, write them to ``folder`` in the published format, and have them judged.

    Args:
        loaded: The model.
        task: From `load_alpaca`.
        name: The model's label, the ``generator`` of its outputs.
        folder: Where the outputs are written.
        resources: Bounds on a batch, and the journal.

    Returns:
        A task record of the result schema; without a judge it has outputs and no metric. ``preference`` is the judge's
        probability that the model's output is the better one, item by item, and 0.5 where it gave no verdict.

    Raises:
        UserError: If the package cannot judge them.
    """
    model, tokenizer, asked = loaded.model, loaded.tokenizer, [row["instruction"] for row in task.references]
    prompts = [prompt_ids({"prompt": [{"role": "user", "content": text}]}, tokenizer) for text in asked]
    answers = generated(model, tokenizer, prompts, task.max_new_tokens, f"{ALPACA_EVAL}: outputs", resources)
    outputs = [
        {"instruction": text, "output": answer.strip(), "generator": name}
        for text, answer in zip(asked, answers, strict=True)
    ]
    file = folder / files.ALPACA_OUTPUTS
    files.write_text(file, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    items: list[dict[str, Any]] = [{"id": str(index), **row} for index, row in enumerate(outputs)]
    metrics, note = {}, f"{len(items)} outputs are in {file}, not judged: name a judge with --alpaca_annotator"
    if task.annotator is not None:
        metrics, note = _judged(items, outputs, task, name, folder / "alpaca_verdicts.json")
    fingerprint = items_fingerprint(
        {"id": str(index), "prompt": row["instruction"], "reference": row["output"]}
        for index, row in enumerate(task.references)
    )
    template = chat_template_hash(tokenizer)
    record = build_task(
        items, metrics, version=TASK_VERSION, num_fewshot=0, fingerprint=fingerprint, chat_template_hash=template
    )
    more = {"data_sha256": task.data_sha256, "generation_kwargs": {"max_gen_toks": task.max_new_tokens}}
    return record | more | ({"note": note} if note else {})


def _judged(items: list[dict], outputs: list[dict], task: AlpacaEval, name: str, verdicts: Path) -> tuple[dict, str]:
    """Have outputs judged and give each item its preference; returns the metrics and a note.

    The package reads verdicts there are from ``verdicts``, and writes its own there.
    """
    from alpaca_eval import evaluate

    length = {"fn_metric": "get_length_controlled_winrate", "metric_kwargs": {"save_weights_dir": None}}
    try:
        leaderboard, annotations = evaluate(
            model_outputs=outputs,
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
    missing = 0
    for item, row in zip(items, annotations, strict=True):
        is_judged = row["preference"] is not None and not math.isnan(row["preference"])
        item["preference"] = float(row["preference"]) - 1 if is_judged else 0.5  # 1: the reference is better, 2: ours
        missing += not is_judged
    preference = metric_from_items(items, "preference", unit="fraction")
    # The package's own: items without verdict do not count. Of the length-controlled rate it gives no error.
    rate = {"value": leaderboard.loc[name, "win_rate"] / 100, "stderr": leaderboard.loc[name, "standard_error"] / 100}
    metrics = {"win_rate": preference | {key: float(value) for key, value in rate.items()}}
    if task.is_published:
        value = float(leaderboard.loc[name, "length_controlled_winrate"]) / 100
        metrics = {"length_controlled_win_rate": preference | {"value": value, "stderr": None}} | metrics
    note = f"{missing} of {len(items)} items without verdict" if missing else ""
    return metrics | {"preference": preference}, note
