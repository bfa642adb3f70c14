"""Benchmarks by lm-eval: which of its tasks, on what data, and its scores as a record of our result file.

Prompts, stop strings, answer extraction and scores are lm-eval's. Two things differ. Data may come from files, and
model-written code runs in our sandbox: lm-eval's own scorer downloads a metric and runs code in a plain process.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskft_common.errors import UserError, did_you_mean, first_line, install_hint
from maskft_common.progress_bar import Progress

from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from ..results.statistics import weighted_mean
from ..sandbox.sandbox import check_allowed, run_many
from .benchmarks import BENCHMARKS, Benchmark, load_docs, without_nltk_downloads
from .evaluation_arguments import ALPACA_EVAL, HELDOUT
from .heldout import chat_template_hash

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's defaults
_OTHERS = Benchmark("", "", {}, "", {}, "")  # all other tasks of lm-eval


def check_names(names: Sequence[str], include_path: str | None = None) -> None:
    """Refuse unknown tasks, and say what is missing when lm-eval is not installed.

    Args:
        names: Of tasks.
        include_path: Folder with lm-eval task YAMLs of the user's own.

    Raises:
        UserError: In both cases, with what to do.
    """
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task {names[0]} is scored by lm-eval, which is not installed; {install_hint('eval')}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UserError(f"include_path {include_path!r} is not a folder; name one with lm-eval task YAMLs")
    for name in names:
        if name in BENCHMARKS and include_path and name in _task_manager(include_path, False).all_tasks:
            raise UserError(
                f"include_path {include_path!r} holds a task {name}, the name of a benchmark of maskft; give yours "
                "another name"
            )
        if name not in BENCHMARKS and name not in _task_manager(include_path).all_tasks:
            options = [HELDOUT, ALPACA_EVAL, *BENCHMARKS, *_task_manager(include_path).all_tasks]
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
        include_path: Folder with lm-eval task YAMLs of the user's own.
        allow_unconfined: Run model-written code even where it cannot be confined.

    Raises:
        UserError: For every problem with the data.
    """
    tasks = {}
    for name in names:
        if name in BENCHMARKS:
            docs = load_docs(name, data_dir)
            BENCHMARKS[name].prepare(docs.select(range(min(limit or len(docs), len(docs)))), data_dir)
            tasks[name] = _build(name, docs, allow_unconfined)
        else:
            tasks |= _build_other(name, include_path)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


def wants_chat_template(name: str, choice: bool | None) -> bool:
    """Whether prompts of task ``name`` go into the chat template; ``choice`` is the user's, None: the task's own."""
    if name == ALPACA_EVAL:
        return True
    return BENCHMARKS.get(name, _OTHERS).use_chat_template if choice is None else choice


def check_chat_template(names: Sequence[str], tokenizer, choice: bool | None) -> None:
    """Refuse a chat task for a tokenizer without chat template."""
    for name in names:
        if wants_chat_template(name, choice) and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"task {name} puts its prompts into the chat template, and this model's tokenizer has none; give "
                f"--chat_template_path{'' if name == ALPACA_EVAL else ', or pass --apply_chat_template false'}"
            )


def task_data_sha256(task, limit: int | None) -> str:
    """`data_sha256` of rows, or of the first ``limit`` items of a task from ``load_tasks``."""
    return data_sha256(task if isinstance(task, list) else islice(task.eval_docs, limit))


def run_task(lm, name: str, task, *, limit: int | None = None, apply_chat_template: bool | None = None) -> dict:
    """Evaluate one task and return its record of the result schema.

    Args:
        lm: A model of lm-eval's interface, with ``tokenizer``.
        name: Name of the task.
        task: From ``load_tasks``.
        limit: First items only.
        apply_chat_template: Overrides the task's own choice.
    """
    from lm_eval.evaluator import evaluate

    chat = wants_chat_template(name, apply_chat_template)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])  # every model sees the same examples, whichever comes first
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    how: dict[str, Any] = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    results = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1000, **how)
    samples = results["samples"][name]
    benchmark = BENCHMARKS.get(name, _OTHERS)
    items = _items(samples, benchmark)
    confinement = {item.pop("confinement") for item in items if benchmark.program}
    record = build_task(
        items,
        _metrics(items, results["results"][name], results["higher_is_better"][name], benchmark),
        version=results["versions"][name],
        num_fewshot=results["n-shot"][name],
        fingerprint=items_fingerprint(
            {"id": item["id"], "prompt": item["prompt_hash"], "reference": item["answer_hash"]} for item in items
        ),
        chat_template_hash=chat_template_hash(lm.tokenizer) if chat else None,
    )
    return {
        **record,
        **_truncation(lm, task, samples),
        "data_sha256": task_data_sha256(task, limit),
        "lm_eval_task": benchmark.lm_eval_task or name,
        "generation_kwargs": task.get_config("generation_kwargs"),
        "seeds": SEEDS,
        **({"confinement": ", ".join(sorted(confinement))} if confinement else {}),
    }


# Building tasks


