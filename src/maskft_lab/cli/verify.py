"""``maskft verify``: is this adapter intact, and does it fit that base?"""

from __future__ import annotations

import warnings


def add_arguments(parser) -> None:
    """Options of ``maskft verify``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model to check against; default: only the file is checked"
    )


def run(args) -> None:
    """Print each check that passed; the first that fails ends the command."""
    import transformers

    from maskft.masks.verify import verify
    from maskft_common.errors import printable

    if args.base:
        warnings.simplefilter("ignore", FutureWarning)
        transformers.utils.logging.disable_progress_bar()
    for line in verify(args.adapter, args.base):
        print(printable(f"ok  {line}"))
