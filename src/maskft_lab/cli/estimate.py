"""``maskft estimate``: what ``maskft train`` with the same options would need."""

from __future__ import annotations

import argparse
import json

from .main import OneLineParser


def main(argv: list[str]) -> None:
    """Take the options of the estimate, leave the rest to ``maskft train``'s parser, and print."""
    own, rest = _parser().parse_known_args(argv)
    from ..estimate.estimate import estimate
    from .train import parse

    result = estimate(
        parse(rest),
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
        epilog="Every option of maskft train may be given too, in a recipe (--config FILE.yaml) or as flags; see\n"
        "maskft train --help. model_name_or_path may be a config.json; every row is taken to have max_length\n"
        "tokens; max_train_samples says how many rows there are. Sizes are in GB = 1e9 bytes, of one process.",
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
    from ..results.text import Table, draw, wrap

    checkpointing = "on" if result.gradient_checkpointing else "off"
    print(
        f"{result.method} on {result.model} ({result.device}): weights {result.dtype}, optim {result.optim},\n"
        f"gradient checkpointing {checkpointing}, {result.micro_batch} x {result.sequence_length} tokens x "
        f"{result.accumulation} micro-batches\n"
    )
    rows = [(name, _gb(size), f"{size / result.peak_bytes:.1%}") for name, size in result.memory.items()]
    rows.append(("in all", _gb(result.peak_bytes), ""))
    print(draw(Table((f"memory at its peak ({result.peak})", "GB", "share"), rows), "terminal"))
    for name, text in _facts(result):
        print(wrap(f"{name}: {text}"))
    if result.settings:
        rows = [
            (
                f"{row.dtype}, {row.optim}, checkpointing {'on' if row.gradient_checkpointing else 'off'}",
                f"{row.bytes_at_batch_1 / 1e9:.1f}",
                str(row.largest_micro_batch or "-"),
            )
            for row in result.settings
        ]
        print("\n" + draw(Table(("settings", "GB at micro-batch 1", "largest"), rows), "terminal"), end="")


def _facts(result):
    yield "parameters", f"{result.num_parameters:,}; trained {result.num_trainable:,}; masked {result.num_masked:,}"
    yield "peak of each phase", ", ".join(f"{name} {_gb(size)} GB" for name, size in result.phases.items())
    if passes := result.layer_passes:
        parts = (f"{name.replace('_', ' ')} {passes[name]}" for name in list(passes)[:3])
        yield (
            "decoder layers, counted",
            f"{' + '.join(parts)} = {passes['total']} of {passes['full']} passes of full fine-tuning",
        )
    flops = ", ".join(f"{name} {number / 1e12:.3f} TFLOP" for name, number in result.flops_per_step.items())
    yield "per step", f"{flops}, {result.tokens_per_step:,} tokens at most"
    if result.num_steps is None:
        yield "per run", "unknown number of steps; give max_train_samples or max_steps"
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
    if result.largest_micro_batch is not None and not result.settings:
        yield "largest per_device_train_batch_size", str(result.largest_micro_batch)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}"
