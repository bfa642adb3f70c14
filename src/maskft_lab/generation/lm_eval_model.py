"""lm-eval's model class for transformers, with `greedy_generate` for greedy generation."""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from maskft.data.tokenizing import end_of_turn, template_arguments
from maskft_common.errors import UserError
from maskft_common.progress_bar import Progress

from .greedy import Bounds, greedy_generate, memory_bound_rows

# Settings of a request that `greedy_generate` follows, or that do not change a greedy answer.
_GREEDY_SETTINGS = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_p",
    "num_beams",
}


class BatchedLM(HFLM):
    """lm-eval's model for transformers with our greedy generation; everything else is lm-eval's own code.

    Args:
        model: A loaded causal language model.
        tokenizer: Its tokenizer.
        batch_size: Requests at one time; None: as many as half of the free memory allows.
        bf16: Compute in bfloat16, also where lm-eval opens an autocast itself.
    """

    def __init__(
        self,
        model,
        tokenizer,
        batch_size: int | None = None,
        bf16: bool = False,
    ):
        # lm-eval would tie the weights once more, by the configuration: a head that was trained apart from the
        # embedding and saved beside it would be lost, and one in an adapter is an error.
        with mock.patch.object(model, "tie_weights", lambda: None):
            super().__init__(
                model,
                tokenizer=tokenizer,
                batch_size=batch_size or "auto",
                mixed_precision_dtype=torch.bfloat16 if bf16 else None,
                # As in training: results of two days would have other prompts, which are not compared.
                chat_template_args=template_arguments(tokenizer),
            )
        self.rows = batch_size
        self._chats: set[str] = set()

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """lm-eval's own; the prompt is remembered, because its answer ends where the template ends a turn."""
        prompt = super().apply_chat_template(chat_history, add_generation_prompt)
        self._chats.add(prompt)
        return prompt

    def generate_until(
        self,
        requests,
        disable_tqdm: bool = False,
    ) -> list[str]:
        """Answer the requests; those with the same settings are answered together."""
        # By their text: settings are dictionaries with lists, which cannot be keys.
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            _, settings = request.args
            group_of_settings = groups.setdefault(repr(settings), [])
            group_of_settings.append(index)

        out: list[str] = [""] * len(requests)
        for indices in groups.values():
            group = [requests[index] for index in indices]
            _, settings = group[0].args
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            # A setting that is not known, such as a repetition penalty of the task, is left to lm-eval.
            is_known = settings.keys() <= _GREEDY_SETTINGS
            num_beams = settings.get("num_beams", 1)
            is_greedy = not settings["do_sample"] and num_beams == 1
            if is_greedy and is_known:
                answers = self._generate_greedily(group, settings)
            else:
                # lm-eval sorts the requests by length, and returns the answers in the order given.
                answers = super().generate_until(group, disable_tqdm)
            for index, answer in zip(indices, answers, strict=True):
                out[index] = answer
        return out

    def _generate_greedily(
        self,
        requests,
        settings: dict,
    ) -> list[str]:
        """Answer requests that have the same ``settings``, which are as `normalize_gen_kwargs` returns them.

        Raises:
            UserError: If the answers may fill the whole context.
        """
        max_new_tokens = settings["max_gen_toks"]
        task_name = requests[0].task_name
        # ``ids[-n:]`` below would be the whole prompt for n = 0.
        max_prompt_tokens = self.max_length - max_new_tokens
        if max_prompt_tokens < 1:
            raise UserError(
                f"task {task_name} generates up to {max_new_tokens} tokens, the model's context is {self.max_length}, "
                "which leaves no room for a prompt"
            )

        # Truncated on the left, as in lm-eval: the question is at the end of a few-shot prompt.
        prompts = []
        for request in requests:
            text, _ = request.args
            ids = self._prompt_ids(text)
            prompts.append(ids[-max_prompt_tokens:])

        # lm-eval ends an answer at the text of the end token too. An empty stop string would end every answer at once.
        candidates = list(settings["until"])
        if self.eot_token_id is not None:
            candidates.append(self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        stop_strings = [stop for stop in candidates if stop]
        bounds = Bounds(
            max_new_tokens,
            self.rows,
            stop_strings,
            self._end_tokens(requests),
        )
        with Progress() as progress:
            bar = progress.add_task(task_name or "answers", total=len(prompts))

            def on_answer(index: int, text: str) -> None:
                # lm-eval's own cache of answers, which its generate_until fills in the same way.
                self.cache_hook.add_partial(
                    "generate_until",
                    requests[index].args,
                    text,
                )
                progress.advance(bar)

            return greedy_generate(
                self.model,
                self.tokenizer,
                prompts,
                bounds,
                on_answer,
            )

    def _end_tokens(self, requests) -> list[int]:
        """Tokens that end an answer, beside the tokenizer's and the model's own: a base model's may be another one."""
        text, _ = requests[0].args
        # A task puts all of its prompts into the chat template, or none.
        if text not in self._chats:
            return []
        # Any question: the end of a turn depends on the template alone.
        token_id = end_of_turn([{"role": "user", "content": "What is 6 times 7?"}], self.tokenizer)
        return [] if token_id is None else [token_id]

    def _prompt_ids(self, text: str) -> list[int]:
        # lm-eval's own encoding, so that special tokens are added exactly where it adds them.
        ids_1T, _ = self.tok_batch_encode([text])
        return ids_1T[0].tolist()

    def num_truncated(self, arguments: Iterable[tuple[str, dict]]) -> int:
        """How many of these requests have a prompt that is truncated on the left to leave room for the answer.

        Args:
            arguments: Prompt and settings of each request for generation.
        """
        count = 0
        for text, settings in arguments:
            normalized = normalize_gen_kwargs(settings, self.max_gen_toks)
            max_prompt_tokens = self.max_length - normalized["max_gen_toks"]
            if len(self._prompt_ids(text)) > max_prompt_tokens:
                count += 1
        return count

    def _detect_batch_size(
        self,
        requests=None,
        pos: int = 0,
    ) -> int:
        """Rows for log-likelihoods, by a bound on memory; lm-eval itself tries until memory runs out."""
        # Without a request to look at, the longest that the model can read. lm-eval calls this with its requests sorted
        # by length, so that the one at ``pos`` is the longest of those that follow.
        num_tokens = self.max_length
        if requests:
            _, context_ids, continuation_ids = requests[pos]
            row_length = len(context_ids) + len(continuation_ids)
            num_tokens = min(num_tokens, row_length)
        num_rows = memory_bound_rows(self.model, num_tokens)
        return min(num_rows, self.max_batch_size)
