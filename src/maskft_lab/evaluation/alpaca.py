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

from maskft.data.sources import check_unicode, read_file
from maskft.data.tokenizing import prompt_ids
from maskft_common import files, layout
from maskft_common.errors import UserError, first_line, install_hint

from ..generation.greedy import Bounds
from ..results.schema import data_sha256, metric_from_items
from .benchmarks import asking_hub
from .evaluation_arguments import ALPACA_EVAL, EvaluationArguments
from .heldout import end_tokens, task_record
from .journal import Journal, generated
from .load_models import Loaded

TASK_VERSION = 2
HUB_DATASET = "tatsu-lab/alpaca_eval"
HUB_FILE = "alpaca_eval_gpt4_baseline.json"
# The length-controlled rate is a regression, for which the package has the difficulty of each of these prompts.
PUBLISHED_REFERENCE = "gpt4_1106_preview"
PUBLISHED_NUM_PROMPTS = 805
# File of a judge's verdicts, beside the result until that is written.
_VERDICTS = "alpaca_verdicts_{}.json"


def alpaca_settings(options: EvaluationArguments) -> dict:
    """Further options that influence the numbers, for the result file."""
    annotator = options.alpaca_annotator
    # A file is named by its content, without its folder: results are shared.
    if annotator and Path(annotator).is_file():
        sha256 = files.digest_file(annotator)
        annotator = f"{Path(annotator).name} {sha256[:16]}"
    return {
        "annotator": annotator,
        "max_new_tokens": options.alpaca_max_new_tokens,
    }


def load_alpaca(options: EvaluationArguments) -> list[Mapping[str, Any]]:
    """The instructions with the reference outputs; they and the judge are checked before a model is loaded.

    Raises:
        UserError: For every problem with the files, and if the package that judges is not installed.
    """
    if options.reference_outputs is None:
        path = _published_file()
    else:
        path = files.expand_user(options.reference_outputs)
    references = []
    # Each row comes with its place in the file, for messages.
    for place, row in read_file(path):
        check_unicode(row, f"{path}: {place}")
        references.append(row)
    if not references or not all(_is_output(row) for row in references):
        raise UserError(f"{path}: AlpacaEval's files are JSON lists of objects with instruction and output")

    annotator = options.alpaca_annotator
    if annotator is not None:
        if importlib.util.find_spec("alpaca_eval") is None:
            raise UserError(f"alpaca_annotator needs alpaca_eval, which is not installed; {install_hint('alpaca')}")
        # Only with a judge: the package is optional, and slow to import.
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

        is_known = (EVALUATORS_CONFIG_DIR / annotator).is_dir()
        if not is_known and not Path(annotator).is_file():
            raise UserError(
                f"alpaca_annotator {annotator!r} is neither a file nor an annotator of alpaca_eval; name another"
            )
    return references[: options.limit]


def _is_output(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    return isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)


def _published_file() -> Path:
    from huggingface_hub import hf_hub_download

    with asking_hub(HUB_FILE, "name a file: --reference_outputs"):
        file = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset")
        return Path(file)


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
    # Answers
    model = loaded.model
    tokenizer = loaded.tokenizer
    instructions = [row["instruction"] for row in references]
    # Always as a chat: AlpacaEval's instructions are messages of users.
    chats = [{"prompt": [{"role": "user", "content": instruction}]} for instruction in instructions]
    prompts = [prompt_ids(chat, tokenizer) for chat in chats]
    bounds = Bounds(
        options.alpaca_max_new_tokens,
        options.batch_size,
        end_tokens=end_tokens(chats[0], tokenizer),
        option="alpaca_max_new_tokens",
    )
    answers = generated(model, tokenizer, prompts, bounds, f"{ALPACA_EVAL}: outputs", journal)

    # The published format, in which other tools judge them too
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
    text = json.dumps(outputs, indent=1, ensure_ascii=False)
    files.write_text(file, text + "\n")

    # Verdicts
    items: list[dict[str, Any]] = []
    for index, output in enumerate(outputs):
        # By position: the published rows have no ids, and two may have one instruction.
        items.append({"id": str(index), **output})
    metrics: dict[str, Any] = {}
    # The file's name without its folder: results are shared.
    note = f"{len(items)} outputs are in {file.name}, not judged: name a judge with --alpaca_annotator"
    if options.alpaca_annotator is not None:
        # A file for each judge: the package would take the verdicts of another one for those of this.
        judge = files.digest(alpaca_settings(options))[:16]
        verdicts = folder / _VERDICTS.format(judge)
        metrics, note = _judged(items, outputs, references, options.alpaca_annotator, verdicts)

    # The record
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


