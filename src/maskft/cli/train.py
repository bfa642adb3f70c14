"""``maskft train``: TRL's SFT arguments, the data's, the method's, and the mask's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.arguments import TrainConfig


def main(argv: Sequence[str]) -> None:
    """Parse ``--config recipe.yaml`` and flags (flags win), then train, in several processes if that is asked for."""
    from ..runtime import silence
    from ..training.launch import check_deepspeed, is_launched, launch
    from ..training.options import help_text, parse_words

    silence()
    if not {"-h", "--help", "--help_all"}.isdisjoint(argv):
        print(help_text(is_long="--help_all" in argv))
        return
    check_deepspeed()
    config, launch_words, train_words = parse_words(argv)
    if not launch_words or is_launched():
        from ..estimate.out_of_memory import explained
        from ..training.train import train

        with explained(config):
            train(config)
        return
    status = launch(launch_words, ["train", *train_words])
    if status:
        sys.exit(status)


def parse(argv: Sequence[str]) -> TrainConfig:
    """What the words after ``maskft train`` configure; every mistake is one UserError."""
    from ..training.options import parse_words

    return parse_words(argv)[0]


def option_defaults() -> dict:
    """Every option of ``maskft train`` with its default (None where there is none)."""
    from ..training.options import option_defaults

    return option_defaults()
