"""``maskft estimate``: what ``maskft train`` with the same options would need."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .main import OneLineParser


def main(argv: list[str]) -> None:
    """Take the options of the estimate, leave the rest to ``maskft train``'s parser, and print."""
    own, rest = _parser().parse_known_args(argv)
    from ..estimate.estimate import estimate
    from .train import parse

    result = estimate(parse(rest), own.device, own.device_memory_gb)
    if own.format == "json":
        print(json.dumps(asdict(result) | {"peak_bytes": result.peak_bytes}, indent=2))
    else:
        _print(result)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="maskft estimate",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tell what memory a training run needs from its model's configuration: no weights are loaded.",
        epilog="Every option of maskft train may be given too, in a recipe (--config FILE.yaml) or as flags; see\n"
        "maskft train --help. model_name_or_path may be a config.json; every row is taken to have max_length\n"
        "tokens. Sizes are in GB = 1e9 bytes, of one process.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what the run uses (default: what this machine has)")
    parser.add_argument(
        "--device_memory_gb",
        type=float,
        metavar="GB",
        help="memory of the device as it is sold (24 means 24 x 2^30 bytes), > 0: tells the largest micro-batch",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    return parser


def _print(result) -> None:
    from ..results.tables import Table, draw

    print(f"{result.method} on {result.model} ({result.device})\n")
    sizes = {name: size for name, size in result.memory.items() if size} | {"total": result.peak_bytes}
    rows = [(name, f"{size / 1e9:.3g}", f"{size / result.peak_bytes:.1%}") for name, size in sizes.items()]
    print(draw(Table(("memory at its peak", "GB", "share"), rows), "terminal"))
    print(f"parameters: {result.num_parameters:,}; trained {result.num_trainable:,}; masked {result.num_masked:,}")
    if result.largest_micro_batch is not None:
        print(f"largest per_device_train_batch_size: {result.largest_micro_batch}")
