"""A judge that says which of two outputs is better, and the win rates that follow; both by the `alpaca_eval` package.

Its annotator makes the prompts (which output comes first is drawn from the instruction), and reads the verdict from the
log-probabilities of the two possible answers. Only the transport is ours, because the package's own gives up at the
first failure, keeps nothing until 128 answers are there, and takes models called *instruct for ones without chat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..errors import UserError
from .journal import Journal

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
OPENAI_HOST = "api.openai.com"
NUM_CONCURRENT = 4
# So many answers without a single usable one, and the server is at fault, not the item.
MAX_USELESS_AT_START = 8
MIN_ITEMS_FOR_LENGTH_CONTROL = 10  # the package chooses its regularisation by 5-fold cross-validation
NUM_RESAMPLES = 100
# Resamples without a difference in length have no fit. More than a tenth are such where one or two items differ.
MIN_SHARE_FITTED = 0.9
KIND = "alpaca_eval_verdict"


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is.

    Args:
        url: Base URL of a server of the OpenAI protocol.
        model: The judge's name there.
        timeout_s: How long to wait for an answer, in seconds.
        num_retries: How often to ask again, with growing waits.
    """

    url: str
    model: str
    timeout_s: float = 120
    num_retries: int = 5


@dataclass(frozen=True)
class Verdicts:
    """The judge's verdicts.

    Args:
        values: Probability that the second output is better, for each pair, in [0, 1]; None: no verdict.
        reason: Why the last pair without verdict has none; None if all have one.
        annotator: Which of the package's annotators asked.
    """

    values: list[float | None]
    reason: str | None
    annotator: str = ANNOTATOR


