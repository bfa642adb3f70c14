"""Benchmarks by lm-eval: its tasks, built on data from files or the hub, and its scores as records of a result file.

Prompts, stop strings, answer extraction and scores are lm-eval's. Two things differ. Data may come from files, and
model-written code runs in our sandbox: lm-eval's own scorer downloads a metric and runs code in a plain process.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskft_common.errors import UserError, did_you_mean, first_line, install_hint
from maskft_common.files import expand_user
from maskft_common.progress_bar import Progress

from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from ..results.statistics import weighted_mean
from ..sandbox.sandbox import check_allowed, run_many
from .benchmarks import BENCHMARKS, Benchmark, load_docs, without_nltk_downloads
from .evaluation_arguments import ALPACA_EVAL, HELDOUT
from .heldout import chat_template_hash

# lm-eval's defaults.
SEEDS = {
    "random": 0,
    "numpy": 1234,
    "torch": 1234,
    "fewshot": 1234,
}
# In the place of a benchmark for all other tasks of lm-eval: metrics have lm-eval's names, items their position as id.
_OTHERS = Benchmark(
    config="",
    lm_eval_task="",
    metrics={},
    files="",
    fields={},
    hub="",
)


def check_names(names: Sequence[str], include_path: str | None = None) -> None:
    """Refuse unknown tasks, and all tasks if lm-eval is not installed.

    Args:
        names: Of tasks.
        include_path: Folder with the user's lm-eval task YAMLs.

    Raises:
        UserError: In both cases, with the remedy.
    """
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task {names[0]} is scored by lm-eval, which is not installed; {install_hint('eval')}")
    # Its warnings are about its own task files.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not expand_user(include_path).is_dir():
        raise UserError(f"include_path {include_path!r} is not a folder; name one with lm-eval task YAMLs")

    # The user's own tasks, without the index of lm-eval's, which takes seconds.
    own_tasks: Sequence[str] = ()
    if include_path and any(name in BENCHMARKS for name in names):
        own_tasks = _task_manager(include_path, include_defaults=False).all_tasks

    for name in names:
        if name in BENCHMARKS:
            if name in own_tasks:
                raise UserError(
                    f"include_path {include_path!r} holds a task {name}, the name of a benchmark of maskft; give yours "
                    "another name"
                )
            continue
        # Only for names that are not ours: the index of lm-eval's files takes seconds.
        known = _task_manager(include_path).all_tasks
        if name not in known:
            options = [HELDOUT, ALPACA_EVAL, *BENCHMARKS, *known]
            raise UserError(f"unknown task {name!r}{did_you_mean(name, options)}; lm-eval has no such task either")


def load_tasks(
    names: Sequence[str],
    data_dir: str | Path | None = None,
    limit: int | None = None,
    *,
    include_path: str | None = None,
    allow_unconfined: bool = False,
) -> dict[str, Any]:
    """Build lm-eval's tasks: name -> task. A group of lm-eval becomes its members.

    Args:
        names: From ``check_names``.
        data_dir: Folder with the benchmarks' files; None: the hub.
        limit: First items of each task only.
        include_path: Folder with the user's lm-eval task YAMLs.
        allow_unconfined: Run model-written code even where it cannot be confined.

    Raises:
        UserError: For every problem with the data.
    """
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in BENCHMARKS:
            tasks |= _build_other(name, include_path)
            continue
        docs = load_docs(name, data_dir)
        num_docs = len(docs)
        if limit:
            num_docs = min(limit, num_docs)
        # All items go to lm-eval, which applies the limit itself; data that only later ones need may be missing.
        asked = docs.select(range(num_docs))
        _check_ids(name, asked)
        BENCHMARKS[name].prepare(asked, data_dir)
        tasks[name] = _build(name, docs, allow_unconfined)

    # As lm_eval.simple_evaluate does, which is not called here.
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


def _check_ids(name: str, docs) -> None:
    """Refuse items of one id, of which no result can be made: it pairs items by their ids."""
    id_field = BENCHMARKS[name].id_field
    if not id_field:
        return
    counts = Counter(docs[id_field])
    for item_id, count in counts.items():
        if count > 1:
            raise UserError(f"{count} items of {name} have the {id_field} {item_id!r}; give each its own")


def wants_chat_template(name: str, choice: bool | None) -> bool:
    """Whether prompts of task ``name`` go into the chat template; ``choice`` is the user's, None: the task's own."""
    if name == ALPACA_EVAL:
        return True
    if choice is not None:
        return choice
    return BENCHMARKS.get(name, _OTHERS).use_chat_template


def check_chat_template(names: Sequence[str], tokenizer, choice: bool | None) -> None:
    """Refuse a chat task for a tokenizer without chat template."""
    if getattr(tokenizer, "chat_template", None):
        return
    for name in names:
        if not wants_chat_template(name, choice):
            continue
        alternative = ", or pass --apply_chat_template false"
        if name == ALPACA_EVAL:
            # AlpacaEval's instructions have no other form.
            alternative = ""
        raise UserError(
            f"task {name} puts its prompts into the chat template, and this model's tokenizer has none; give "
            f"--chat_template_path{alternative}"
        )


def task_data_sha256(task, limit: int | None) -> str:
    """`data_sha256` of rows, or of the first ``limit`` items of a task from ``load_tasks``."""
    # Rows of held-out data or instructions of AlpacaEval, which are limited already.
    if isinstance(task, list):
        return data_sha256(task)
    # The items that are asked, and not the whole file.
    docs = islice(task.eval_docs, limit)
    return data_sha256(docs)


def run_task(
    lm,
    name: str,
    task,
    *,
    limit: int | None = None,
    apply_chat_template: bool | None = None,
) -> dict:
    """Evaluate one task and return its record of the result schema.

    Args:
        lm: A model of lm-eval's interface, with ``tokenizer``.
        name: Name of the task.
        task: From ``load_tasks``.
        limit: First items only.
        apply_chat_template: Overrides the task's own choice.
    """
    from lm_eval.evaluator import evaluate

    is_chat = wants_chat_template(name, apply_chat_template)
    # Every model sees the same few-shot examples: the generators that draw them begin anew for each.
    task.set_fewshot_seed(seed=SEEDS["fewshot"])
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    # Not simple_evaluate, which builds the model and the tasks itself.
    results = evaluate(
        lm,
        {"tasks": {name: task}},
        limit=limit,
        bootstrap_iters=1000,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
    )

    # Items
    benchmark = BENCHMARKS.get(name, _OTHERS)
    # One for each item and filter.
    samples = results["samples"][name]
    items = _items(samples, benchmark)
    # How the programs were confined is said once, for the task.
    confinement: set[str] = set()
    if benchmark.program:
        confinement = {item.pop("confinement") for item in items}

    # The record
    questions: list[dict[str, Any]] = []
    for item in items:
        questions.append(
            {
                "id": item["id"],
                "prompt": item["prompt_hash"],
                "reference": item["answer_hash"],
            }
        )
    metrics = _metrics(
        items,
        results["results"][name],
        results["higher_is_better"][name],
        benchmark,
    )
    record = build_task(
        items,
        metrics,
        version=results["versions"][name],
        num_fewshot=results["n-shot"][name],
        fingerprint=items_fingerprint(questions),
        chat_template_hash=chat_template_hash(lm.tokenizer) if is_chat else None,
    )
    out: dict[str, Any] = {
        **record,
        **_truncation(lm, task, samples),
        "data_sha256": task_data_sha256(task, limit),
        "lm_eval_task": benchmark.lm_eval_task or name,
        "generation_kwargs": task.get_config("generation_kwargs"),
        "seeds": SEEDS,
    }
    if confinement:
        out["confinement"] = ", ".join(sorted(confinement))
    return out


# Building tasks


# To index lm-eval's ten thousand files takes seconds.
@lru_cache(maxsize=8)
def _task_manager(include_path: str | None, include_defaults: bool = True):
    from lm_eval.tasks import TaskManager

    folder = None
    if include_path:
        folder = str(expand_user(include_path))
    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _build(name: str, docs, allow_unconfined: bool):
    """The task of a benchmark: lm-eval's configuration over our items."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    benchmark = BENCHMARKS[name]
    file = Path(lm_eval.tasks.__file__).parent / benchmark.config
    # Resolving HumanEval's functions would import its scorer, which asks the hub for a metric.
    has_functions = benchmark.program is None
    try:
        with without_nltk_downloads():
            config = load_yaml(file, resolve_func=has_functions)
    except (ImportError, AssertionError) as error:
        # An AssertionError is how lm-eval refuses an old version of a package.
        raise UserError(f"task {name} lacks a package ({error}); {install_hint('eval')}") from error

    # Items come from here instead of the hub.
    config |= {
        "task": name,
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "training_split": None,
        "dataset_kwargs": None,
    }
    if benchmark.program is not None:
        # Now, and not after hours of answers.
        check_allowed(allow_unconfined)

        # The program runs as a filter, and its status is the score. lm-eval calls a filter once with all answers, so
        # that the programs can run at the same time; a metric is computed item by item.
        run = partial(_run_answers, name=name, allow_unconfined=allow_unconfined)
        run_filter = {"function": "custom", "filter_fn": run}
        config |= {
            # lm-eval refuses tasks that run code without its own flag; ours is confined.
            "unsafe_code": False,
            "filter_list": [{"name": "create_test", "filter": [run_filter]}],
            "metric_list": [
                {
                    "metric": "pass_at_1",
                    "aggregation": "mean",
                    "higher_is_better": True,
                }
            ],
            "process_results": lambda doc, results: {"pass_at_1": int(results[0]["status"] == "passed")},
        }
    return ConfigurableTask(config=config)


