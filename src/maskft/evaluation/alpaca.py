"""AlpacaEval 2.0: the model's outputs in the published format, and their win rate against reference outputs.

Files of prompts, outputs and references are JSON lists of objects with ``instruction``, ``output`` and, where known,
``generator`` and ``dataset``. The verdicts are those of a judge (`judge`), the win rates the `alpaca_eval` package's.
"""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .. import files
from ..errors import UserError
from ..files import write_text
from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from .journal import Journal
from .judge import Judge, JudgeSettings, length_controlled_win_rate, preferences

ALPACA_EVAL = "alpaca_eval"
TASK_VERSION = 1

HUB_DATASET = "tatsu-lab/alpaca_eval"
HUB_PROMPTS, HUB_LENGTH_CONTROL = "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"

# What the leaderboard was made with.
PUBLISHED_JUDGE, PUBLISHED_HOST = "gpt-4-1106-preview", "api.openai.com"
PUBLISHED_REFERENCE, PUBLISHED_NUM_PROMPTS = "gpt4_1106_preview", 805
LENGTH_CONTROL_COLUMNS = ("model", "index", "preference", "std_delta_len", "instruction_difficulty")

Row = Mapping[str, str]


def add_alpaca_arguments(parser) -> None:
    """Options of the task ``alpaca_eval``."""
    group = parser.add_argument_group(
        "alpaca_eval",
        "Answers to instructions, judged against reference answers by a model of your choice: pip install "
        f"'maskft[alpaca]'. Where a file is asked for, {HUB_DATASET} means the published one, from the hub.",
    )
    group.add_argument(
        "--alpaca_prompts",
        metavar="FILE",
        help="JSON list of objects with `instruction` (default: the instructions of --reference_outputs)",
    )
    group.add_argument(
        "--alpaca_outputs",
        metavar="FILE",
        help="outputs to judge, with `instruction` and `output`, instead of generating them",
    )
    group.add_argument(
        "--reference_outputs", metavar="FILE", help="what the judge compares with, with `instruction` and `output`"
    )
    group.add_argument(
        "--judge_url",
        metavar="URL",
        help="server of the OpenAI protocol, such as http://localhost:8000/v1; its key is read from JUDGE_API_KEY, for "
        f"{PUBLISHED_HOST} also from OPENAI_API_KEY (default: the outputs are written and not judged)",
    )
    group.add_argument("--judge_model", metavar="NAME", help="the judge's name at that server")
    group.add_argument(
        "--judge_timeout", type=float, default=120, help="wait so long for an answer, in seconds (default: %(default)s)"
    )
    group.add_argument(
        "--judge_retries",
        type=int,
        default=5,
        help="ask again so often, waiting 0.5 s, then each time twice as long, at most 8 s (default: %(default)s)",
    )
    group.add_argument(
        "--length_control",
        metavar="FILE",
        help=f"{HUB_LENGTH_CONTROL} of the published data, for its 805 prompts (default: length alone is used)",
    )
    group.add_argument(
        "--alpaca_max_new_tokens", type=int, default=2048, help="bound on an answer, in tokens (default: %(default)s)"
    )


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
    judge: JudgeSettings | None
    length_control: Path | None
    max_new_tokens: int
    is_published_data: bool

    def settings(self) -> dict:
        """What else shapes the numbers, for the result file."""
        return {
            "judge_model": self.judge.model if self.judge else None,
            "judge_host": urlsplit(self.judge.url).netloc.rpartition("@")[2] if self.judge else None,
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

    def check_model(self, loaded) -> None:
        """Refuse a model that cannot answer."""
        if self.outputs is not None:
            return
        if loaded.model is None:
            raise UserError(
                "backend vllm does not generate outputs for alpaca_eval; use --backend hf, or pass --alpaca_outputs"
            )
        if not getattr(loaded.tokenizer, "chat_template", None):
            raise UserError(
                "task alpaca_eval puts its instructions into the chat template, and this model's tokenizer has none; "
                "evaluate a chat model"
            )

    def differences_from_leaderboard(self) -> list[str]:
        """Why the numbers cannot be put beside the leaderboard's; empty if they can."""
        found = []
        if self.judge.model != PUBLISHED_JUDGE or urlsplit(self.judge.url).hostname != PUBLISHED_HOST:
            found.append(f"the judge is {self.judge.model}, not {PUBLISHED_HOST}'s {PUBLISHED_JUDGE}")
        if not self.is_published_data:
            found.append(f"not the {PUBLISHED_NUM_PROMPTS} prompts with {PUBLISHED_REFERENCE}'s references")
        if not self.length_control:
            found.append("length is controlled for without the published data")
        return found


def load_alpaca(args) -> AlpacaEval:
    """Read and check what the options name, before a model is loaded.

    Args:
        args: With the attributes that `add_alpaca_arguments` defines, ``limit`` and ``adapter``.

    Raises:
        UserError: For every problem with files or options, and if the judge cannot be reached.
    """
    if args.alpaca_max_new_tokens < 1:
        raise UserError(f"alpaca_max_new_tokens is {args.alpaca_max_new_tokens}; it must be at least 1")
    if not args.alpaca_prompts and not args.reference_outputs and not args.alpaca_outputs:
        raise UserError("task alpaca_eval has no prompts; name a file with --alpaca_prompts or --reference_outputs")
    if args.alpaca_outputs and len(args.adapter) > 1:
        raise UserError(
            f"alpaca_outputs are of one model, and {len(args.adapter)} adapters are given; give one at a time"
        )
    judge = _judge_settings(args)
    source = args.alpaca_outputs or args.alpaca_prompts or args.reference_outputs
    prompts = read_rows(source, ("instruction", "output") if args.alpaca_outputs else ("instruction",))
    if args.alpaca_outputs and args.alpaca_prompts:
        prompts = _matched(read_rows(args.alpaca_prompts, ("instruction",)), prompts, args.alpaca_outputs, "output")[0]
    prompts = prompts[: args.limit]
    references, indices, is_published = None, [], False
    if args.reference_outputs:
        rows = read_rows(args.reference_outputs, ("instruction", "output"))
        references, indices = _matched(prompts, rows, args.reference_outputs, "reference")
        is_published = len(prompts) == len(rows) == PUBLISHED_NUM_PROMPTS and all(
            row.get("generator") == PUBLISHED_REFERENCE for row in rows
        )
    length_control = None
    if args.length_control:
        length_control = _length_control_file(args.length_control, indices)
    if judge:
        Judge(judge).check_reachable()
    return AlpacaEval(
        prompts=prompts,
        outputs=[row["output"] for row in prompts] if args.alpaca_outputs else None,
        references=references,
        reference_indices=indices,
        judge=judge,
        length_control=length_control,
        max_new_tokens=args.alpaca_max_new_tokens,
        is_published_data=is_published,
    )


def evaluate_alpaca(
    loaded,
    task: AlpacaEval,
    name: str,
    folder: Path,
    journal: Journal,
    *,
    batch_size=None,
    max_memory_gb=None,
    console=None,
) -> dict:
    """Generate the outputs, write them to ``folder`` in the published format, and have them judged.

    Args:
        loaded: The model, a `load.Loaded`.
        task: From `load_alpaca`.
        name: The model's label, the ``generator`` of its outputs.
        folder: Where the outputs are written.
        journal: Keeps outputs and verdicts, so that a run that ends early goes on.
        batch_size: Items at one time; None: by ``max_memory_gb``.
        max_memory_gb: Bound on the memory of a batch, in 10^9 bytes; None: half of what is free.
        console: Where progress bars go.

    Returns:
        A task record of the result schema; without a judge it has outputs and no metric. ``preference`` is the judge's
        probability that the model's output is the better one, item by item, and 0.5 where it gave no verdict.

    Raises:
        UserError: If the judge stops answering or gives no verdict at all.
    """
    from .heldout import chat_template_hash

    outputs, template = task.outputs, None
    if outputs is None:
        outputs = _generate(loaded, task, journal, batch_size, max_memory_gb, console)
        template = chat_template_hash(loaded.tokenizer)
    rows = [
        {**{key: row[key] for key in ("dataset",) if key in row}, "instruction": row["instruction"], "output": output}
        for row, output in zip(task.prompts, outputs, strict=True)
    ]
    file = folder / files.ALPACA_OUTPUTS
    write_text(file, json.dumps([{**row, "generator": name} for row in rows], indent=1, ensure_ascii=False) + "\n")
    items = [{"id": str(index), **row, "output_length": len(row["output"])} for index, row in enumerate(rows)]
    metrics, extra, version = {}, {}, str(TASK_VERSION)
    if task.judge:
        metrics, extra = _judged(items, task, journal, console)
        version += f"; {extra['annotator']}; judge {task.judge.model}; {task.formula}"
    else:
        extra["note"] = f"{len(items)} outputs are in {file}, not judged: name a judge with --judge_url"
    record = build_task(
        items,
        metrics,
        version=version,
        num_fewshot=0,
        fingerprint=items_fingerprint(
            {
                "id": item["id"],
                "prompt": item["instruction"],
                "reference": task.references[index]["output"] if task.references else None,
            }
            for index, item in enumerate(items)
        ),
        chat_template_hash=template,
    )
    made = {"data_sha256": task.data_sha256, "outputs_from_file": task.outputs is not None}
    if task.outputs is None:
        made["generation_kwargs"] = {"max_gen_toks": task.max_new_tokens}
    return record | made | extra


def read_rows(source: str, fields: Sequence[str]) -> list[dict]:
    """Read a file in the published format, a JSON list of objects.

    Args:
        source: Path, or the hub data set's name.
        fields: What every object must have, as text.

    Raises:
        UserError: If it cannot be read or is in another format; which item and field.
    """
    path = _file(source, HUB_PROMPTS)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); AlpacaEval's files are JSON lists of objects") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a JSON list of objects, as AlpacaEval's files are")
    if not rows:
        raise UserError(f"{path}: the list is empty; give at least one object")
    for number, row in enumerate(rows):
        for field in fields:
            if not isinstance(row.get(field), str):
                problem = f"{field} is no text" if field in row else f"no field {field!r}"
                raise UserError(f"{path}: item {number}: {problem}; every object needs {' and '.join(fields)}")
    return rows


