"""A judge that says which of two outputs is better, and the win rates that follow; both by the `alpaca_eval` package.

Its annotator makes the prompts (which output comes first is drawn from the instruction) and reads the verdict from the
log-probabilities of the two possible answers; its regression controls for length. Its `evaluate` is both in one call,
but takes an annotator by name only: with its own transport one refused request ends the evaluation, and answers are
kept only once 128 are there. So the annotator is given a transport of ours, as its `fn_completions` allows.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np

from maskft_base.errors import UserError

from .journal import Resources, resumed

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
OPENAI_HOST = "api.openai.com"
NUM_CONCURRENT = 4
MAX_UNUSABLE_AT_START = 8  # after this many unusable answers and no usable one the server is at fault, not the items
MIN_ITEMS_FOR_LENGTH_CONTROL = 10  # the package chooses its regularisation by 5-fold cross-validation
NUM_RESAMPLES = 100
# Resamples without a difference in length have no fit. More than a tenth are such where one or two items differ.
MIN_SHARE_FITTED = 0.9
KIND = "alpaca_eval_verdict"  # in the journal


class JudgeSilent(Exception):
    """The judge does not answer, after all retries."""


class Judge:
    """A model behind a server of the OpenAI protocol.

    It is sent the prompts and the key, and nothing that says whose they are; a redirect is an error.

    Args:
        url: Base URL of the server, in which a user and a password may be; no message shows them.
        model: The judge's name there.
        timeout_s: How long to wait for an answer, in seconds.
        num_retries: How often to ask again, with growing waits.
    """

    def __init__(self, url: str, model: str, timeout_s: float = 120, num_retries: int = 5):
        import openai

        parts = urlsplit(url)
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self.model, self.num_retries = model, num_retries
        self.reason: str | None = None  # why the last request without a usable answer has none
        key = os.environ.get("JUDGE_API_KEY")
        if not key and parts.hostname == OPENAI_HOST:
            key = os.environ.get("OPENAI_API_KEY")
        self.secrets = [secret for secret in (parts.password, key) if secret]
        # Servers of one's own do not ask for a key.
        self.client = openai.OpenAI(
            base_url=url,
            api_key=key or "none",
            timeout=timeout_s,
            max_retries=num_retries,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"request": [_without_names]}),
        )

    @property
    def host(self) -> str:
        """The server's name and port."""
        return urlsplit(self.url).netloc

    def check_reachable(self) -> None:
        """Refuse a server that does not answer or does not let us in; any other answer will do."""
        import openai

        try:
            self.client.with_options(max_retries=0, timeout=10).models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused(error) from None
        except (openai.APIStatusError, openai.APIResponseValidationError) as error:
            if 300 <= error.status_code < 400:
                raise UserError(
                    f"the judge at {self.url} sends its requests elsewhere (status {error.status_code}); name that "
                    "server with --judge_url"
                ) from None
            # Else a server without a list of models.
        except (openai.OpenAIError, AttributeError, ValueError) as error:  # the last two: a web page, or nothing
            raise UserError(
                f"the judge at {self.url} cannot be reached, or does not speak the OpenAI protocol "
                f"({self._cause(error)}); start it, or check --judge_url (does it end in /v1?)"
            ) from None

    def answer_all(self, requests: Sequence[Mapping], keep: Callable[[int, dict], None]) -> None:
        """Send requests, several at a time, and ``keep`` the position and answer of those with a usable answer.

        Raises:
            JudgeSilent: If the judge stops answering.
            UserError: If it refuses the model, or its first answers are all unusable.
        """
        num_usable = num_unusable = 0
        with ThreadPoolExecutor(NUM_CONCURRENT) as executor:
            futures = {executor.submit(self._answer, request): index for index, request in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    answer = future.result()
                    if answer is not None:
                        keep(futures[future], answer)
                        num_usable += 1
                        continue
                    num_unusable += 1
                    if not num_usable and num_unusable == min(MAX_UNUSABLE_AT_START, len(requests)):
                        raise UserError(
                            f"the judge {self.model} gave no usable answer to {num_unusable} requests ({self.reason}); "
                            "the outputs are kept: run the same command again with a judge that does"
                        )
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: Mapping) -> dict | None:
        """The first choice of one answer; None if there is none that can be used."""
        import openai

        try:
            response = self.client.chat.completions.create(**request)
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            raise JudgeSilent(f"{self._cause(error)}, asked {self.num_retries + 1} times") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from None
        except openai.APIError as error:  # this request was refused (too long, filtered)
            self.reason = self._cause(error)
            return None
        except (AttributeError, ValueError):
            self.reason = "its answer is not JSON of the OpenAI protocol"
            return None
        choice = (getattr(response, "choices", None) or [None])[0]
        choice = choice.model_dump() if hasattr(choice, "model_dump") else {}
        tokens = (choice.get("logprobs") or {}).get("content") or []
        if not tokens or not tokens[0].get("top_logprobs"):
            self.reason = "its answer has no log-probabilities"
            return None
        return choice

    def _cause(self, error: Exception) -> str:
        """What the server or the network said, in one short line without secrets."""
        cause = error.__cause__ if error.__cause__ and not getattr(error, "status_code", None) else error
        text = " ".join(str(cause).split()) or type(cause).__name__
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text[:160]

    def _refused(self, error: Exception) -> UserError:
        return UserError(
            f"the judge at {self.url} refuses model {self.model!r} ({self._cause(error)}); check --judge_model, and "
            "the key in JUDGE_API_KEY"
        )