def _run_answers(
    resps,
    docs,
    *,
    name: str,
    allow_unconfined: bool,
) -> list[dict]:
    """Run each item's answer with its tests."""
    program_of = BENCHMARKS[name].program
    # One answer per item: generation is greedy.
    programs = [program_of(doc, resp[0]) for resp, doc in zip(resps, docs, strict=True)]
    with Progress() as progress:
        bar = progress.add_task(f"{name}: running code", total=len(programs))
        results = run_many(
            programs,
            allow_unconfined=allow_unconfined,
            progress=lambda *_: progress.advance(bar),
        )

    ends: list[dict] = []
    for result in results:
        ends.append(
            {
                "status": result.status,
                "reason": result.reason,
                "confinement": result.confinement,
            }
        )
    return ends


def _build_other(name: str, include_path: str | None) -> dict:
    """Another task of lm-eval, or the members of a group: name -> task."""
    try:
        tasks = _task_manager(include_path).load([name])["tasks"]
    except Exception as error:
        # Of many types: no network, a missing package, a mistake in the user's YAML.
        raise UserError(f"lm-eval cannot load task {name!r}: {type(error).__name__}: {first_line(error)}") from None
    for member, task in tasks.items():
        # Under one name results of two different tasks would be compared.
        if member in BENCHMARKS:
            raise UserError(
                f"{name} holds lm-eval's own {member}, which is not the {member} of maskft; name its other members one "
                "by one instead"
            )
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {member} would run model-written code outside the sandbox; use humaneval or humaneval_plus"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {member} asks about images or sound, which no model here is given; name another")
    return tasks