def _file(source: str, hub_name: str) -> Path:
    if source == HUB_DATASET:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(HUB_DATASET, hub_name, repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"{hub_name} of {HUB_DATASET} cannot be downloaded: {str(error).splitlines()[0]}") from None
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{source}: no such file; give a file, or {HUB_DATASET}")
    return path


def _judge_settings(args) -> JudgeSettings | None:
    if not args.judge_url:
        if args.judge_model:
            raise UserError("judge_model is given without judge_url; name the judge's server with --judge_url")
        return None
    for option in ("judge_model", "reference_outputs"):
        if not getattr(args, option):
            raise UserError(f"judge_url is given without {option}; pass --{option}")
    if urlsplit(args.judge_url).scheme not in ("http", "https") or not urlsplit(args.judge_url).hostname:
        raise UserError(f"judge_url is {args.judge_url!r}; it must look like http://localhost:8000/v1")
    if args.judge_timeout <= 0:
        raise UserError(f"judge_timeout is {args.judge_timeout}; it must be above 0 seconds")
    if args.judge_retries < 0:
        raise UserError(f"judge_retries is {args.judge_retries}; it must be at least 0")
    if importlib.util.find_spec("alpaca_eval") is None:
        raise UserError(
            "task alpaca_eval is judged by alpaca_eval, which is not installed; run: pip install 'maskft[alpaca]'"
        )
    return JudgeSettings(args.judge_url, args.judge_model, args.judge_timeout, args.judge_retries)


