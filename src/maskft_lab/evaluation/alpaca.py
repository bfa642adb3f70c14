"""AlpacaEval 2.0: answers in the published format, and their win rate by the `alpaca_eval` package.

The judge is one of the package's annotators, or a file of the user's in its format: server, key and prompt are matters
of the package. It keeps verdicts 128 at a time, so that a run that was killed does not ask for them twice.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskft.data.sources import read_file
from maskft.data.tokenizing import prompt_ids
from maskft_common import files, layout
from maskft_common.errors import UserError, first_line, install_hint

from ..generation.greedy import Bounds
from ..results.schema import data_sha256, metric_from_items
from .benchmarks import asking_hub
from .evaluation_arguments import ALPACA_EVAL, EvaluationArguments
from .heldout import task_record
from .journal import Journal, generated
from .load_models import Loaded

TASK_VERSION = 2
HUB_DATASET = "tatsu-lab/alpaca_eval"
HUB_FILE = "alpaca_eval_gpt4_baseline.json"
# Length is controlled for by a regression with the difficulty of each of these prompts.
PUBLISHED_REFERENCE = "gpt4_1106_preview"
PUBLISHED_NUM_PROMPTS = 805


def alpaca_settings(options: EvaluationArguments) -> dict:
    """What else shapes the numbers, for the result file."""
    annotator = options.alpaca_annotator
    if annotator and Path(annotator).is_file():
        annotator = f"{Path(annotator).name} {files.digest_file(annotator)[:16]}"
    return {"annotator": annotator, "max_new_tokens": options.alpaca_max_new_tokens}


def load_alpaca(options: EvaluationArguments) -> list[Mapping[str, Any]]:
    """The instructions, with the outputs that answers are compared with; checked, as the judge is, before any model.

    Raises:
        UserError: For every problem with the files, and if the package that judges is not installed.
    """
    given = options.reference_outputs
    annotator = options.alpaca_annotator
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
    return references[: options.limit]


def _is_output(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("instruction", "output"))


def _published_file() -> Path:
    from huggingface_hub import hf_hub_download

    with asking_hub(HUB_FILE, "name a file: --reference_outputs"):
        return Path(hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset"))


def evaluate_alpaca(
    loaded: Loaded,
    references: Sequence[Mapping],
    options: EvaluationArguments,
    name: str,
    folder: Path,
    journal: Journal,
) -> dict:
    """Generate the answers, write them to ``folder`` in the published format, and have them judged.

    Args:
        loaded: The model.
        references: From `load_alpaca`.
        options: How they are answered and judged.
        name: The model's label, the ``generator`` of its outputs.
        folder: Where the outputs are written.
        journal: Keeps the answers.

    Returns:
        A task record of the result schema; without a judge it has outputs and no metric. ``preference`` is the judge's
        probability that the model's output is the better one, item by item, and 0.5 where it gave no verdict.

    Raises:
        UserError: If the package cannot judge them.
    """
    model = loaded.model
    tokenizer = loaded.tokenizer
    asked = [row["instruction"] for row in references]
    prompts = [prompt_ids({"prompt": [{"role": "user", "content": text}]}, tokenizer) for text in asked]
    bounds = Bounds(options.alpaca_max_new_tokens, options.batch_size, option="alpaca_max_new_tokens")
    answers = generated(model, tokenizer, prompts, bounds, f"{ALPACA_EVAL}: outputs", journal)
    outputs = [
        {"instruction": text, "output": answer.strip(), "generator": name}
        for text, answer in zip(asked, answers, strict=True)
    ]
    file = folder / layout.ALPACA_OUTPUTS
    files.write_text(file, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    items: list[dict[str, Any]] = [{"id": str(index), **row} for index, row in enumerate(outputs)]
    metrics = {}
    note = f"{len(items)} outputs are in {file}, not judged: name a judge with --alpaca_annotator"
    if options.alpaca_annotator is not None:
        verdicts = folder / f"alpaca_verdicts_{files.digest(alpaca_settings(options))[:16]}.json"  # of this judge
        metrics, note = _judged(items, outputs, references, options.alpaca_annotator, verdicts)
    asked_for = (({"id": index, "answer": row["output"]}, row["instruction"]) for index, row in enumerate(references))
    record = task_record(items, metrics, asked_for, tokenizer, TASK_VERSION)
    more = {"data_sha256": data_sha256(references), "generation_kwargs": {"max_gen_toks": bounds.max_new_tokens}}
    return record | more | ({"note": note} if note else {})


def _judged(
    items: list[dict], outputs: list[dict], references: Sequence[Mapping], annotator: str, verdicts: Path
) -> tuple[dict, str]:
    """Have outputs judged and give each item its preference; returns the metrics and a note.

    The package reads verdicts there are from ``verdicts``, and writes its own there.
    """
    from alpaca_eval import evaluate

    name = outputs[0]["generator"]
    is_published = [row.get("generator") for row in references] == [PUBLISHED_REFERENCE] * PUBLISHED_NUM_PROMPTS
    length = {"fn_metric": "get_length_controlled_winrate", "metric_kwargs": {"save_weights_dir": None}}
    try:
        leaderboard, annotations = evaluate(
            model_outputs=outputs,
            reference_outputs=[dict(row) | {"generator": PUBLISHED_REFERENCE} for row in references],
            annotators_config=annotator,
            name=name,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            sort_by="win_rate",
            annotation_kwargs={"is_ordered": True},
            caching_path=str(verdicts),
            **(length if is_published else {"fn_metric": "get_winrate"}),
        )
    except Exception as error:  # of the package, of a server's client, of the network
        raise UserError(
            f"alpaca_eval could not judge the outputs ({type(error).__name__}: {first_line(error)}); they and the "
            f"verdicts in {verdicts} (remove it to ask again) are kept: check server and key, and run the same command"
        ) from error
    for file in verdicts.parent.glob("alpaca_verdicts_*.json"):
        file.unlink()
    missing = 0
    for item, row in zip(items, annotations, strict=True):
        is_judged = row["preference"] is not None and not math.isnan(row["preference"])
        item["preference"] = float(row["preference"]) - 1 if is_judged else 0.5  # 1: the reference is better, 2: ours
        missing += not is_judged
    preference = metric_from_items(items, "preference", unit="fraction")
    # The package's own: items without verdict do not count. Of the length-controlled rate it gives no error.
    rate = {"value": leaderboard.loc[name, "win_rate"] / 100, "stderr": leaderboard.loc[name, "standard_error"] / 100}
    metrics = {"win_rate": preference | {key: float(value) for key, value in rate.items()}}
    if is_published:
        value = float(leaderboard.loc[name, "length_controlled_winrate"]) / 100
        metrics = {"length_controlled_win_rate": preference | {"value": value, "stderr": None}} | metrics
    note = f"{missing} of {len(items)} items without verdict" if missing else ""
    return metrics | {"preference": preference}, note
