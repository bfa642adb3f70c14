"""``maskft train``: TRL's SFT arguments, the data's, the method's, and the mask's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskft.training.arguments import TrainConfig


def main(argv: Sequence[str]) -> None:
    """Parse ``--config recipe.yaml`` and flags (flags win), then train, in several processes if that is asked for."""
    from maskft.training.launch import is_launched, launch
    from maskft.training.options import help_text, parse_words
    from maskft_common.quiet import silence

    silence()
    if not {"-h", "--help", "--help_all"}.isdisjoint(argv):
        print(help_text(is_long="--help_all" in argv))
        return
    config, launch_words, train_words = parse_words(argv)
    if not launch_words or is_launched():
        from maskft.training.train import train

        from ..estimate.out_of_memory import explained

        with explained():
            train(config)
        return
    status = launch(launch_words, "maskft_lab.cli.main", ["train", *train_words])
    if status:
        sys.exit(status)


def parse(argv: Sequence[str]) -> TrainConfig:
    """What the words after ``maskft train`` configure; every mistake is one UserError."""
    from maskft.training.options import parse_words

    return parse_words(argv)[0]
