"""The model that lm-eval asks: its own for transformers, generating with `greedy_generate`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from maskft_common.errors import UserError
from maskft_common.progress_bar import Progress

from .greedy import Bounds, greedy_generate, memory_bound_rows

# What greedy generation has to know, or does not depend on.
_GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "num_beams"}


class BatchedLM(HFLM):
    """lm-eval's model for transformers with our greedy generation; log-likelihoods and anything else are lm-eval's own.

    Args:
        model: A loaded causal language model.
        tokenizer: Its tokenizer.
        batch_size: Requests at one time; None: what half of the free memory allows.
        bf16: Compute in bfloat16, also where lm-eval opens an autocast of its own.
    """

    def __init__(self, model, tokenizer, batch_size: int | None = None, bf16: bool = False):
        dtype = torch.bfloat16 if bf16 else None
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size or "auto", mixed_precision_dtype=dtype)
        self.rows = batch_size

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answer the requests, those of one setting together."""
        out: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for indices in groups.values():
            group = [requests[i] for i in indices]
            settings = normalize_gen_kwargs(group[0].args[1], self.max_gen_toks)
            is_greedy = not settings["do_sample"] and settings.get("num_beams", 1) == 1
            answers = (
                self._generate_greedily(group, settings)
                if is_greedy and settings.keys() <= _GREEDY_SETTINGS
                else super().generate_until(group, disable_tqdm)
            )
            for index, answer in zip(indices, answers, strict=True):
                out[index] = answer
        return out

    def _generate_greedily(self, requests, settings: dict) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        max_new_tokens = settings["max_gen_toks"]
        task_name = requests[0].task_name
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"task {task_name} generates up to {max_new_tokens} tokens, the model's context is {self.max_length}, "
                "which leaves no room for a prompt"
            )
        prompts = [self._prompt_ids(request.args[0])[-room:] for request in requests]
        stops = [stop for stop in (*settings["until"], eos) if stop]
        with Progress() as progress:
            bar = progress.add_task(task_name or "answers", total=len(prompts))

            def on_answer(index: int, text: str) -> None:
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.advance(bar)

            bounds = Bounds(max_new_tokens, self.rows, stops)
            return greedy_generate(self.model, self.tokenizer, prompts, bounds, on_answer)

    def _prompt_ids(self, text: str) -> list[int]:
        return self.tok_batch_encode([text])[0][0].tolist()

    def num_truncated(self, arguments: Iterable[tuple[str, dict]]) -> int:
        """How many of these requests for generation have a prompt that is cut on its left, for room for the answer."""
        count = 0
        for text, settings in arguments:
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            count += len(self._prompt_ids(text)) > room
        return count

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        """Rows for log-likelihoods by a bound on memory; lm-eval tries until the machine has none left."""
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation))
        return min(memory_bound_rows(self.model, length), self.max_batch_size)
