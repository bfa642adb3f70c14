"""The benchmarks of ``maskft evaluate``: their tasks in lm-eval, and their items from files or the hub.

A benchmark is one entry of `BENCHMARKS`; everything else follows from it. Other tasks of lm-eval need no entry.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

from maskft.data.sources import check_unicode, read_file
from maskft_common.errors import UserError, first_line, install_hint
from maskft_common.files import expand_user

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

# These instructions of IFEval split text with NLTK's tables; all others need no data.
_PUNKT_INSTRUCTIONS = (
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
)
_IFEVAL_METRICS = (
    "prompt_level_strict",
    "prompt_level_loose",
    "inst_level_strict",
    "inst_level_loose",
)

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval, and the source of its items.

    Args:
        config: lm-eval's YAML file, below its folder of tasks.
        lm_eval_task: lm-eval's name of the task.
        metrics: lm-eval's ``metric,filter`` -> our name; the first is the benchmark's main metric.
        files: Regular expression of file names without ending, any case.
        fields: Field -> type that every item must have.
        hub: Name on the hub.
        configs: Configurations of the hub's data set, all of which are joined.
        split: Of the hub's data set.
        use_chat_template: Whether prompts are put into the chat template unless the user decides.
        id_field: Field that identifies an item; None: its position.
        program: Of tasks that run the answer: the program that scores an answer to an item.
        prepare: Called with the items and the data folder before the task is built; raises if something is missing.
    """

    config: str
    lm_eval_task: str
    metrics: Mapping[str, str]
    files: str
    fields: Mapping[str, type]
    hub: str
    configs: tuple[str | None, ...] = (None,)
    split: str = "test"
    use_chat_template: bool = False
    id_field: str | None = None
    program: Callable[[Row, str], str] | None = None
    prepare: Callable[[datasets.Dataset, str | Path | None], None] = lambda docs, data_dir: None


def code_with_tests(row: Row, completion: str) -> str:
    """The program that scores an answer to an item of HumanEval, put together as its own scorer does it."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def without_nltk_downloads():
    """A context in which importing lm-eval's IFEval does not download NLTK's tables without being asked."""
    # lm-eval calls nltk.download() when the module is imported.
    # mock.patch would raise without the module.
    if importlib.util.find_spec("nltk") is None:
        return contextlib.nullcontext()
    return mock.patch("nltk.download", return_value=False)


def _prepare_ifeval(docs: datasets.Dataset, data_dir: str | Path | None) -> None:
    """Make IFEval's checks repeatable, and check that their data is installed."""
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise UserError(f"task ifeval lacks a package ({error}); {install_hint('eval')}") from error

    # It draws at random: without a seed the same answer could get another score.
    langdetect.DetectorFactory.seed = 0

    # The tables may be beside the benchmarks' files.
    if data_dir:
        tables = str(expand_user(data_dir) / "nltk_data")
        if tables not in nltk.data.path:
            nltk.data.path.append(tables)
    try:
        nltk.data.find("tokenizers/punkt_tab")
        return
    except LookupError:
        pass

    # They are missing, which matters only to some instructions: few items may be asked (--limit).
    needed: set[str] = set()
    for doc in docs:
        # Of the items that are asked only.
        needed |= set(doc["instruction_id_list"]) & set(_PUNKT_INSTRUCTIONS)
    if needed:
        raise UserError(
            f"task ifeval needs NLTK's punkt_tab for {', '.join(sorted(needed))}, which is not installed; run: "
            "python -m nltk.downloader punkt_tab, or set NLTK_DATA to a folder with tokenizers/punkt_tab"
        )


def _humaneval(name: str, files: str, hub: str) -> Benchmark:
    """HumanEval, or HumanEval+ with more tests of the same functions.

    Args:
        name: lm-eval's name of the task.
        files: Regular expression of file names, see `Benchmark`.
        hub: Name on the hub.
    """
    return Benchmark(
        config=f"humaneval/{name}.yaml",
        lm_eval_task=name,
        metrics={"pass_at_1,create_test": "pass_at_1"},
        files=files,
        fields={
            "task_id": str,
            "prompt": str,
            "entry_point": str,
            "test": str,
        },
        hub=hub,
        id_field="task_id",
        program=code_with_tests,
    )