def _keep_verdicts_float(verdicts: Path) -> None:
    """Make the package able to read its own file of verdicts, all of which are usually whole numbers.

    It writes 1.5 into the column for equal outputs. pandas reads whole numbers as int64, and since 3.0 raises then. A
    row without a verdict keeps the column in floats; it belongs to no pair of outputs, and the package drops it when
    it saves.
    """
    if not verdicts.exists():
        return
    rows = files.read_json(verdicts)
    if not rows or any(row.get("preference") is None for row in rows):
        return
    # A row of the same columns, all of them null.
    nothing = dict.fromkeys(rows[0])
    files.write_text(verdicts, json.dumps([*rows, nothing]))


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

    # The length-controlled rate is defined for the published references only, all of them and in their order.
    name = outputs[0]["generator"]
    generators = [row.get("generator") for row in references]
    is_published = generators == [PUBLISHED_REFERENCE] * PUBLISHED_NUM_PROMPTS
    how: dict[str, Any] = {"fn_metric": "get_winrate"}
    if is_published:
        how = {
            "fn_metric": "get_length_controlled_winrate",
            # By default the package saves the regression's weights into its own folder.
            "metric_kwargs": {"save_weights_dir": None},
        }
    # Under one name: the package compares two generators, and a file of the user's may name none, or several.
    reference_outputs = [dict(row) | {"generator": PUBLISHED_REFERENCE} for row in references]
    try:
        _keep_verdicts_float(verdicts)
        leaderboard, annotations = evaluate(
            model_outputs=outputs,
            reference_outputs=reference_outputs,
            annotators_config=annotator,
            name=name,
            # No files of the package's own, and no leaderboard of other models.
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            sort_by="win_rate",
            # Pairs by position: by default they are merged on the instruction, which two items may share.
            annotation_kwargs={"is_ordered": True},
            caching_path=str(verdicts),
            **how,
        )
    except Exception as error:
        # Of the package, of a server's client, of the network.
        raise UserError(
            f"alpaca_eval could not judge the outputs ({type(error).__name__}: {first_line(error)}); they and the "
            f"verdicts in {verdicts} (remove it to ask again) are kept: check server and key, and run the same command"
        ) from error

    # Preferences, item by item
    num_missing = 0
    for item, row in zip(items, annotations, strict=True):
        # 1: the reference is better, 2: the model's output; None or NaN where the judge's answer cannot be read.
        verdict = row["preference"]
        if verdict is None or math.isnan(verdict):
            # As good as a tie, so that ``preference`` has a number for every item and can be compared item by item.
            item["preference"] = 0.5
            num_missing += 1
        else:
            item["preference"] = float(verdict) - 1

    # Metrics. The rates are the package's, in which items without verdict do not count.
    preference = metric_from_items(items, "preference", unit="fraction")
    metrics: dict[str, Any] = {}
    rates = leaderboard.loc[name]
    if is_published:
        metrics["length_controlled_win_rate"] = preference | {
            "value": float(rates["length_controlled_winrate"]) / 100,
            # The package gives none.
            "stderr": None,
        }
    metrics["win_rate"] = preference | {
        "value": float(rates["win_rate"] / 100),
        "stderr": float(rates["standard_error"] / 100),
    }
    metrics["preference"] = preference

    note = ""
    if num_missing:
        note = f"{num_missing} of {len(items)} items without verdict"
    return metrics, note


def remove_verdicts(folder: Path) -> None:
    """Remove the verdicts of all judges, once the result is written."""
    for file in folder.glob(_VERDICTS.format("*")):
        file.unlink()