# Records


def _truncation(lm, task, samples: Sequence[Mapping]) -> dict:
    """How many prompts were truncated; null where it is not counted: log-likelihoods, and lm-eval's own models."""
    if task.OUTPUT_TYPE != "generate_until" or not hasattr(lm, "num_truncated"):
        return {"num_truncated": None}

    # An item has a sample for each filter, all with the same requests.
    by_id = {sample["doc_id"]: sample["arguments"] for sample in samples}
    arguments: list = []
    for requests in by_id.values():
        arguments += requests

    # Prompts are tokenised once more, which takes seconds beside the hours of answers.
    count = lm.num_truncated(arguments)
    if count == 0:
        return {"num_truncated": 0}
    note = f"{count} of {len(arguments)} prompts were too long for the model's context and were truncated on the left"
    return {"num_truncated": count, "note": note}


def _items(samples: Sequence[Mapping], benchmark: Benchmark) -> list[dict]:
    """The items with their scores, from a sample for each filter of an item."""
    items: dict[int, dict] = {}
    for sample in samples:
        doc_id = sample["doc_id"]
        if doc_id not in items:
            items[doc_id] = _new_item(sample, benchmark)
        item = items[doc_id]

        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, (bool, int, float, np.number)):
                name = _metric_name(f"{metric},{sample['filter']}", benchmark)
                item[name] = _number(value)
            # IFEval's scores of the instructions of an item.
            elif isinstance(value, list) and all(isinstance(part, bool) for part in value):
                item[f"{metric}_each"] = [int(part) for part in value]
    return list(items.values())


