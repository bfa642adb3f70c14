"""AlpacaEval 2.0: the model's outputs in the published format, and their win rate against reference outputs.

Files of prompts, outputs and references are JSON lists of objects with ``instruction``, ``output`` and, where known,
``generator`` and ``dataset``. The verdicts are those of a judge (`judge`), the win rates the `alpaca_eval` package's.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, RootModel

from maskft.data import prompt_ids
from maskft_base import files
from maskft_base.errors import UserError, first_line

from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from .arguments import ALPACA_EVAL, HUB_DATASET, AlpacaArguments
from .heldout import chat_template_hash
from .journal import Resources, generated
from .judge import ANNOTATOR, OPENAI_HOST, Judge, length_controlled_win_rate, preferences

TASK_VERSION = 1
HUB_PROMPTS, HUB_LENGTH_CONTROL = "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"
# What the leaderboard was made with.
PUBLISHED_JUDGE, PUBLISHED_REFERENCE, PUBLISHED_NUM_PROMPTS = "gpt-4-1106-preview", "gpt4_1106_preview", 805
LENGTH_CONTROL_COLUMNS = {"model", "index", "preference", "std_delta_len", "instruction_difficulty"}

Row = Mapping[str, str]


class _Prompt(BaseModel):
    instruction: str


class _Output(_Prompt):
    output: str


@dataclass(frozen=True)
class AlpacaEval:
    """What is to be answered, and how it is judged; everything in it has been checked.

    Args:
        prompts: Rows with ``instruction``, and ``dataset`` where known.
        outputs: Output of each prompt; None: the model generates them.
        references: Reference row of each prompt; None: not judged.
        reference_indices: Position of each prompt's reference in its file.
        judge: None: not judged.
        length_control: The published file for length control; None: length alone.
        max_new_tokens: Bound on an answer.
        is_published_data: Whether prompts and references look like the published ones.
    """

    prompts: Sequence[Row]
    outputs: Sequence[str] | None
    references: Sequence[Row] | None
    reference_indices: Sequence[int]
    judge: Judge | None
    length_control: Path | None
    max_new_tokens: int
    is_published_data: bool

    def settings(self) -> dict:
        """What else shapes the numbers, for the result file."""
        return {
            "judge_model": self.judge.model if self.judge else None,
            "judge_host": self.judge.host if self.judge else None,
            "length_control": self.formula if self.judge else None,
            "max_new_tokens": self.max_new_tokens if self.outputs is None else None,
        }

    @property
    def data_sha256(self) -> str:
        """`results.data_sha256` of prompts, given outputs and references."""
        return data_sha256([self.prompts, self.outputs, self.references])

    @property
    def formula(self) -> str:
        """The package's name of the regression that controls for length."""
        return "length_controlled_v1" if self.length_control else "length_controlled_minimal"

    def differences_from_leaderboard(self) -> list[str]:
        """Why the numbers are not comparable with the leaderboard's; empty if they are."""
        is_published = (self.judge.model, self.judge.host) == (PUBLISHED_JUDGE, OPENAI_HOST)
        reasons = {
            f"the judge is {self.judge.model}, not {OPENAI_HOST}'s {PUBLISHED_JUDGE}": is_published,
            f"not the {PUBLISHED_NUM_PROMPTS} prompts with {PUBLISHED_REFERENCE}'s references": self.is_published_data,
            "length is controlled for without the published data": self.length_control is not None,
        }
        return [reason for reason, is_met in reasons.items() if not is_met]


# Reading and checking


