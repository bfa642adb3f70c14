"""``maskft train``: TRL's SFT arguments, the data's, the method's, and the mask's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import early

# For an annotation only: the module imports torch.
if TYPE_CHECKING:
    from maskft.training.arguments import TrainConfig


def main(argv: Sequence[str]) -> None:
    """Parse ``--config recipe.yaml`` and flags (flags win), then train, in several processes if asked for."""
    if early.asks_for_help(argv):
        print(early.help_text("train"))
        return

    words = early.with_config(argv)
    asks_for_all_help = "--help_all" in words
    if not asks_for_all_help:
        early.check_training(words)

    # From here on torch is imported.
    from maskft.training.launch import is_launched, launch
    from maskft.training.options import help_text, parse_words
    from maskft_common.quiet import silence

    silence()
    # From the parser itself, and so of every option; the short help above is a file.
    if asks_for_all_help:
        print(help_text(is_long=True))
        return

    # Options of `accelerate launch` ask for several processes. Each of them runs this command again with the words of
    # the training, and is_launched() is true there.
    config, launch_words, train_words = parse_words(words)
    if launch_words and not is_launched():
        # The process that failed first has printed its error, so that only the status is passed on.
        status = launch(launch_words, "maskft_lab.cli.main", ["train", *train_words])
        if status:
            sys.exit(status)
        return

    from maskft.training.train import train
    from maskft_common import processes

    from ..estimate.out_of_memory import explained

    # Memory that runs out is one line with advice, not a traceback.
    with explained():
        train(config)
    # A process that a launcher started ends here; another one may train again.
    if is_launched():
        processes.leave_group()


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration of the words after ``maskft train``; every mistake is one UserError."""
    from maskft.training.options import parse_words

    words = early.with_config(argv)
    config, _, _ = parse_words(words)
    return config
