"""``maskft verify``: is this adapter intact, and does it fit that base?"""

from __future__ import annotations

import warnings


def add_arguments(parser) -> None:
    """Options of ``maskft verify``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model to check against; default: only the file is checked"
    )
    parser.add_argument(
        "--gguf", metavar="FILE", help="check that this GGUF file is exactly its base (--base: a file) with the mask"
    )


def run(args) -> None:
    """Print each check that passed; the first that fails ends the command."""
    from maskft_common.errors import printable

    if args.gguf is not None:
        from maskft.masks.gguf import verify_gguf

        for line in verify_gguf(args.adapter, args.gguf, args.base):
            print(printable(f"ok  {line}"))
        return

    import transformers

    from maskft.masks.verify import verify

    if args.base:
        warnings.simplefilter("ignore", FutureWarning)
        transformers.utils.logging.disable_progress_bar()
    for line in verify(args.adapter, args.base):
        print(printable(f"ok  {line}"))