class Judge:
    """A model behind a server of the OpenAI protocol.

    Args:
        settings: Where it is.
        journal: Keeps its answers.
        console: Where the progress bar goes.
    """

    def __init__(self, settings: JudgeSettings, journal: Journal | None = None, console=None):
        import openai

        self.settings, self.journal, self.console = settings, journal, console
        self.reason: str | None = None
        key = os.environ.get("JUDGE_API_KEY")
        if not key and urlsplit(settings.url).hostname == OPENAI_HOST:
            key = os.environ.get("OPENAI_API_KEY")
        self.client = openai.OpenAI(
            base_url=settings.url,
            api_key=key or "none",  # servers of one's own do not ask for one
            timeout=settings.timeout_s,
            max_retries=settings.num_retries,
        )

    def check_reachable(self) -> None:
        """Refuse a server that does not answer or does not let us in; any other answer will do."""
        import openai

        try:
            self.client.with_options(max_retries=0, timeout=min(10, self.settings.timeout_s)).models.list()
        except openai.APIConnectionError as error:
            raise UserError(
                f"the judge at {self.settings.url} cannot be reached ({_cause(error)}); start it, or check --judge_url"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused(error) from None
        except (openai.APIStatusError, openai.APIResponseValidationError):
            pass  # a server without a list of models
        except (AttributeError, ValueError):  # what the client does with a page, or with nothing
            raise UserError(
                f"what answers at {self.settings.url} does not speak the OpenAI protocol; check --judge_url (does it "
                "end in /v1?)"
            ) from None

    def completions(self, prompts: Sequence[str], **parameters: Any) -> dict[str, list]:
        """Ask for all prompts; called by the package's annotator, in its format.

        Args:
            prompts: In ChatML.
            **parameters: Of the request: ``max_tokens``, ``temperature``, ``logprobs``, ``top_logprobs``.

        Returns:
            ``completions_all``: the first choice of each answer as a dict, an empty text where there is no usable one.

        Raises:
            UserError: If the judge stops answering; what it has answered is in the journal.
        """
        from alpaca_eval.utils import prompt_to_chatml

        from ..runtime import progress_bar

        parameters["model"] = self.settings.model
        del parameters["model_name"]
        requests = [{"messages": prompt_to_chatml(prompt), **parameters} for prompt in prompts]
        # Two servers may call different models by one name.
        keys = [self.journal.key(KIND, [self.settings.url, request]) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.journal.answers}
        done = len(requests) - len(missing)
        with progress_bar(self.console) as progress, ThreadPoolExecutor(NUM_CONCURRENT) as executor:
            bar = progress.add_task("alpaca_eval: verdicts", total=len(requests), completed=done)
            futures = {executor.submit(self._ask, request): request for request in missing.values()}
            num_useless = 0
            try:
                for future in as_completed(futures):
                    answer = future.result()
                    progress.advance(bar)
                    if answer is not None:
                        self.journal.add_partial(KIND, [self.settings.url, futures[future]], answer)
                        done += 1
                        continue
                    num_useless += 1
                    if done == 0 and num_useless == min(MAX_USELESS_AT_START, len(requests)):
                        raise UserError(
                            f"the judge {self.settings.model} gave no usable answer to {num_useless} requests "
                            f"({self.reason}); the outputs are kept: run the same command again with a judge that does"
                        )
            except _NoAnswer as error:
                raise UserError(
                    f"the judge at {self.settings.url} stopped answering ({error}, asked "
                    f"{self.settings.num_retries + 1} times); the outputs and {done} of {len(requests)} verdicts are "
                    f"kept in {self.journal.file}: run the same command again to go on"
                ) from None
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
        return {"completions_all": [self.journal.answers.get(key, "") for key in keys]}

    def _ask(self, request: Mapping) -> dict | None:
        """One answer; None if this request has none that can be used."""
        import openai

        try:
            response = self.client.chat.completions.create(**request)
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            raise _NoAnswer(_cause(error)) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from None
        except openai.APIError as error:  # this request was refused (too long, filtered)
            self.reason = _cause(error)
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

    def _refused(self, error) -> UserError:
        return UserError(
            f"the judge at {self.settings.url} refuses model {self.settings.model!r} ({_cause(error)}); check "
            "--judge_model, and the key in JUDGE_API_KEY"
        )


class _NoAnswer(Exception):
    """The server does not answer, after all retries."""


def preferences(pairs: Sequence[Mapping[str, str]], judge: Judge) -> Verdicts:
    """Ask the judge which output of each pair is better.

    Args:
        pairs: With ``instruction``, ``output_1`` and ``output_2``. Equal outputs are a draw, and not asked about.
        judge: Who is asked.

    Raises:
        UserError: If the judge stops answering, or gives no verdict at all.
    """
    import pandas as pd
    from alpaca_eval import utils
    from alpaca_eval.annotators import SinglePairwiseAnnotator
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    config = utils.load_configs(EVALUATORS_CONFIG_DIR / ANNOTATOR / "configs.yaml")[ANNOTATOR]
    annotator = SinglePairwiseAnnotator(
        **config | {"fn_completions": judge.completions},
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
    if all(value is None for value in values):
        judge.reason = judge.reason or "neither m nor M among its likeliest answers"
        raise UserError(
            f"the judge {judge.settings.model} gave no verdict on any of {len(values)} items ({judge.reason})"
        )
    reason = None if None not in values else judge.reason or "neither m nor M among the judge's likeliest answers"
    return Verdicts(values, reason)


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
    from alpaca_eval.metrics import glm_winrate

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
        with _length_control_data(published_data, index) as file, _quiet():
            value = _fit(glm_winrate, table, formula, file)
            rng = np.random.default_rng(0)
            drawn = [rng.integers(0, len(table), len(table)) for _ in range(NUM_RESAMPLES)]
            drawn = [rows for rows in drawn if np.ptp(differences[rows]) > 0]
            if len(drawn) >= MIN_SHARE_FITTED * NUM_RESAMPLES:
                samples = [_fit(glm_winrate, table.iloc[rows], formula, file) for rows in drawn]
                stderr = float(np.std(samples, ddof=1))
    return {
        "value": value,
        "stderr": stderr,
        "num_items": len(table),
        "higher_is_better": True,
        "unit": "fraction",
    }


def _fit(glm_winrate, table, formula: str, file: Path) -> float:
    # The package knows this file from the hub only.
    download, glm_winrate.hf_hub_download = glm_winrate.hf_hub_download, lambda **_: str(file)
    try:
        metrics = glm_winrate.get_length_controlled_winrate(
            table.reset_index(drop=True), glm_name=formula, save_weights_dir=None
        )
    finally:
        glm_winrate.hf_hub_download = download
    return float(metrics["length_controlled_winrate"]) / 100


@contextlib.contextmanager
def _length_control_data(published: Path | None, index: Sequence[int]) -> Iterator[Path]:
    """The published file; without it one with a difficulty of 0 for all, which the minimal formula does not use."""
    if published is not None:
        yield published
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "difficulty.csv"
        rows = "".join(f"none,{number},0\n" for number in range(max(index) + 1))
        file.write_text(f"model,index,instruction_difficulty\n{rows}")
        yield file


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


def _cause(error: Exception) -> str:
    """What the server or the network said, in one short line."""
    cause = error.__cause__ if error.__cause__ and not getattr(error, "status_code", None) else error
    return " ".join(str(cause).split())[:160] or type(cause).__name__
