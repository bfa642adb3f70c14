"""``maskft merge``: an ordinary checkpoint from a mask and its base, or a patched GGUF file."""

from __future__ import annotations

import argparse
import sys
import warnings

from maskft_common.errors import UserError, printable
from maskft_common.files import expand_user

from .arguments import adapter_of, add_adapter, add_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft merge``."""
    add_adapter(parser)

    # An ordinary checkpoint
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="new folder for the checkpoint",
    )
    add_base(parser, default="the adapter's own")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="part of the change, in (0, 1] (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="dtype of the written weights; auto: the base's (default: auto)",
    )

    # A GGUF file
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        help="write the mask into a copy of this GGUF file, without rounding",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="new GGUF file (with --gguf)",
    )
    parser.add_argument(
        "--undo",
        action="store_true",
        help="with --gguf: take the mask out again, which gives the base bit for bit",
    )
    parser.add_argument(
        "--accept_other_base",
        action="store_true",
        help="with --gguf: write the mask into other weights than it was trained over, such as another precision",
    )


def run(args: argparse.Namespace) -> None:
    """Merge and verify."""
    from .early import check_mask, check_model

    adapter = check_mask(adapter_of(args))
    if args.gguf is not None:
        _merge_gguf(adapter, args)
        return

    # A checkpoint. Options of the other form would have no effect, and are refused.
    for name in ("output", "undo", "accept_other_base"):
        if getattr(args, name):
            raise UserError(f"--{name} goes with --gguf, the GGUF file to write the mask into")
    if args.output_dir is None:
        raise UserError("give --output_dir, the new folder; or --gguf and --output for a GGUF file")
    check_model(args.base)

    # From here on torch is imported.
    import transformers

    from maskft.masks.merge import merge

    # Not maskft_common.quiet.silence(), which would import datasets too.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    message = merge(adapter, args.output_dir, args.base, args.dtype, args.scale)
    print(message, file=sys.stderr)


def _merge_gguf(adapter: str, args: argparse.Namespace) -> None:
    """Write the mask into a copy of a GGUF file, or take it out."""
    if args.output is None:
        raise UserError("--gguf needs --output, the new GGUF file")
    # Options of a checkpoint that differ from their defaults: they would have no effect.
    has_folder = args.output_dir is not None or args.base is not None
    has_change = args.scale != 1 or args.dtype != "auto"
    if has_folder or has_change:
        raise UserError(
            "--gguf writes one file, in the types of its base: drop --output_dir, --base, --scale and --dtype"
        )
    if args.undo and args.accept_other_base:
        raise UserError("--undo gives back the base that the file was made from: drop --accept_other_base")

    # From here on torch is imported.
    from maskft.masks.gguf import merge_into_gguf, undo_in_gguf

    # A shell leaves the ~ of --gguf=~/model.gguf as it is.
    gguf = expand_user(args.gguf)
    output = expand_user(args.output)
    if args.undo:
        lines = undo_in_gguf(adapter, gguf, output)
    else:
        lines = merge_into_gguf(adapter, gguf, output, args.accept_other_base)
    for line in lines:
        # The name of the mask's base is of a stranger's file, whose control characters must not reach the terminal.
        print(printable(line), file=sys.stderr)
