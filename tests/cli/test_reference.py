"""The reference page and the help texts that are kept as files are those of the parsers."""

import json
import re
from dataclasses import fields

import pytest

from maskft.data.arguments import DataArguments
from maskft.training.arguments import TrainingArguments
from maskft.training.method_arguments import MaskArguments, MethodArguments
from maskft.training.options import make_parser as make_train_parser
from maskft_lab.cli import reference
from maskft_lab.cli.early import TRAIN_OPTIONS, help_text, installed_versions
from maskft_lab.cli.main import COMMANDS

RENEW = "run: python -m maskft_lab.cli.reference"


@pytest.fixture(scope="module")
def files():
    return reference.files()


def words(text):
    """Versions of Python break lines of a help in different places."""
    return text.split()


def test_files_are_current(files):
    """With other versions of TRL than those that the files name, the options of maskft alone are compared."""
    known = json.loads(TRAIN_OPTIONS.read_text())["versions"]
    if installed_versions(known) == known:
        for file, text in files.items():
            assert words(file.read_text()) == words(text), RENEW
        return
    page = reference.PAGE.read_text()
    assert reference.without_trl(page) == reference.without_trl(files[reference.PAGE]), RENEW


def test_the_page_has_every_command_and_option(files):
    page = files[reference.PAGE]
    assert all(f"\n## maskft {name}\n" in page for name in COMMANDS)
    from maskft.training.checks import refused_options
    from maskft.training.options import option_defaults

    for name in option_defaults():
        assert (f"| `--{name}` |" in page) == (name not in refused_options()), name
    for name in set(COMMANDS) - {"train"}:
        for parser in reference._parsers(name):
            for action in filter(reference._is_shown, parser._actions):
                assert all(f"`{option}`" in page for option in action.option_strings[-1:]), action


def test_a_default_is_stated_in_one_way():
    """In parentheses at the end of the help: ``(default: X)``."""
    own = {spec.name for group in (MethodArguments, MaskArguments, DataArguments) for spec in fields(group)}
    own |= set(TrainingArguments.__annotations__)
    actions = [("train", action) for action in make_train_parser()._actions]
    for name in set(COMMANDS) - {"train"}:
        actions += [(name, action) for parser in reference._parsers(name) for action in parser._actions]
    for name, action in actions:
        if reference._is_shown(action) and (name != "train" or action.dest in own):
            text = (action.help or "").lower()
            assert "default" not in text or "(default" in text, (name, action.dest)
            assert text.count("(default: ") <= 1, (name, action.dest)


def test_the_short_help_of_train_states_defaults_in_that_way():
    text = " ".join(help_text("train").split())
    assert "Coefficient, >= 0, of a KL(base || model) penalty" in text and "per token (default: 0.0)" in text
    assert "of the scores (default: 3e-4 for top-k masks" in text and "held-out rows. (" not in text
    assert not re.search(r"\[(0\.0|42|True|False|mask|none)\]|Default: |\(default: (None|False)\)", text)
