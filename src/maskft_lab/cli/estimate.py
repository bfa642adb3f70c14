"""``maskft estimate``: the memory that ``maskft train`` with the same options would need."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from maskft_common.command_line import OneLineParser

from . import early

# For an annotation only: the module imports torch.
if TYPE_CHECKING:
    from ..estimate.estimate import Estimate


def main(argv: list[str]) -> None:
    """Parse the options of the estimate, leave the rest to ``maskft train``'s parser, and print."""
    # `own` has the options of the estimate, `rest` the words of `maskft train`, in their order.
    own, rest = make_parser().parse_known_args(argv)
    words = early.with_config(rest)
    early.check_training(words)

    # From here on torch is imported.
    from .train import parse

    config = parse(words)

    # After the words are parsed, so that a mistake in them is reported before this import.
    from ..estimate.estimate import estimate

    result = estimate(config, own.device, own.device_memory_gb)
    if own.format == "json":
        # A property, which asdict() leaves out.
        content = asdict(result) | {"peak_bytes": result.peak_bytes}
        print(json.dumps(content, indent=2))
    else:
        _print(result)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the options that ``maskft train`` does not have."""
    parser = OneLineParser(
        "maskft estimate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Estimate the memory of a training run from its model's configuration: no weights are loaded.",
        epilog="Every option of maskft train may be given too, in a recipe (--config FILE.yaml) or as flags; see\n"
        "maskft train --help. model_name_or_path may be a config.json; every row is assumed to have max_length\n"
        "tokens. Sizes are in GB = 1e9 bytes, of one process. A KL term counts all tokens of its rows. There is no\n"
        "estimate of bases in four or eight bits, and of interpolate: leave these options out.",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="device of the run (default: cuda if this machine has one, else cpu)",
    )
    parser.add_argument(
        "--device_memory_gb",
        type=float,
        metavar="GB",
        help="memory of the device as it is sold (24 means 24 x 2^30 bytes), > 0: prints the largest micro-batch",
    )
    parser.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="output (default: table)",
    )
    return parser


def _print(result: Estimate) -> None:
    from ..estimate.estimate import MAX_MICRO_BATCH
    from ..results.tables import Table, draw

    print(f"{result.method} on {result.model} ({result.device})\n")
    # Parts of 0 bytes, such as the scores of a method without masks, are left out.
    sizes = {name: size for name, size in result.memory.items() if size}
    sizes["total"] = result.peak_bytes
    rows = []
    for name, size in sizes.items():
        size_gb = size / 1e9
        share = size / result.peak_bytes
        rows.append((name, f"{size_gb:.3g}", f"{share:.1%}"))
    table = Table(("memory at its peak", "GB", "share"), rows)
    print(draw(table, "terminal"))

    print(f"parameters: {result.num_parameters:,}; trained {result.num_trainable:,}; masked {result.num_masked:,}")
    if result.largest_micro_batch is not None:
        # Larger ones were not tried.
        or_more = " or more" if result.largest_micro_batch == MAX_MICRO_BATCH else ""
        print(f"largest per_device_train_batch_size: {result.largest_micro_batch}{or_more}")
