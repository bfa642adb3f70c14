"""Finished answers on disk, from which a killed evaluation is resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from maskft_common.files import digest
from maskft_common.progress_bar import Progress

from ..generation.greedy import Bounds, greedy_generate
from ..store import Store

# The methods of an lm-eval model that answer requests.
_REQUEST_KINDS = (
    "generate_until",
    "loglikelihood",
    "loglikelihood_rolling",
)


class Journal(Store):
    """Finished answers by their requests; lm-eval's models call it, as their cache hook, with each answer."""

    @staticmethod
    def key(kind: str, arguments: Sequence) -> str:
        """The name of a request: its kind, prompt and settings, whatever task it comes from."""
        # A digest: prompts are long, and the journal holds the answers only.
        return digest([kind, *arguments])

    def add_partial(self, kind: str, arguments: Sequence, answer: Any) -> None:
        """Keep one answer."""
        key = self.key(kind, arguments)
        self.add(key, answer)


def resumed(
    kind: str,
    requests: Sequence[list],
    compute: Callable[[list[int], Callable[[int, Any], None]], None],
    title: str,
    journal: Journal | None,
) -> list:
    """Answers to requests: those in the journal, and the others computed and kept one by one.

    Args:
        kind: Kind of the requests, for the journal.
        requests: Everything on which each answer depends, JSON-able.
        compute: Given the indices of the requests to compute, it calls its second argument with the position among
            these and the answer; a request for which it does not has the answer None.
        title: Of the progress bar.
        journal: Keeps the answers, so that a run that ended early is resumed; None: nothing is kept.
    """
    # Index of a request -> its answer, at first those of a run that was killed
    answers: dict[int, Any] = {}
    if journal:
        for index, request in enumerate(requests):
            key = journal.key(kind, request)
            if key in journal.values:
                answers[index] = journal.values[key]
    missing = [index for index in range(len(requests)) if index not in answers]

    with Progress() as progress:
        bar = progress.add_task(title, total=len(requests), completed=len(answers))

        # Each answer is written at once: a kill loses the batch that is computed, and no more.
        def keep(position: int, answer: Any) -> None:
            index = missing[position]
            answers[index] = answer
            if journal:
                journal.add_partial(kind, requests[index], answer)
            progress.advance(bar)

        if missing:
            compute(missing, keep)
    return [answers.get(index) for index in range(len(requests))]


def generated(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    bounds: Bounds,
    title: str,
    journal: Journal | None,
) -> list[str]:
    """Greedy answers to prompts of token ids, see `resumed` and `generation.greedy_generate`."""

    def generate(indices: list[int], keep: Callable[[int, str], None]) -> None:
        missing = [prompts[index] for index in indices]
        greedy_generate(model, tokenizer, missing, bounds, keep)

    # The bound is a part of the request, so that a run may be resumed with another one without a mixture of both.
    requests = [[ids, bounds.max_new_tokens] for ids in prompts]
    return resumed("answer", requests, generate, title, journal)


class Resuming:
    """An lm-eval model that asks the wrapped one only for answers that are not in the journal.

    Args:
        lm: The model; it calls the journal, its cache hook, with each answer.
        journal: Keeps its answers.
    """

    def __init__(self, lm, journal: Journal):
        self.lm = lm
        self.journal = journal
        lm.set_cache_hook(journal)

    def __getattr__(self, name: str) -> Any:
        # Everything but the requests is the wrapped model's: lm-eval reads many of its attributes.
        if name not in _REQUEST_KINDS:
            return getattr(self.lm, name)
        return lambda requests: self._answer(name, requests)

    def _answer(self, kind: str, requests: list) -> list:
        answers: list[Any] = [None] * len(requests)
        missing: list[int] = []
        for index, request in enumerate(requests):
            # An answer that is drawn at random is never taken from the journal.
            key = None
            if not _is_sampled(request):
                key = self.journal.key(kind, request.args)
            # No request has the key None.
            if key in self.journal.values:
                answers[index] = self.journal.values[key]
            else:
                missing.append(index)

        if missing:
            # The journal is not written here: the model calls it with each answer, so that a kill loses only those of
            # the batch that it interrupts.
            answer = getattr(self.lm, kind)
            fresh = answer([requests[index] for index in missing])
            for index, each in zip(missing, fresh, strict=True):
                answers[index] = each
        return answers


def _is_sampled(request) -> bool:
    """Whether the answer is drawn at random, so that each repetition of the request needs another one."""
    from lm_eval.models.utils import normalize_gen_kwargs

    # A request to generate has the arguments (context, settings); the others have texts only.
    settings = None
    if len(request.args) > 1:
        settings = request.args[1]
    if not isinstance(settings, dict):
        return False
    # By lm-eval's own rules: a temperature without do_sample is enough.
    return normalize_gen_kwargs(settings)["do_sample"]