BENCHMARKS = {
    "gsm8k": Benchmark(
        config="gsm8k/gsm8k-cot.yaml",
        lm_eval_task="gsm8k_cot",
        metrics={
            "exact_match,flexible-extract": "accuracy",
            "exact_match,strict-match": "accuracy_strict",
        },
        files=r"gsm8k.*test.*",
        fields={"question": str, "answer": str},
        hub="openai/gsm8k",
        configs=("main",),
    ),
    "minerva_math": Benchmark(
        config="minerva_math/minerva_math_algebra.yaml",
        # Its seven subjects are one task here: lm-eval's YAML files of the others include that of algebra.
        lm_eval_task="minerva_math",
        metrics={
            "math_verify,none": "accuracy",
            "exact_match,none": "exact_match",
        },
        files=r"(minerva[-_]|hendrycks[-_])?math[-_]?(500)?[-_]?test.*",
        fields={"problem": str, "solution": str},
        hub="EleutherAI/hendrycks_math",
        configs=MATH_SUBJECTS,
    ),
    "humaneval": _humaneval(
        "humaneval",
        files=r"human[-_]?eval",
        hub="openai/openai_humaneval",
    ),
    "humaneval_plus": _humaneval(
        "humaneval_plus",
        files=r"human[-_]?eval[-_]?plus.*",
        hub="evalplus/humanevalplus",
    ),
    "ifeval": Benchmark(
        config="ifeval/ifeval.yaml",
        lm_eval_task="ifeval",
        metrics={f"{name}_acc,none": f"{name}_acc" for name in _IFEVAL_METRICS},
        files=r"if[-_]?eval.*|input_data",
        fields={
            "key": int,
            "prompt": str,
            "instruction_id_list": list,
            "kwargs": list,
        },
        hub="google/IFEval",
        split="train",
        use_chat_template=True,
        id_field="key",
        prepare=_prepare_ifeval,
    ),
}


# Items


@contextlib.contextmanager
def asking_hub(name: str, otherwise: str) -> Iterator[None]:
    """A context in which an error of the hub becomes one line, with the remedy."""
    try:
        yield
    except Exception as error:
        # Of many types: no network, no such name, no access.
        raise UserError(
            f"the hub did not give {name!r} ({type(error).__name__}: {first_line(error)}); {otherwise}"
        ) from None


def load_docs(task: str, data_dir: str | Path | None) -> datasets.Dataset:
    """The items of a benchmark, checked.

    Args:
        task: Key of ``BENCHMARKS``.
        data_dir: Folder that holds the published files, searched with all folders below it; None: the hub.

    Raises:
        UserError: If there is no such file, several, or a row is not an item of the benchmark.
    """
    if data_dir is None:
        return _from_hub(BENCHMARKS[task])

    file = find_file(task, expand_user(data_dir))
    fields = BENCHMARKS[task].fields
    rows: list[dict[str, Any]] = []
    for place, row in read_file(file):
        if not _is_item(row, fields):
            pairs = [f"{name} ({kind.__name__})" for name, kind in fields.items()]
            wanted = ", ".join(pairs)
            raise UserError(f"{file}: {place} is not an item of {task}, which has {wanted}; is it the published file?")
        # Without other columns, whose types may differ from row to row: a Dataset takes one type per column.
        item = {name: row[name] for name in fields}
        check_unicode(item, f"{file}: {place}")
        rows.append(item)
    if not rows:
        raise UserError(f"{file} has no rows")
    return datasets.Dataset.from_list(rows)


def _is_item(row: Any, fields: Mapping[str, type]) -> bool:
    if not isinstance(row, dict):
        return False
    return all(isinstance(row.get(name), kind) for name, kind in fields.items())


def find_file(task: str, folder: Path) -> Path:
    """The file of a benchmark in a folder and the folders below it.

    Raises:
        UserError: If there is none, or several.
    """
    found = benchmark_files(task, folder)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        problem = f"several test files of {task} ({names}); keep one"
    else:
        pattern = BENCHMARKS[task].files
        problem = f"no test file of {task}; its name must match {pattern!r} ({', '.join(ENDINGS)})"
    raise UserError(f"data_dir {str(folder)!r} holds {problem}")


def benchmark_files(task: str, folder: Path) -> list[Path]:
    """Every file of a benchmark in a folder and the folders below it; none for tasks that are not read from files."""
    if task not in BENCHMARKS:
        return []
    # The whole name must match: ``humaneval_plus.jsonl`` must not be taken for a file of humaneval.
    endings = "|".join(map(re.escape, ENDINGS))
    pattern = re.compile(f"({BENCHMARKS[task].files})({endings})", re.IGNORECASE)
    named = [path for path in folder.rglob("*") if pattern.fullmatch(path.name)]
    return sorted(path for path in named if path.is_file())


def _from_hub(benchmark: Benchmark) -> datasets.Dataset:
    parts: list[datasets.Dataset] = []
    with asking_hub(benchmark.hub, "with the files on this machine, name their folder: --data_dir"):
        for config in benchmark.configs:
            part = datasets.load_dataset(benchmark.hub, config, split=benchmark.split)
            parts.append(part)
    # As from files, without other columns.
    fields = list(benchmark.fields)
    parts = [part.select_columns(fields) for part in parts]
    return datasets.concatenate_datasets(parts)
