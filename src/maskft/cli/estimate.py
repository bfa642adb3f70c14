"""``maskft estimate``: what ``maskft train`` with the same options would need."""

from __future__ import annotations

import argparse
import json

from .main import OneLineParser


def main(argv: list[str]) -> None:
    """Take the options of the estimate, leave the rest to ``maskft train``'s parser, and print."""
    own, rest = _parser().parse_known_args(argv)
    if own.model_config:
        rest += ["--model_name_or_path", own.model_config]
    from ..estimate.estimate import estimate
    from .train import parse

    result = estimate(
        parse(rest),
        sequence_length=own.sequence_length,
        num_train_rows=own.num_train_rows,
        device=own.device,
        device_memory_gb=own.device_memory_gb,
        reserve_gb=own.reserve_gb,
        flops_per_s=own.flops_per_s,
        compare_settings=own.compare_settings,
    )
    if own.format == "json":
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="maskft estimate",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tell what a training run needs, from the configuration of its model alone: no weights are loaded.",
        epilog="Every option of maskft train may be given too, in a recipe (--config FILE.yaml) or as flags; see "
        "maskft train --help.\nSizes are in GB = 1e9 bytes, of one process.",
    )
    parser.add_argument(
        "--model_config", metavar="FILE", help="a config.json, instead of the recipe's model_name_or_path"
    )
    parser.add_argument(
        "--sequence_length", type=int, metavar="TOKENS", help="tokens of every row, >= 1 (default: max_length)"
    )
    parser.add_argument(
        "--num_train_rows",
        type=int,
        metavar="N",
        help="training rows, >= 1 (default: max_train_samples, or the rows of a local file)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what the run uses (default: what this machine has)")
    parser.add_argument(
        "--device_memory_gb",
        type=float,
        metavar="GB",
        help="memory of the device as it is sold (24 means 24 x 2^30 bytes), > 0: tells the largest micro-batch",
    )
    parser.add_argument(
        "--reserve_gb",
        type=float,
        default=1.0,
        metavar="GB",
        help="part of a GPU's memory left for its driver and for fragmentation; an assumption (default: %(default)s)",
    )
    parser.add_argument(
        "--compare_settings",
        action="store_true",
        help="with --device_memory_gb: which weight dtypes, optimizers and gradient checkpointing fit",
    )
    parser.add_argument(
        "--flops_per_s", type=float, metavar="N", help="speed you expect, FLOP/s, > 0, e.g. 1.5e14: tells the time"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    return parser


def _print(result) -> None:
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width; a table cut at 80 columns would lose numbers.
    console = Console(width=None if Console().is_terminal else 140)
    console.print(
        f"{result.method} on {result.model} ({result.device}): weights {result.dtype}, optim {result.optim}, gradient "
        f"checkpointing {'on' if result.gradient_checkpointing else 'off'}, {result.micro_batch} x "
        f"{result.sequence_length} tokens x {result.accumulation} micro-batches",
        highlight=False,
        markup=False,
    )
    memory = Table(box=None, header_style="bold")
    memory.add_column(f"memory at its height ({result.height})")
    memory.add_column("GB", justify="right")
    memory.add_column("share", justify="right")
    for name, size in result.memory.items():
        memory.add_row(name, f"{size / 1e9:.3f}", f"{size / result.peak_bytes:.1%}")
    memory.add_section()
    memory.add_row("[bold]in all[/bold]", f"{result.peak_bytes / 1e9:.3f}", "")
    console.print(memory)
    for name, text in _facts(result):
        console.print(f"{name}: {text}", highlight=False, markup=False)
    if result.settings:
        table = Table(box=None, header_style="bold")
        for column in ("weights", "optim", "checkpointing", "GB at micro-batch 1", "fits", "largest micro-batch"):
            table.add_column(column, justify="right" if column.startswith(("GB", "largest")) else "left")
        for row in result.settings:
            table.add_row(
                row.dtype,
                row.optim,
                "on" if row.gradient_checkpointing else "off",
                f"{row.bytes_at_batch_1 / 1e9:.1f}",
                "yes" if row.largest_micro_batch else "no",
                str(row.largest_micro_batch or "-"),
            )
        console.print(table)


def _facts(result):
    yield "parameters", f"{result.num_parameters:,}; trained {result.num_trainable:,}; masked {result.num_masked:,}"
    yield "height of each phase", ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in result.phases.items())
    if result.layer_passes:
        passes = result.layer_passes
        yield (
            "decoder layers, counted",
            f"forward {passes['forward']} + activation gradients {passes['activation_gradients']} + weight gradients "
            f"{passes['weight_gradients']} = {passes['total']} of {passes['full']} passes of full fine-tuning",
        )
    flops = result.flops_per_step
    yield (
        "per step",
        f"{flops['total'] / 1e12:.3f} TFLOP (forward {flops['forward'] / 1e12:.3f}, backward "
        f"{flops['backward'] / 1e12:.3f}), {result.tokens_per_step:,} tokens at most",
    )
    if result.num_steps is None:
        yield "per run", "unknown number of steps; give --num_train_rows or max_steps"
    else:
        time = "" if result.time_s is None else f", {result.time_s / 3600:.2f} h at the given speed"
        yield (
            "per run",
            f"{result.num_steps:,} steps, {result.flops_per_run / 1e15:.3f} PFLOP, {result.tokens_per_run:,} tokens "
            f"at most{time}",
        )
    bits = result.bits_per_weight
    coded = "" if bits is None else f" ({bits['coded']:.3f} bits per masked weight; bound {bits['bound']:.3f})"
    yield "result on disk", f"{result.adapter_bytes / 1e6:.1f} MB{coded}"
    yield "one checkpoint on disk", f"{result.checkpoint_bytes / 1e6:.1f} MB"
    if result.device_memory_bytes is not None and not result.settings:
        yield (
            "largest per_device_train_batch_size",
            f"{result.largest_micro_batch} (device memory {result.device_memory_bytes / 1e9:.1f} GB)",
        )
