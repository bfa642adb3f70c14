"""Answers already given, on disk, so that an evaluation that was killed is resumed where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from maskft_common.files import digest
from maskft_common.progress_bar import Progress

from ..generation.greedy import Bounds, greedy_generate
from ..store import Store

_REQUEST_KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


class Journal(Store):
    """Finished answers by what was asked; lm-eval's models call it, as their cache hook, with each answer they have."""

    @staticmethod
    def key(kind: str, arguments: Sequence) -> str:
        """The name of a request: its kind, prompt and settings, whatever task it comes from."""
        return digest([kind, *arguments])

    def add_partial(self, kind: str, arguments: Sequence, answer: Any) -> None:
        """Keep one answer."""
        self.add(self.key(kind, arguments), answer)


def resumed(
    kind: str,
    requests: Sequence[list],
    compute: Callable[[list[int], Callable[[int, Any], None]], None],
    title: str,
    journal: Journal | None,
) -> list:
    """Answers to requests: those that the journal knows, and the others computed and kept one by one.

    Args:
        kind: What is asked, for the journal.
        requests: What each answer depends on, JSON-able.
        compute: Given the indices of the requests to compute, it calls its second argument with the position among
            these and the answer; a request for which it does not has the answer None.
        title: Of the progress bar.
        journal: Keeps the answers, so that a run that ended early is resumed; None: nothing is kept.
    """
    answers = {}
    if journal:
        keys = [journal.key(kind, request) for request in requests]
        answers = {index: journal.values[key] for index, key in enumerate(keys) if key in journal.values}
    missing = [index for index in range(len(requests)) if index not in answers]
    with Progress() as progress:
        bar = progress.add_task(title, total=len(requests), completed=len(answers))

        def keep(position: int, answer: Any) -> None:
            answers[missing[position]] = answer
            if journal:
                journal.add_partial(kind, requests[missing[position]], answer)
            progress.advance(bar)

        if missing:
            compute(missing, keep)
    return [answers.get(index) for index in range(len(requests))]


def generated(
    model, tokenizer, prompts: Sequence[list[int]], bounds: Bounds, title: str, journal: Journal | None
) -> list[str]:
    """Greedy answers to prompts of token ids, see `resumed` and `generation.greedy_generate`."""

    def generate(indices: list[int], keep: Callable[[int, str], None]) -> None:
        greedy_generate(model, tokenizer, [prompts[index] for index in indices], bounds, keep)

    return resumed("answer", [[ids, bounds.max_new_tokens] for ids in prompts], generate, title, journal)


class Resuming:
    """An lm-eval model that asks the wrapped one only what the journal does not know.

    Args:
        lm: The model; it calls the journal, its cache hook, with each answer.
        journal: Keeps its answers.
    """

    def __init__(self, lm, journal: Journal):
        self.lm = lm
        self.journal = journal
        lm.set_cache_hook(journal)

    def __getattr__(self, name: str) -> Any:
        if name not in _REQUEST_KINDS:
            return getattr(self.lm, name)
        return lambda requests: self._answer(name, requests)

    def _answer(self, kind: str, requests: list) -> list:
        keys = [None if _is_sampled(request) else self.journal.key(kind, request.args) for request in requests]
        known = [key in self.journal.values for key in keys]
        missing = [request for request, is_known in zip(requests, known, strict=True) if not is_known]
        fresh = iter(getattr(self.lm, kind)(missing) if missing else [])
        return [
            self.journal.values[key] if is_known else next(fresh) for key, is_known in zip(keys, known, strict=True)
        ]


def _is_sampled(request) -> bool:
    """Whether the answer is drawn at random, and each repetition of the request wants another."""
    from lm_eval.models.utils import normalize_gen_kwargs  # a temperature alone is enough

    settings = request.args[1] if len(request.args) > 1 else None
    return isinstance(settings, dict) and normalize_gen_kwargs(settings)["do_sample"]
