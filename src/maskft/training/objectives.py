"""What is trained for: likelihood of answers (sft), preferences (dpo), right answers (grpo); TRL's trainers of each.

Held-out rows are measured by what is trained for, so that the best checkpoint and the verdict on the mask are about it.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from maskft_base import runtime
from maskft_base.errors import UserError, did_you_mean
from maskft_lab.evaluation.journal import Resources, generated

from ..data import IGNORED, prompt_ids, tokenize_example
from ..data.answers import check_answer
from ..data.prepared import Prepared
from ..tuner.model import resumes_two_adapters
from .arguments import TrainingArguments, trainer_arguments
from .method_arguments import MethodArguments
from .trainer import MaskSFTTrainer, MaskTrainer
from .verdict import RowLosses, RowMeter, mean_nll, row_ids

_QUIET = Console(quiet=True)  # a bar inside the bar of the training would garble both
_CONFIGS = {"dpo": DPOConfig, "grpo": GRPOConfig}
_GENERATIONS = 8  # TRL's default
# Of one name, and of another meaning or default, in TRL's configurations.
_OWN = ("loss_type", "remove_unused_columns", "shuffle_dataset")


def make_trainer(
    model, tokenizer, data: Prepared, method: MethodArguments, training: TrainingArguments, is_resumed: bool
) -> MaskTrainer:
    """The trainer of an objective on these rows.

    Raises:
        UserError: If the rows have not what the objective needs.
    """
    args = trainer_arguments(training, is_resumed)
    if method.objective == "sft":
        columns = ["input_ids", "labels"]
        sets = {
            "train_dataset": data.train.select_columns(columns),
            "eval_dataset": data.heldout.select_columns(columns),
        }
        template = tokenizer.chat_template
        trainer = MaskSFTTrainer(model=model, args=args, processing_class=tokenizer, **sets)
        tokenizer.chat_template = template  # TRL has read its file again, without chat_template_kwargs
        return trainer
    has_two_adapters = method.objective == "dpo" and hasattr(model, "peft_config")  # TRL's reference is the second
    if has_two_adapters and is_resumed and not resumes_two_adapters():
        raise UserError(
            f"the Trainer of transformers {transformers.__version__} does not load the adapter when a run with a "
            "reference is resumed: install transformers>=5.23, or start again without resume_from_checkpoint"
        )
    make = _preference_trainer if method.objective == "dpo" else _answer_trainer
    return make(model, tokenizer, data, method, _objective_config(args, method))


def _objective_config(args: TrainingArguments, method: MethodArguments) -> Any:
    """TRL's configuration of the objective: what it shares with that of SFT, and what was given for it."""
    kind = _CONFIGS[method.objective]
    known = {spec.name for spec in dataclasses.fields(kind) if spec.init}
    shared = {spec.name for spec in dataclasses.fields(args) if spec.init} & known - {*_OWN}
    given = objective_options(method)
    for name in given:
        if name not in known:
            raise UserError(f"objective_options: {kind.__name__} has no {name!r}{did_you_mean(name, known)}")
    if method.objective == "grpo":
        _check_questions_of_a_step(args, given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
        try:
            config = kind(**{**{name: getattr(args, name) for name in shared}, **given})
        except (ValueError, TypeError) as error:
            raise UserError(f"objective {method.objective}: {error}") from error
    return config


def objective_options(method: MethodArguments) -> dict[str, Any]:
    """What was given for the objective, by the names of TRL's configuration."""
    given = {"beta": method.beta}
    if method.objective == "grpo":
        given |= {name: getattr(method, name) for name in ("num_generations", "max_completion_length", "temperature")}
        given["num_generations_eval"] = 1  # held-out rows are answered greedily, by the meter
    options = method.objective_options
    try:
        options = json.loads(options) if isinstance(options, str) else options or {}
    except json.JSONDecodeError:
        pass  # still a text, so refused below
    if not isinstance(options, Mapping):
        raise UserError(f'objective_options is {options!r}; write a JSON object such as \'{{"loss_type": "ipo"}}\'')
    return {name: value for name, value in given.items() if value is not None} | dict(options)


class _MeteredTrainer(MaskTrainer):
    """A trainer whose held-out loss is what its meter says, and not TRL's."""

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Measure the held-out rows; see the meter for what the loss is."""
        losses = self.meter(self.measured_rows)
        metrics = {f"{metric_key_prefix}_loss": mean_nll(losses)}
        output = EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(losses))
        return self._with_task_metrics(output, metric_key_prefix)


# Preferences


class MaskDPOTrainer(_MeteredTrainer, DPOTrainer):
    """Preference training; the reference is the model with the adapter switched off."""

    def _prepare_dataset(self, dataset, *args):
        """Rows come with the tokens of the one tokenisation; TRL has no option that says so."""
        return dataset


def _preference_trainer(model, tokenizer, data: Prepared, method: MethodArguments, config) -> MaskDPOTrainer:
    rows = [_by_id(rows, kept, "rejected", "dpo") for rows, kept in _with_tokens(data)]
    train, heldout = ([_pair(row, tokenizer, config.max_length) for row in part] for part in rows)
    trainer = MaskDPOTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([_for_dpo(*pair) for pair in train]),
        eval_dataset=Dataset.from_list([_for_dpo(*pair) for pair in heldout]),
    )
    trainer.measured_rows = data.heldout
    pairs = dict(zip(row_ids(data.heldout), heldout, strict=True))
    trainer.meter = PreferenceMeter(trainer, pairs, tokenizer.pad_token_id or 0)
    return trainer


def _pair(row: Mapping, tokenizer, max_length: int | None) -> tuple[dict, dict]:
    """Tokens and labels of a prompt with its chosen and with its rejected completion."""
    texts = {name: row[name] for name in ("prompt", "completion")}
    chosen = tokenize_example(texts, tokenizer, max_length=max_length)
    return chosen, tokenize_example({**texts, "completion": row["rejected"]}, tokenizer, max_length=max_length)


def _for_dpo(chosen: dict, rejected: dict) -> dict:
    """The columns that TRL's DPOTrainer takes as tokenised; the prompt is what neither completion has tokens of."""
    length = min(_prompt_length(part["labels"]) for part in (chosen, rejected))
    return {
        "prompt_ids": chosen["input_ids"][:length],
        "chosen_ids": chosen["input_ids"][length:],
        "rejected_ids": rejected["input_ids"][length:],
    }


def _prompt_length(labels: Sequence[int]) -> int:
    return next((n for n, label in enumerate(labels) if label != IGNORED), len(labels))


class PreferenceMeter:
    """DPO's loss of held-out pairs, -log sigmoid(beta * (margin of the policy - margin of the reference)), in nats.

    log 2 for the reference itself. Every process must call it with the same rows.
    """

    objective = "dpo"

    def __init__(self, trainer: MaskDPOTrainer, pairs: Mapping[str, tuple[dict, dict]], pad_token_id: int):
        self.trainer, self.pairs, self.pad_token_id = trainer, pairs, pad_token_id

    def __call__(self, rows: Dataset) -> RowLosses:
        """Losses of the rows, in their order; each counts as one."""
        ids = row_ids(rows)
        policy = self._margins(ids)
        differences = torch.tensor([policy[name] - self.of_reference[name] for name in ids], dtype=torch.float64)
        losses = torch.nn.functional.softplus(-self.trainer.args.beta * differences)
        return [(float(loss), 1) for loss in losses]

    @cached_property
    def of_reference(self) -> dict[str, float]:
        """Margins without the adapter, measured once."""
        with _unmasked(self._model):
            return self._margins(list(self.pairs))

    @property
    def _model(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _margins(self, ids: Sequence[str]) -> dict[str, float]:
        """log-probability of the chosen minus that of the rejected completion, in nats."""
        parts = Dataset.from_list([part for name in ids for part in self.pairs[name]])
        measure = RowMeter(self._model, self.trainer.args, self.pad_token_id, self.trainer.compute_loss_context_manager)
        sums = [-nll * count for nll, count in measure(parts)]
        return {name: sums[2 * n] - sums[2 * n + 1] for n, name in enumerate(ids)}


@contextmanager
def _unmasked(model) -> Iterator[None]:
    """Adapters off inside, and afterwards as they were: PEFT's own switch, used inside itself, switches them on."""
    is_off = any(getattr(module, "disable_adapters", False) is True for module in model.modules())
    with nullcontext() if is_off else model.disable_adapter():
        yield


# Answers


class MaskGRPOTrainer(_MeteredTrainer, GRPOTrainer):
    """Reinforcement of answers that are right."""


def answer_reward(completions: Sequence, answer: Sequence[str], answer_type: Sequence[str], **_: Any) -> list[float]:
    """1 for each completion that gives the row's answer, else 0; checked as ``maskft evaluate`` does."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(check_answer(*checked)) for checked in zip(texts, answer, answer_type, strict=True)]


def _answer_trainer(model, tokenizer, data: Prepared, method: MethodArguments, config) -> MaskGRPOTrainer:
    rows = [_by_id(rows, kept, "answer", "grpo") for rows, kept in _with_tokens(data)]
    train, heldout = ([_for_grpo(row) for row in part] for part in rows)
    trainer = MaskGRPOTrainer(
        model=model,
        reward_funcs=answer_reward,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
    )
    trainer.measured_rows = data.heldout
    trainer.meter = AnswerMeter(trainer, dict(zip(row_ids(data.heldout), rows[1], strict=True)), tokenizer)
    return trainer


def _check_questions_of_a_step(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    count, each = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps, _GENERATIONS
    each = given.get("num_generations", each)
    if each < 2 or (count % each and not {"steps_per_generation", "generation_batch_size"} & set(given)):
        raise UserError(
            f"num_generations is {each}, and a step has {count} answers; with grpo a batch counts answers, 2 or more "
            "to each question: set global_batch_size to a multiple of num_generations"
        )


def _for_grpo(row: Mapping) -> dict:
    """What TRL's GRPOTrainer generates from, and what its answers are checked against."""
    prompt = row.get("prompt")
    if prompt is None:
        turns = [n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        prompt = row["messages"][: turns[-1]] if turns else row["messages"]
    return {"prompt": prompt, "answer": row["answer"], "answer_type": row.get("answer_type") or "exact"}


class AnswerMeter:
    """Whether greedy answers to held-out rows are wrong (1) or right (0); every process must call it."""

    objective = "grpo"

    def __init__(self, trainer: MaskGRPOTrainer, rows: Mapping[str, Mapping], tokenizer):
        self.trainer, self.rows, self.tokenizer = trainer, rows, tokenizer

    def __call__(self, rows: Dataset) -> RowLosses:
        """1 or 0 for each of the rows, in their order; each counts as one."""
        ids = row_ids(rows)
        args = self.trainer.args
        own = ids[args.process_index :: args.world_size]
        found: dict[str, float] = {}
        for part in runtime.gather(self._wrong(own) if own else {}):
            found |= part
        return [(found[name], 1) for name in ids]

    def _wrong(self, ids: Sequence[str]) -> dict[str, float]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model).eval()
        prompts = [prompt_ids(self.rows[name], self.tokenizer) for name in ids]
        with self.trainer.compute_loss_context_manager():
            outputs = generated(
                model,
                self.tokenizer,
                prompts,
                self.trainer.args.max_completion_length,
                "answers",
                Resources(console=_QUIET),
            )
        checked = zip(ids, outputs, strict=True)
        return {
            name: 1.0 - check_answer(text, self.rows[name]["answer"], self.rows[name].get("answer_type") or "exact")
            for name, text in checked
        }


# Rows


def _with_tokens(data: Prepared) -> Iterator[tuple[Dataset, list[str]]]:
    """Training and held-out rows, each with the ids of those that have a token to learn from."""
    yield data.train_rows, row_ids(data.train)
    yield data.heldout_rows, row_ids(data.heldout)


def _by_id(rows: Dataset, kept: Sequence[str], column: str, objective: str) -> list[dict]:
    """The rows in the order of ``kept``; each must have ``column``."""
    needs = {
        "rejected": "a completion that is not wanted: columns prompt, chosen and rejected",
        "answer": "an answer to check: a column answer beside the question",
    }[column]
    found = dict(zip(row_ids(rows), rows, strict=True))
    missing = sum(row.get(column) is None for row in found.values())
    if missing:
        raise UserError(f"objective {objective} needs {needs}; {missing:,} of {len(found):,} rows have none")
    return [found[name] for name in kept]


def check_objective(method: MethodArguments, training: TrainingArguments) -> None:
    """Refuse, before a model is loaded, what an objective cannot be combined with.

    Raises:
        UserError: For the first mistake.
    """
    given = [n for n in _OF_OBJECTIVE if getattr(method, n) is not None]
    if method.objective == "sft":
        if given:
            raise UserError(f"{given[0]} goes with --objective {_OF_OBJECTIVE[given[0]]}, not with sft; drop it")
        return
    for name in given:
        if method.objective not in _OF_OBJECTIVE[name]:
            raise UserError(f"{name} goes with --objective {_OF_OBJECTIVE[name]}, not with {method.objective}; drop it")
    refusals: dict[str, Any] = {
        "method": method.method not in ("mask", "lora") and method.method,
        "mask_prefix_cache": method.mask_prefix_cache,
        "packing": training.packing,
        "padding_free": training.padding_free,
        "an FSDP accelerate_config": runtime.uses_fsdp(),
    }
    for name, value in refusals.items():
        if value:
            what = "goes with --method mask or lora" if name == "method" else f"does not go with {name}"
            raise UserError(f"objective {method.objective} {what}; drop one of the two")
    objective_options(method)


_OF_OBJECTIVE = {
    "beta": "dpo or grpo",
    "num_generations": "grpo",
    "max_completion_length": "grpo",
    "temperature": "grpo",
    "objective_options": "dpo or grpo",
}