def preferences(
    pairs: Sequence[Mapping[str, str]], judge: Judge, resources: Resources
) -> tuple[list[float | None], str | None]:
    """Ask the judge which output of each pair is better.

    Args:
        pairs: With ``instruction``, ``output_1`` and ``output_2``. Equal outputs are a draw, and not asked about.
        judge: Who is asked.
        resources: Its journal keeps the answers, so that none is asked for twice.

    Returns:
        For each pair the probability that the second output is better, in [0, 1], or None without a verdict; and why
        the last pair without one has none.

    Raises:
        UserError: If the judge stops answering, or gives no verdict at all.
    """
    import pandas as pd
    from alpaca_eval import utils
    from alpaca_eval.annotators import SinglePairwiseAnnotator
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    def completions(prompts: Sequence[str], model_name: str, **parameters: Any) -> dict[str, list]:
        requests = [
            {"messages": utils.prompt_to_chatml(prompt), **parameters, "model": judge.model} for prompt in prompts
        ]

        def compute(indices: list[int], keep: Callable) -> None:
            try:
                judge.answer_all([requests[index] for index in indices], keep)
            except JudgeSilent as error:
                journal = resources.journal
                done = sum(journal.key(KIND, key) in journal.answers for key in keys)
                raise UserError(
                    f"the judge at {judge.url} stopped answering ({error}); the outputs and {done} of {len(requests)} "
                    f"verdicts are kept in {journal.file}: run the same command again to resume"
                ) from None

        # Two servers may call different models by one name.
        keys = [[judge.url, request] for request in requests]
        return {"completions_all": resumed(KIND, keys, compute, "alpaca_eval: verdicts", resources)}

    config = utils.load_configs(EVALUATORS_CONFIG_DIR / ANNOTATOR / "configs.yaml")[ANNOTATOR]
    annotator = SinglePairwiseAnnotator(
        **config | {"fn_completions": completions},
        seed=0,  # of the published annotations: it draws which output comes first
        base_dir=EVALUATORS_CONFIG_DIR,
        annotation_column="preference",
        completion_column=None,
    )
    values: list[float | None] = [0.5 if pair["output_1"] == pair["output_2"] else None for pair in pairs]
    table = pd.DataFrame(pairs)[[value is None for value in values]]
    if len(table):
        with _quiet():
            annotated = annotator(table)
        for index, preference in annotated["preference"].items():
            values[index] = float(preference) - 1  # 1: the first is better, 2: the second
    reason = (judge.reason or "neither m nor M among its likeliest answers") if None in values else None
    if all(value is None for value in values):
        raise UserError(f"the judge {judge.model} gave no verdict on any of {len(values)} items ({reason})")
    return values, reason


def length_controlled_win_rate(
    preference: Sequence[float],
    reference_length: Sequence[int],
    output_length: Sequence[int],
    index: Sequence[int],
    *,
    formula: str,
    published_data: Path | None,
) -> dict:
    """Win rate as it were if outputs were as long as references, by the package's regression.

    The standard error is a bootstrap over items, refitting each time. The package's own is the spread of its
    predictions, which says how much the prompts differ and not how sure the win rate is: it is 0 where only length
    is in the formula.

    Args:
        preference: Probability that the output is better, in [0, 1].
        reference_length: In characters.
        output_length: In characters.
        index: Position of each item among the published prompts.
        formula: Name of one of the package's regressions.
        published_data: Its file of instruction difficulties and of length-gaming baselines; None: not used.

    Returns:
        A metric record; value and stderr are None with fewer than 10 items, or where lengths do not differ, and stderr
        alone where lengths differ in fewer than nine tenths of the resamples.
    """
    import pandas as pd

    table = pd.DataFrame(
        {
            # An exact 0 or 1 is a weight of 0 in its fit: where all are alike it would fail, and answer 0.5.
            "preference": np.clip(preference, 1e-9, 1 - 1e-9) + 1,
            # The package measures texts.
            "output_1": ["x" * length for length in reference_length],
            "output_2": ["x" * length for length in output_length],
            "generator_1": "reference",
            "generator_2": "model",
            "index": index,
        }
    )
    value = stderr = None
    differences = np.asarray(output_length) - np.asarray(reference_length)
    if len(table) >= MIN_ITEMS_FOR_LENGTH_CONTROL and differences.any():
        # Without the published difficulties one of 0 for every item, which the minimal formula does not use.
        rows = "".join(f"none,{number},0\n" for number in range(max(index) + 1))
        data = published_data.read_text() if published_data else f"model,index,instruction_difficulty\n{rows}"
        rng = np.random.default_rng(0)
        drawn = [rng.integers(0, len(table), len(table)) for _ in range(NUM_RESAMPLES)]
        drawn = [items for items in drawn if np.ptp(differences[items]) > 0]
        value = _fit(table, formula, data)
        if len(drawn) >= MIN_SHARE_FITTED * NUM_RESAMPLES:
            stderr = float(np.std([_fit(table.iloc[items], formula, data) for items in drawn], ddof=1))
    return {"value": value, "stderr": stderr, "num_items": len(table), "higher_is_better": True, "unit": "fraction"}


def _fit(table, formula: str, data: str) -> float:
    from alpaca_eval.metrics import glm_winrate

    # The package knows the data of its regression from the hub only.
    with mock.patch.object(glm_winrate, "hf_hub_download", lambda **_: io.StringIO(data)), _quiet():
        metrics = glm_winrate.get_length_controlled_winrate(
            table.reset_index(drop=True), glm_name=formula, save_weights_dir=None
        )
    return float(metrics["length_controlled_winrate"]) / 100


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package logs each answer that it cannot read, with traceback, and uses deprecated options of scikit-learn."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _without_names(request: Any) -> None:
    """Take off what the client adds from OPENAI_ORG_ID and OPENAI_PROJECT_ID."""
    for header in ("OpenAI-Organization", "OpenAI-Project"):
        request.headers.pop(header, None)
