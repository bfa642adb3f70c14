from types import SimpleNamespace

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


def test_random_answers_are_never_reused(tmp_path):
    lm = Counting()
    resumed = Resuming(lm, Journal(tmp_path / "answers.jsonl", SETTINGS))
    resumed.generate_until([request("a", do_sample=True)] * 2)
    resumed.generate_until([request("a", do_sample=True)])
    assert lm.asked == ["a"] * 3
