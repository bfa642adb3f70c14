import json
from types import SimpleNamespace

import pytest

from maskft_base.errors import UserError
from maskft_lab.evaluation.journal import Journal, Resuming

SETTINGS = {"model": "abc", "dtype": "float32"}


def request(prompt, **settings):
    return SimpleNamespace(args=(prompt, settings))


class Counting:
    """Echoes prompts and counts what it is asked."""

    def __init__(self):
        self.asked, self.rank = [], 0

    def set_cache_hook(self, hook):
        self.hook = hook

    def generate_until(self, requests):
        for asked in requests:
            self.asked.append(asked.args[0])
            self.hook.add_partial("generate_until", asked.args, asked.args[0].upper())
        return [asked.args[0].upper() for asked in requests]


def test_only_what_is_not_known_is_asked(tmp_path):
    file = tmp_path / "answers.jsonl"
    Resuming(Counting(), Journal(file, SETTINGS)).generate_until([request("a"), request("b", until=["x"])])
    lm = Counting()
    resumed = Resuming(lm, Journal(file, SETTINGS))
    asked = [request("b", until=["x"]), request("c"), request("b", until=["y"]), request("a")]
    assert resumed.generate_until(asked) == ["B", "C", "B", "A"]
    assert lm.asked == ["c", "b"] and resumed.rank == 0


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    file = tmp_path / "answers.jsonl"
    Resuming(Counting(), Journal(file, SETTINGS)).generate_until([request("a"), request("b")])
    file.write_text(file.read_text()[:-9])
    for asked in (["b"], []):
        lm = Counting()
        assert Resuming(lm, Journal(file, SETTINGS)).generate_until([request("a"), request("b")]) == ["A", "B"]
        assert lm.asked == asked


def test_random_answers_are_never_reused(tmp_path):
    lm = Counting()
    resumed = Resuming(lm, Journal(tmp_path / "answers.jsonl", SETTINGS))
    resumed.generate_until([request("a", do_sample=True)] * 2)
    resumed.generate_until([request("a", do_sample=True)])
    assert lm.asked == ["a"] * 3


def test_answers_of_other_settings_are_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    Journal(file, SETTINGS).add_partial("generate_until", ("a", {}), "A")
    with pytest.raises(UserError, match=r"other settings \(dtype\); name another output_dir"):
        Journal(file, {**SETTINGS, "dtype": "bfloat16"})
    journal = Journal(file, {**SETTINGS, "dtype": "bfloat16"}, overwrite=True)
    assert journal.answers == {} and not file.exists()
    journal.add_partial("generate_until", ("b", {}), "B")
    assert json.loads(file.read_text().splitlines()[0])["dtype"] == "bfloat16"
    journal.remove()
    assert not file.exists()


def test_overwriting_drops_answers_of_the_same_settings_too(tmp_path):
    file = tmp_path / "answers.jsonl"
    Journal(file, SETTINGS).add_partial("generate_until", ("a", {}), "A")
    assert Journal(file, SETTINGS).answers
    assert Journal(file, SETTINGS, overwrite=True).answers == {} and not file.exists()


def test_a_journal_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "answers.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link and no journal of ours"):
        Journal(tmp_path / "answers.jsonl", SETTINGS)
    journal = Journal(tmp_path / "answers.jsonl", SETTINGS, overwrite=True)
    journal.add_partial("kind", ["prompt"], "answer")
    assert (tmp_path / "mine").read_text() == "kept" and not (tmp_path / "answers.jsonl").is_symlink()