def _new_item(sample: Mapping, benchmark: Benchmark) -> dict:
    """An item without scores."""
    doc = sample["doc"]
    item_id = sample["doc_id"]
    if benchmark.id_field:
        item_id = doc[benchmark.id_field]

    # A task with choices has a request for each of them.
    responses: list = []
    for of_request in sample["resps"]:
        responses += of_request

    item = {
        "id": str(item_id),
        "prompt_hash": sample["prompt_hash"],
        "answer_hash": sample["target_hash"],
    }
    # For a program the answer is its tests, which are long and published.
    if not benchmark.program:
        item["answer"] = sample["target"]
    # A text, or for a task with choices a list.
    item["output"] = _plain(responses[0] if len(responses) == 1 else responses)
    if isinstance(doc, Mapping) and doc.get("cluster_id") is not None:
        item["cluster_id"] = str(doc["cluster_id"])
    if benchmark.program:
        # Status, reason and confinement, from `_run_answers`.
        item |= sample["filtered_resps"][0]
    return item


def _is_higher_better(metric: str, higher: Mapping) -> bool:
    if higher.get(metric) is None:
        raise UserError(f"the task does not say whether a higher {metric} is better; add higher_is_better to its YAML")
    return higher[metric]


def _metrics(
    items: list[dict],
    summary: Mapping,
    higher: Mapping,
    benchmark: Benchmark,
) -> dict:
    """Metrics item by item if their mean is the number that lm-eval reports, else as a summary of the task."""
    metrics: dict[str, Any] = {}
    for key, value in summary.items():
        # The summary also holds the task's alias, errors, and numbers of items.
        metric, _, filter_name = key.partition(",")
        is_number = isinstance(value, (int, float, np.number))
        is_metric = filter_name and not metric.endswith("_stderr") and is_number
        if not is_metric:
            continue

        name = _metric_name(key, benchmark)
        higher_is_better = _is_higher_better(metric, higher)
        if all(name in item for item in items):
            record = metric_from_items(items, name, higher_is_better=higher_is_better)
            mean = record["value"]
            # Close, and not equal: lm-eval may add the items in another order.
            if mean is not None and math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                metrics[name] = record
                continue

        # Not the mean of numbers of the items, such as a perplexity: what the items have is not this metric.
        for item in items:
            item.pop(name, None)
        stderr = summary.get(f"{metric}_stderr,{filter_name}")
        parts_of = [item.get(f"{metric}_each") for item in items]
        if all(parts_of):
            # A mean over the parts of all items, for which lm-eval has no error.
            # The ratio of two sums over items, with the items as the independent units: the instructions of one prompt
            # depend on each other.
            means = [np.mean(parts) for parts in parts_of]
            num_parts = [len(parts) for parts in parts_of]
            _, stderr = weighted_mean(means, num_parts)
        # lm-eval writes "N/A" for an error that it does not compute.
        has_stderr = isinstance(stderr, (int, float, np.number))
        metrics[name] = {
            "value": _number(value),
            "stderr": _number(stderr) if has_stderr else None,
            "num_items": len(items),
            "higher_is_better": higher_is_better,
            "unit": "fraction" if metric.endswith("acc") else "score",
        }

    # The main metric first, others in lm-eval's order.
    ordered: dict[str, Any] = {}
    for name in [*benchmark.metrics.values(), *metrics]:
        if name in metrics:
            ordered[name] = metrics[name]
    return ordered


def _metric_name(key: str, benchmark: Benchmark) -> str:
    """Our name of lm-eval's ``metric,filter``."""
    if key in benchmark.metrics:
        return benchmark.metrics[key]
    metric, _, filter_name = key.partition(",")
    if filter_name == "none":
        return metric
    return key


def _plain(value: Any) -> Any:
    """An output for JSON: log-likelihoods are not finite where a model overflows, as in float16."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.number):
        return _number(value)
    return value


def _number(value) -> float | int | None:
    """A value for JSON; None if it is NaN or infinite."""
    # numpy's numbers are not JSON.
    if isinstance(value, np.number):
        value = value.item()
    elif isinstance(value, bool):
        value = int(value)
    if not math.isfinite(value):
        return None
    return value
