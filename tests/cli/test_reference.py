"""The reference page and the help texts that are kept as files are those of the parsers."""

import json

import pytest

from maskft_lab.cli import reference
from maskft_lab.cli.early import TRAIN_OPTIONS, installed_versions
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
    from maskft.training.options import option_defaults

    assert not [name for name in option_defaults() if f"| `--{name}` |" not in page]
    for name in set(COMMANDS) - {"train"}:
        for parser in reference._parsers(name):
            for action in filter(reference._is_shown, parser._actions):
                assert all(f"`{option}`" in page for option in action.option_strings[-1:]), action


def test_a_default_is_stated_in_one_way():
    """In parentheses at the end of the help: ``(default: X)``."""
    for name in set(COMMANDS) - {"train"}:
        for parser in reference._parsers(name):
            for action in filter(reference._is_shown, parser._actions):
                text = (action.help or "").lower()
                assert "default" not in text or "(default" in text, (name, action.dest)
                assert text.count("(default: ") <= 1, (name, action.dest)
