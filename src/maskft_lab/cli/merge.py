"""``maskft merge``: an ordinary checkpoint from a mask and its base."""

from __future__ import annotations

import sys
import warnings


def add_arguments(parser) -> None:
    """Options of ``maskft merge``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for the checkpoint")
    parser.add_argument("--base", metavar="MODEL", help="base model; default: the one the adapter names")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the change, in (0, 1] (default: 1)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="dtype of the written weights (default: %(default)s, that of the base)",
    )


def run(args) -> None:
    """Merge and verify."""
    import transformers

    from maskft.masks.merge import merge

    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    print(merge(args.adapter, args.output_dir, args.base, args.dtype, args.scale), file=sys.stderr)
