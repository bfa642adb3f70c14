"""Progress bars and warnings of other libraries that a user of maskft need not see."""

from __future__ import annotations

import warnings

from .processes import is_main


def silence() -> None:
    """Show no progress bars of libraries and no warnings of their futures; other warnings in the main process only."""
    # Imported here, because it takes seconds.
    import logging

    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # It warns that it gives the model the tokenizer's special tokens, and of the order in which it sorts checkpoints.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    # Every process has the same warnings to show.
    if not is_main():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