def load_alpaca(options: AlpacaArguments, limit: int | None) -> AlpacaEval:
    """Read and check what the options name, before a model is loaded; the first ``limit`` prompts only.

    Raises:
        UserError: For every problem with files or options, and if the judge cannot be reached.
    """
    source = options.alpaca_outputs or options.alpaca_prompts or options.reference_outputs
    if not source:
        raise UserError("task alpaca_eval has no prompts; name a file with --alpaca_prompts or --reference_outputs")
    judge = _judge(options)
    prompts = read_rows(source, _Output if options.alpaca_outputs else _Prompt)
    if options.alpaca_outputs and options.alpaca_prompts:
        prompts = _matched(read_rows(options.alpaca_prompts, _Prompt), prompts, options.alpaca_outputs, "output")[0]
    prompts = prompts[:limit]
    references, indices, is_published = None, [], False
    if options.reference_outputs:
        rows = read_rows(options.reference_outputs, _Output)
        references, indices = _matched(prompts, rows, options.reference_outputs, "reference")
        is_published = len(prompts) == len(rows) == PUBLISHED_NUM_PROMPTS and all(
            row.get("generator") == PUBLISHED_REFERENCE for row in rows
        )
    length_control = _length_control(options.length_control, indices) if options.length_control else None
    if judge:
        judge.check_reachable()
    return AlpacaEval(
        prompts=prompts,
        outputs=[row["output"] for row in prompts] if options.alpaca_outputs else None,
        references=references,
        reference_indices=indices,
        judge=judge,
        length_control=length_control,
        max_new_tokens=options.alpaca_max_new_tokens,
        is_published_data=is_published,
    )


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _judge(options: AlpacaArguments) -> Judge | None:
    if not options.judge_url:
        if options.judge_model:
            raise UserError("judge_model is given without judge_url; name the judge's server with --judge_url")
        return None
    for option in ("judge_model", "reference_outputs"):
        if not getattr(options, option):
            raise UserError(f"judge_url is given without {option}; pass --{option}")
    url = urlsplit(options.judge_url)
    url = url._replace(netloc=url.netloc.rpartition("@")[2])  # no password in a message
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"judge_url is {url.geturl()!r}; it must look like http://localhost:8000/v1")
    if url.scheme == "http" and not _is_this_machine(url.hostname):
        raise UserError(
            f"judge_url {url.geturl()!r} would send prompts and key in the clear; use https, or a tunnel to localhost"
        )
    if importlib.util.find_spec("alpaca_eval") is None:
        raise UserError(
            "task alpaca_eval is judged by alpaca_eval, which is not installed; run: pip install 'maskft[alpaca]'"
        )
    return Judge(options.judge_url, options.judge_model, options.judge_timeout, options.judge_retries)


def read_rows(source: str, row: type[BaseModel]) -> list[dict]:
    """Read a file in the published format, a JSON list of objects that hold what ``row`` asks for.

    Raises:
        UserError: If it cannot be read or is in another format; which item and field.
    """
    path = _file(source, HUB_PROMPTS)
    try:
        rows = files.parse_json(files.read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); AlpacaEval's files are JSON lists of objects") from None
    files.read_model(RootModel[list[row]], rows, path, "AlpacaEval's files are JSON lists of objects")
    if not rows:
        raise UserError(f"{path}: the list is empty; give at least one object")
    return rows


def _file(source: str, hub_name: str) -> Path:
    if source == HUB_DATASET:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(HUB_DATASET, hub_name, repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"{hub_name} of {HUB_DATASET} cannot be downloaded: {first_line(error)}") from None
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{source}: no such file; give a file, or {HUB_DATASET}")
    return path


def _matched(prompts: Sequence[Row], rows: Sequence[Row], source: str, what: str) -> tuple[list[Row], list[int]]:
    """For each prompt the row with its instruction, and that row's position; repeated instructions in their order."""
    positions = defaultdict(list)
    for index, row in enumerate(rows):
        positions[row["instruction"]].append(index)
    indices = []
    for number, prompt in enumerate(prompts):
        found = positions.get(prompt["instruction"])
        if not found:
            missing = sum(row["instruction"] not in positions for row in prompts)
            start = prompt["instruction"][:60]
            raise UserError(f"{source}: no {what} for instruction {number}, {start!r} ({missing} are missing)")
        indices.append(found.pop(0) if len(found) > 1 else found[0])
    return [rows[index] for index in indices], indices


def _length_control(source: str, indices: Sequence[int]) -> Path:
    import pandas as pd

    path = _file(source, HUB_LENGTH_CONTROL)
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise UserError(f"{path}: not a CSV file ({first_line(error)}); give {HUB_LENGTH_CONTROL}") from None
    if missing := sorted(LENGTH_CONTROL_COLUMNS - set(table)):
        raise UserError(f"{path}: no column {', '.join(missing)}; give {HUB_LENGTH_CONTROL} of {HUB_DATASET}")
    # It knows prompts by their position alone.
    if set(indices) - set(table["index"]):
        raise UserError(
            f"{path}: it is for {table['index'].nunique()} prompts and does not know number {max(indices)}; leave "
            "--length_control out for other prompts"
        )
    return path


# Answering and judging


def check_model(task: AlpacaEval, model, tokenizer) -> None:
    """Refuse a model that cannot answer."""
    if task.outputs is not None:
        return
    if model is None:
        raise UserError(
            "backend vllm does not generate outputs for alpaca_eval; use --backend hf, or pass --alpaca_outputs"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "task alpaca_eval puts its instructions into the chat template, and this model's tokenizer has none; "
            "evaluate a chat model"
        )


