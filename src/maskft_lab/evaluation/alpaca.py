"""AlpacaEval 2.0: answers in the published format, and their win rate by the `alpaca_eval` package.

The judge is one of the package's annotators, or the user's file in its format: server, key and prompt are configured
there. The package saves verdicts 128 at a time, so that a killed run does not ask for them twice.
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
# The length-controlled rate is a regression, for which the package has the difficulty of each of these prompts.
PUBLISHED_REFERENCE = "gpt4_1106_preview"
PUBLISHED_NUM_PROMPTS = 805


def alpaca_settings(options: EvaluationArguments) -> dict:
    """Further options that influence the numbers, for the result file."""
    annotator = options.alpaca_annotator
    if annotator and Path(annotator).is_file():
        annotator = f"{Path(annotator).name} {files.digest_file(annotator)[:16]}"
    return {"annotator": annotator, "max_new_tokens": options.alpaca_max_new_tokens}


def load_alpaca(options: EvaluationArguments) -> list[Mapping[str, Any]]:
    """The instructions with the reference outputs; they and the judge are checked before a model is loaded.

    Raises:
        UserError: For every problem with the files, and if the package that judges is not installed.
    """
    if options.reference_outputs is None:
        path = _published_file()
    else:
        path = Path(options.reference_outputs).expanduser()
    references = [row for _, row in read_file(path)]
    if not references or not all(_is_output(row) for row in references):
        raise UserError(f"{path}: AlpacaEval's files are JSON lists of objects with instruction and output")

    annotator = options.alpaca_annotator
    if annotator is not None:
        if importlib.util.find_spec("alpaca_eval") is None:
            raise UserError(f"alpaca_annotator needs alpaca_eval, which is not installed; {install_hint('alpaca')}")
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

        if not (EVALUATORS_CONFIG_DIR / annotator).is_dir() and not Path(annotator).is_file():
            raise UserError(f"alpaca_annotator {annotator!r} is no file, and no annotator of alpaca_eval; name another")
    return references[: options.limit]


def _is_output(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    return isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)


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
        A task record of the result schema; without a judge it has outputs and no metric. ``preference`` is, item by
        item, the judge's probability that the model's output is better, and 0.5 without a verdict.

    Raises:
        UserError: If the package cannot judge them.
    """
    model = loaded.model
    tokenizer = loaded.tokenizer
    instructions = [row["instruction"] for row in references]
    prompts: list[list[int]] = []
    for instruction in instructions:
        message = {"role": "user", "content": instruction}
        prompts.append(prompt_ids({"prompt": [message]}, tokenizer))
    bounds = Bounds(options.alpaca_max_new_tokens, options.batch_size, option="alpaca_max_new_tokens")
    answers = generated(model, tokenizer, prompts, bounds, f"{ALPACA_EVAL}: outputs", journal)

    outputs: list[dict[str, Any]] = []
    for instruction, answer in zip(instructions, answers, strict=True):
        outputs.append(
            {
                "instruction": instruction,
                "output": answer.strip(),
                "generator": name,
            }
        )
    file = folder / layout.ALPACA_OUTPUTS
    files.write_text(file, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")

    items: list[dict[str, Any]] = []
    for index, output in enumerate(outputs):
        items.append({"id": str(index), **output})
    metrics: dict[str, Any] = {}
    note = f"{len(items)} outputs are in {file}, not judged: name a judge with --alpaca_annotator"
    if options.alpaca_annotator is not None:
        judge = files.digest(alpaca_settings(options))[:16]
        verdicts = folder / f"alpaca_verdicts_{judge}.json"
        metrics, note = _judged(items, outputs, references, options.alpaca_annotator, verdicts)

    asked: list[tuple[dict, str]] = []
    for index, reference in enumerate(references):
        row = {"id": index, "answer": reference["output"]}
        asked.append((row, reference["instruction"]))
    record = task_record(items, metrics, asked, tokenizer, TASK_VERSION)
    record["data_sha256"] = data_sha256(references)
    record["generation_kwargs"] = {"max_gen_toks": bounds.max_new_tokens}
    if note:
        record["note"] = note
    return record


def _judged(
    items: list[dict],
    outputs: list[dict],
    references: Sequence[Mapping],
    annotator: str,
    verdicts: Path,
) -> tuple[dict, str]:
    """Have outputs judged.

    Args:
        items: The items; each gets its ``preference``.
        outputs: The model's outputs.
        references: Outputs that they are compared with.
        annotator: The judge.
        verdicts: File of verdicts; the package reads earlier ones from it, and adds its own.

    Returns:
        The metrics and a note.
    """
    from alpaca_eval import evaluate

    name = outputs[0]["generator"]
    generators = [row.get("generator") for row in references]
    is_published = generators == [PUBLISHED_REFERENCE] * PUBLISHED_NUM_PROMPTS
    how: dict[str, Any] = {"fn_metric": "get_winrate"}
    if is_published:
        how = {"fn_metric": "get_length_controlled_winrate", "metric_kwargs": {"save_weights_dir": None}}
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
            **how,
        )
    except Exception as error:  # of the package, of a server's client, of the network
        raise UserError(
            f"alpaca_eval could not judge the outputs ({type(error).__name__}: {first_line(error)}); they and the "
            f"verdicts in {verdicts} (remove it to ask again) are kept: check server and key, and run the same command"
        ) from error
    for file in verdicts.parent.glob("alpaca_verdicts_*.json"):
        file.unlink()

    num_missing = 0
    for item, row in zip(items, annotations, strict=True):
        verdict = row["preference"]  # 1: the reference is better, 2: ours
        if verdict is None or math.isnan(verdict):
            item["preference"] = 0.5
            num_missing += 1
        else:
            item["preference"] = float(verdict) - 1

    preference = metric_from_items(items, "preference", unit="fraction")
    metrics: dict[str, Any] = {}
    # The rates are the package's, in which items without verdict do not count.
    rates = leaderboard.loc[name]
    if is_published:
        metrics["length_controlled_win_rate"] = preference | {
            "value": float(rates["length_controlled_winrate"]) / 100,
            "stderr": None,  # which the package does not give
        }
    metrics["win_rate"] = preference | {
        "value": float(rates["win_rate"] / 100),
        "stderr": float(rates["standard_error"] / 100),
    }
    metrics["preference"] = preference
    note = f"{num_missing} of {len(items)} items without verdict" if num_missing else ""
    return metrics, note
