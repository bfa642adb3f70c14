"""``python -m benchmarks [NAME...]``: print ratios beside their targets, and write them to a JSON file.

``python -m benchmarks gpu --list``: the parts that need a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

NAMES = (
    "refresh",
    "file",
    "step",
    "micro_batch",
    "learners",
    "published",
    "memory",
    "intervals",
    "mixed_batch",
    "attention",
    "padding",
    "kl_term",
    "cast_once",
)


def main() -> None:
    """Run the benchmarks that are named."""
    # It has its own options, and lists its parts where maskft is not installed.
    if sys.argv[1:2] == ["gpu"]:
        from . import gpu

        gpu.main(sys.argv[2:])
        return
    from maskft_common.command_line import run_script

    run_script(run)


def run() -> None:
    """Run those that need no GPU."""
    from maskft_common.command_line import positive

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    known = ", ".join(NAMES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run: {known} (default: all)")
    parser.add_argument(
        "--output",
        default="runs/benchmarks",
        metavar="DIR",
        help="folder of benchmarks.json, which is written over (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="on cuda times are of CUDA events (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        help="alternations of the two sides; some slow benchmarks have fewer or more (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes and two rounds: shows that all of it runs, measures nothing",
    )
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; choose from: {known}")

    # Imported here, so that --help and mistakes do not take the seconds of importing torch.
    from maskft_common.memory import keep_freed_memory

    from .common import Report, check_device, set_threads

    check_device(args.device)
    set_threads(args.threads)
    report = Report(args.device, args.rounds, args.quick, Path(args.output) / "benchmarks.json")
    # Now: after the first benchmark it would be late to say that nothing can be written there.
    report.write()
    # In the order of the list and not of the command line, see below.
    for name in NAMES:
        if args.names and name not in args.names:
            continue
        if name not in ("refresh", "file") and args.device == "cpu":
            # As maskft train does. Not before refresh and file: by default freed memory goes back to the system, so
            # that a clone, with which a refresh is compared, pays for fresh pages.
            keep_freed_memory()
        benchmark = importlib.import_module(f".{name}", __package__)
        benchmark.run(report)


if __name__ == "__main__":
    main()
