"""The arguments of training."""

import warnings

from maskft.training.arguments import TrainingArguments


def test_trls_default_does_not_warn_of_its_old_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = TrainingArguments(str(tmp_path), report_to="none")
    assert args.gradient_checkpointing is True
