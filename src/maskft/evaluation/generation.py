"""Batched greedy generation with left padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .batching import length_sorted_batches, pad


@torch.inference_mode()
def greedy_generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    stop_strings: list[str] | None = None,
    progress=None,
) -> list[str]:
    """Continue each prompt greedily until end of text, a stop string, or ``max_new_tokens``.

    Args:
        model: A causal language model; put into evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Upper bound on generated tokens, > 0.
        batch_size: Prompts per batch; batches hold prompts of similar length.
        stop_strings: Generation of an item ends after the first of these.
        progress: Called with the number of prompts done after each batch.

    Returns:
        The generated texts in the order of ``prompts``, without special tokens and without what follows a stop string.
    """
    model.eval()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    eos = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    out = [""] * len(prompts)
    for indices in length_sorted_batches([len(prompt) for prompt in prompts], batch_size):
        ids_BT, mask_BT = pad([prompts[i] for i in indices], pad_id, model.device, side="left")
        generated_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
            eos_token_id=sorted(eos),
            stop_strings=stop_strings,
            tokenizer=tokenizer if stop_strings else None,
        )[:, ids_BT.shape[1] :]
        for index, text in zip(indices, tokenizer.batch_decode(generated_BT, skip_special_tokens=True), strict=True):
            out[index] = _cut(text, stop_strings)
        if progress:
            progress(len(indices))
    return out


def _cut(text: str, stop_strings: list[str] | None) -> str:
    ends = [text.find(stop) for stop in stop_strings or [] if stop in text]
    return text[: min(ends)] if ends else text


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]