def _matched(prompts: Sequence[Row], rows: Sequence[Row], source: str, what: str) -> tuple[list[Row], list[int]]:
    """For each prompt the row with its instruction, and that row's position; repeated instructions in their order."""
    positions = defaultdict(list)
    for index, row in enumerate(rows):
        positions[row["instruction"]].append(index)
    used: dict[str, int] = defaultdict(int)
    indices = []
    for number, prompt in enumerate(prompts):
        found = positions.get(prompt["instruction"])
        if not found:
            missing = sum(row["instruction"] not in positions for row in prompts)
            start = prompt["instruction"][:60]
            raise UserError(f"{source}: no {what} for instruction {number}, {start!r} ({missing} are missing)")
        indices.append(found[min(used[prompt["instruction"]], len(found) - 1)])
        used[prompt["instruction"]] += 1
    return [rows[index] for index in indices], indices


def _length_control_file(source: str, indices: Sequence[int]) -> Path:
    import pandas as pd

    path = _file(source, HUB_LENGTH_CONTROL)
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise UserError(f"{path}: not a CSV file ({str(error).splitlines()[0]}); give {HUB_LENGTH_CONTROL}") from None
    for column in LENGTH_CONTROL_COLUMNS:
        if column not in table:
            raise UserError(f"{path}: no column {column!r}; give {HUB_LENGTH_CONTROL} of {HUB_DATASET}")
    # It knows prompts by their position alone.
    if indices and set(indices) - set(table["index"]):
        raise UserError(
            f"{path}: it is for {table['index'].nunique()} prompts and does not know number {max(indices)}; leave "
            "--length_control out for other prompts"
        )
    return path


def _generate(loaded, task: AlpacaEval, journal: Journal, batch_size, max_memory_gb, console) -> list[str]:
    from ..data import prompt_ids
    from .heldout import resumed_answers

    prompts = [
        prompt_ids({"prompt": [{"role": "user", "content": row["instruction"]}]}, loaded.tokenizer)
        for row in task.prompts
    ]
    answers = resumed_answers(
        loaded.model,
        loaded.tokenizer,
        prompts,
        journal,
        f"{ALPACA_EVAL}_output",
        f"{ALPACA_EVAL}: outputs",
        max_new_tokens=task.max_new_tokens,
        batch_size=batch_size,
        max_memory_gb=max_memory_gb,
        console=console,
    )
    return [answer.strip() for answer in answers]


def _judged(items: list[dict], task: AlpacaEval, journal: Journal, console) -> tuple[dict, dict]:
    """Add the verdicts to ``items``; return the metrics and what else the record says about them."""
    pairs = [
        {"instruction": item["instruction"], "output_1": reference["output"], "output_2": item["output"]}
        for item, reference in zip(items, task.references, strict=True)
    ]
    verdicts = preferences(pairs, Judge(task.judge, journal, console))
    for item, pair, verdict in zip(items, pairs, verdicts.values, strict=True):
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
    differences = task.differences_from_leaderboard()
    notes = []
    if differences:
        notes.append(f"not comparable with the leaderboard: {'; '.join(differences)}")
    if len(judged) < len(items):
        reason = f", {verdicts.reason}" if verdicts.reason else ""
        notes.append(f"{len(items) - len(judged)} of {len(items)} items without verdict{reason}")
    return metrics, {
        "annotator": verdicts.annotator,
        "judge_model": task.judge.model,
        "num_unjudged": len(items) - len(judged),
        "comparable_with_leaderboard": not differences,
        "note": ". ".join(notes) or None,
    }
