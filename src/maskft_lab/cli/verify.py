"""``maskft verify``: whether an adapter is intact, and fits a base or is in a GGUF file."""

from __future__ import annotations

import argparse
import warnings

from .arguments import adapter_of, add_adapter, add_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft verify``."""
    add_adapter(parser)
    add_base(parser, default="none: only the adapter's files are checked")
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        help="check that this GGUF file is exactly its base (--base: a file) with the mask",
    )


def run(args: argparse.Namespace) -> None:
    """Print the checks if all passed; the first that fails is the command's error."""
    from maskft_common.errors import printable

    from .early import check_mask

    adapter = check_mask(adapter_of(args))
    # The list is complete before its first line is printed: a check that fails raises, and nothing else is shown.
    for line in _passed_checks(adapter, args):
        # Names come from files of strangers, whose control characters must not reach the terminal.
        print(printable(f"ok  {line}"))


def _passed_checks(adapter: str, args: argparse.Namespace) -> list[str]:
    """A line for each check.

    Raises:
        UserError: For the first that fails.
    """
    # --base is a GGUF file here, not a model.
    if args.gguf is not None:
        # From here on torch is imported.
        from maskft.masks.gguf import verify_gguf
        from maskft_common.files import expand_user

        # A shell leaves the ~ of --gguf=~/model.gguf as it is.
        base = None if args.base is None else expand_user(args.base)
        return verify_gguf(adapter, expand_user(args.gguf), base)

    from .early import check_model

    check_model(args.base)

    # From here on torch is imported.
    import transformers

    from maskft.masks.verify import verify

    # Loading the base shows a progress bar, and warnings of libraries about their next versions.
    if args.base:
        warnings.simplefilter("ignore", FutureWarning)
        transformers.utils.logging.disable_progress_bar()
    return verify(adapter, args.base)
