"""``maskft verify``: is this adapter intact, and does it fit that base?"""

from __future__ import annotations


def add_arguments(parser) -> None:
    """Options of ``maskft verify``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model to check against; default: only the file is checked"
    )


def run(args) -> None:
    """Print each check that passed; the first that fails ends the command."""
    from maskft.adapter.verify import verify
    from maskft_base.runtime import silence

    if args.base:
        silence()
    for line in verify(args.adapter, args.base):
        print(f"ok  {line}")