@lru_cache(maxsize=8)  # an index of lm-eval's ten thousand files takes seconds
def _task_manager(include_path: str | None, include_defaults: bool = True):
    from lm_eval.tasks import TaskManager

    folder = include_path and str(Path(include_path).expanduser())
    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _build(name: str, docs, allow_unconfined: bool):
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    benchmark = BENCHMARKS[name]
    try:
        # Resolving HumanEval's functions would import its scorer, which asks the hub for a metric.
        with without_nltk_downloads():
            config = load_yaml(
                Path(lm_eval.tasks.__file__).parent / benchmark.config, resolve_func=benchmark.program is None
            )
    except (ImportError, AssertionError) as error:
        raise UserError(f"task {name} lacks a package ({error}); {install_hint('eval')}") from error
    config |= {
        "task": name,
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "training_split": None,
        "dataset_kwargs": None,
    }
    if benchmark.program is not None:
        check_allowed(allow_unconfined)  # now, and not after the answers
        run = partial(_run_answers, name=name, allow_unconfined=allow_unconfined)
        config |= {
            "unsafe_code": False,  # ours is confined
            "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": run}]}],
            "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
            "process_results": lambda doc, results: {"pass_at_1": int(results[0]["status"] == "passed")},
        }
    return ConfigurableTask(config=config)


def _run_answers(resps, docs, *, name: str, allow_unconfined: bool) -> list[dict]:
    """Run each item's answer with its tests."""
    programs = [BENCHMARKS[name].program(doc, resp[0]) for resp, doc in zip(resps, docs, strict=True)]
    with Progress() as progress:
        bar = progress.add_task(f"{name}: running code", total=len(programs))
        ended = run_many(programs, allow_unconfined=allow_unconfined, progress=lambda *_: progress.advance(bar))
    return [{name: getattr(result, name) for name in ("status", "reason", "confinement")} for result in ended]


def _build_other(name: str, include_path: str | None) -> dict:
    try:
        tasks = _task_manager(include_path).load([name])["tasks"]
    except Exception as error:  # many types: no network, a missing package, ...
        raise UserError(f"lm-eval cannot load task {name!r}: {type(error).__name__}: {first_line(error)}") from None
    for member, task in tasks.items():
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
    by_id = {sample["doc_id"]: sample["arguments"] for sample in samples}  # a sample for each filter
    arguments = [request for requests in by_id.values() for request in requests]
    count = lm.num_truncated(arguments)
    note = f"{count} of {len(arguments)} prompts were too long for the model's context and were truncated on the left"
    return {"num_truncated": count} | ({"note": note} if count else {})


def _items(samples: Sequence[Mapping], benchmark: Benchmark) -> list[dict]:
    items: dict[int, dict] = {}
    for sample in samples:
        item = items.setdefault(sample["doc_id"], _new_item(sample, benchmark))
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, (bool, int, float, np.number)):
                item[_metric_name(f"{metric},{sample['filter']}", benchmark)] = _number(value)
            elif isinstance(value, list) and all(isinstance(part, bool) for part in value):
                item[f"{metric}_each"] = [int(part) for part in value]
    return list(items.values())


def _new_item(sample: Mapping, benchmark: Benchmark) -> dict:
    identity = sample["doc"][benchmark.id_field] if benchmark.id_field else sample["doc_id"]
    responses = [response for group in sample["resps"] for response in group]
    item = {
        "id": str(identity),
        "prompt_hash": sample["prompt_hash"],
        "answer_hash": sample["target_hash"],
        # The tests of a program are long, and everybody has them.
        **({} if benchmark.program else {"answer": sample["target"]}),
        "output": responses[0] if len(responses) == 1 else responses,
    }
    if isinstance(sample["doc"], Mapping) and sample["doc"].get("cluster_id") is not None:
        item["cluster_id"] = str(sample["doc"]["cluster_id"])
    return item | (sample["filtered_resps"][0] if benchmark.program else {})


def _is_higher_better(metric: str, higher: Mapping) -> bool:
    if higher.get(metric) is None:
        raise UserError(f"the task does not say whether a higher {metric} is better; add higher_is_better to its YAML")
    return higher[metric]


def _metrics(items: list[dict], summary: Mapping, higher: Mapping, benchmark: Benchmark) -> dict:
    """Metrics item by item where their mean is what lm-eval reports, and as a summary where it is not."""
    metrics = {}
    for key, value in summary.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
            continue
        name = _metric_name(key, benchmark)
        if all(name in item for item in items):
            metrics[name] = metric_from_items(items, name, higher_is_better=_is_higher_better(metric, higher))
            mean = metrics[name]["value"]
            if mean is not None and math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                continue
        for item in items:
            item.pop(name, None)
        stderr = summary.get(f"{metric}_stderr,{filter_name}")
        each = [item.get(f"{metric}_each") for item in items]
        if all(each):  # a mean over the parts of all items, for which lm-eval has no error
            stderr = weighted_mean([np.mean(parts) for parts in each], [len(parts) for parts in each])[1]
        metrics[name] = {
            "value": _number(value),
            "stderr": _number(stderr) if isinstance(stderr, (int, float, np.number)) else None,
            "num_items": len(items),
            "higher_is_better": _is_higher_better(metric, higher),
            "unit": "fraction" if metric.endswith("acc") else "score",
        }
    order = list(benchmark.metrics.values())
    return dict(sorted(metrics.items(), key=lambda entry: order.index(entry[0]) if entry[0] in order else len(order)))


def _metric_name(key: str, benchmark: Benchmark) -> str:
    metric, _, filter_name = key.partition(",")
    return benchmark.metrics.get(key) or (metric if filter_name == "none" else f"{metric},{filter_name}")


def _number(value) -> float | int | None:
    value = value.item() if isinstance(value, np.number) else int(value) if isinstance(value, bool) else value
    return value if math.isfinite(value) else None