def evaluate_alpaca(model, tokenizer, task: AlpacaEval, name: str, folder: Path, resources: Resources) -> dict:
    """Generate the outputs, write them to ``folder`` in the published format, and have them judged.

    Args:
        model: A causal language model; None where the task has outputs.
        tokenizer: Its tokenizer.
        task: From `load_alpaca`.
        name: The model's label, the ``generator`` of its outputs.
        folder: Where the outputs are written.
        resources: Bounds on a batch, journal and console.

    Returns:
        A task record of the result schema; without a judge it has outputs and no metric. ``preference`` is the judge's
        probability that the model's output is the better one, item by item, and 0.5 where it gave no verdict.

    Raises:
        UserError: If the judge stops answering or gives no verdict at all.
    """
    outputs, made = task.outputs, {}
    if outputs is None:
        chats = [{"prompt": [{"role": "user", "content": row["instruction"]}]} for row in task.prompts]
        prompts, kind = [prompt_ids(chat, tokenizer) for chat in chats], f"{ALPACA_EVAL}_output"
        answers = generated(model, tokenizer, prompts, task.max_new_tokens, kind, f"{ALPACA_EVAL}: outputs", resources)
        outputs = [answer.strip() for answer in answers]
        made = {"generation_kwargs": {"max_gen_toks": task.max_new_tokens}}
    rows = [
        {**{key: row[key] for key in ("dataset",) if key in row}, "instruction": row["instruction"], "output": output}
        for row, output in zip(task.prompts, outputs, strict=True)
    ]
    file = folder / files.ALPACA_OUTPUTS
    named = [{**row, "generator": name} for row in rows]
    files.write_text(file, json.dumps(named, indent=1, ensure_ascii=False) + "\n")
    items = [{"id": str(index), **row, "output_length": len(row["output"])} for index, row in enumerate(rows)]
    metrics, version = {}, str(TASK_VERSION)
    extra = {"note": f"{len(items)} outputs are in {file}, not judged: name a judge with --judge_url"}
    if task.judge:
        metrics, extra = _judged(items, task, resources)
        version += f"; {ANNOTATOR}; judge {task.judge.model}; {task.formula}"
    references = [row["output"] for row in task.references] if task.references else [None] * len(items)
    record = build_task(
        items,
        metrics,
        version=version,
        num_fewshot=0,
        fingerprint=items_fingerprint(
            {"id": item["id"], "prompt": item["instruction"], "reference": reference}
            for item, reference in zip(items, references, strict=True)
        ),
        chat_template_hash=chat_template_hash(tokenizer) if task.outputs is None else None,
    )
    given = {"data_sha256": task.data_sha256, "outputs_from_file": task.outputs is not None}
    return record | given | made | extra


def _judged(items: list[dict], task: AlpacaEval, resources: Resources) -> tuple[dict, dict]:
    """Add the verdicts to ``items``; return the metrics and what else the record says about them."""
    pairs = [
        {"instruction": item["instruction"], "output_1": reference["output"], "output_2": item["output"]}
        for item, reference in zip(items, task.references, strict=True)
    ]
    verdicts, reason = preferences(pairs, task.judge, resources)
    for item, pair, verdict in zip(items, pairs, verdicts, strict=True):
        item["reference_length"] = len(pair["output_1"])
        item["judged"] = int(verdict is not None)
        item["preference"] = 0.5 if verdict is None else verdict
    judged = [item for item in items if item["judged"]]
    metrics = {
        "length_controlled_win_rate": length_controlled_win_rate(
            [item["preference"] for item in judged],
            [item["reference_length"] for item in judged],
            [item["output_length"] for item in judged],
            [task.reference_indices[int(item["id"])] for item in judged],
            formula=task.formula,
            published_data=task.length_control,
        ),
        # As the package has it: items without verdict do not count.
        "win_rate": metric_from_items(judged, "preference", unit="fraction"),
        "preference": metric_from_items(items, "preference", unit="fraction"),
    }
    differences, num_unjudged = task.differences_from_leaderboard(), len(items) - len(judged)
    notes = [f"not comparable with the leaderboard: {'; '.join(differences)}"] if differences else []
    if num_unjudged:
        notes.append(f"{num_unjudged} of {len(items)} items without verdict, {reason}")
    return metrics, {
        "annotator": ANNOTATOR,
        "judge_model": task.judge.model,
        "num_unjudged": num_unjudged,
        "comparable_with_leaderboard": not differences,
        "note": ". ".join(notes) or None,
    }
