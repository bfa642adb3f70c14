"""Batched greedy generation: a shared prefix once, every row stops by itself, and its place goes to the next prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicCache, DynamicLayer

from maskft.loss import length_sorted_batches, pad
from maskft_common.errors import UserError

from .row_cache import RowCache, attention

MAX_BATCH_SIZE = 64
MIN_SHARED_TOKENS = 16  # a shorter common beginning is not worth a pass of its own
_PROBE_TOKENS = 24
# Settings of a model's generation that this obeys, or that change no greedy answer; others are left to transformers.
_OBEYED = set(
    "repetition_penalty no_repeat_ngram_size eos_token_id pad_token_id bos_token_id do_sample temperature top_p top_k "
    "min_p typical_p max_length max_new_tokens use_cache cache_implementation output_attentions output_hidden_states "
    "output_scores output_logits return_dict_in_generate transformers_version _from_model_config".split()
)

OnAnswer = Callable[[int, str], None]


@dataclass(frozen=True)
class Bounds:
    """When an answer ends, and how many are generated together.

    Args:
        max_new_tokens: Upper bound on generated tokens, > 0.
        batch_size: Prompts at one time; None: as many as fit into half of the free memory, at most 64.
        stop_strings: Generation of an item ends at the first of these.
        option: The user's name of ``max_new_tokens``, for messages.
    """

    max_new_tokens: int = 256
    batch_size: int | None = 16
    stop_strings: Sequence[str] = ()
    option: str = "max_new_tokens"


@torch.inference_mode()
def greedy_generate(
    model, tokenizer, prompts: Sequence[Sequence[int]], bounds: Bounds, on_answer: OnAnswer | None = None
) -> list[str]:
    """Continue each prompt greedily until end of text, a stop string, or ``max_new_tokens``.

    What the prompts have in common at their beginning is computed once. Finished rows leave the batch, and the next
    prompts take their places. Models whose attention this does not know are given to ``model.generate``.

    Args:
        model: A causal language model; put into evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        bounds: When an answer ends, and how many are generated together.
        on_answer: Called with index and text of each prompt when it is done, in the order in which they are.

    Returns:
        The generated texts in the order of ``prompts``, without special tokens and without what follows a stop string.

    Raises:
        UserError: If a prompt and its answer may be longer than the model's context.
    """
    model.eval()
    job = _Job(model, tokenizer, prompts, bounds, on_answer)
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    max_new_tokens = bounds.max_new_tokens
    check_context(model, longest, max_new_tokens, bounds.option)
    is_known = model.generation_config.to_diff_dict().keys() <= _OBEYED and _attention_is_known(model)
    shared = shared_prefix_length(prompts) if is_known else 0
    size = min(len(prompts), bounds.batch_size or memory_bound_rows(model, longest - shared, max_new_tokens))
    if is_known:
        with attention(model):
            _generate_in_rows(job, RowCache(model, size, prompts[0][:shared]), size)
    else:
        _generate_in_batches(job, size)
    return job.out


def check_context(model, longest: int, max_new_tokens: int = 0, option: str = "max_new_tokens") -> None:
    """Refuse items of up to ``longest`` tokens that, with their answers, may not fit into the context."""
    if not longest:
        raise UserError("every prompt is empty, and a model answers something; give rows with prompts")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if 0 < context < longest + max_new_tokens:
        answer = f" and its answer may have {max_new_tokens}" if max_new_tokens else ""
        advice = f"lower {option} to {context - longest}, or " if longest < context else ""  # prompts are never cut
        advice = advice if max_new_tokens else "lower max_length, or "
        raise UserError(
            f"the longest item has {longest} tokens{answer}, the model's context {context}; {advice}leave out items "
            "that long"
        )


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with alike; every prompt keeps at least one of its own."""
    if len(prompts) < 2:
        return 0
    first = min(prompts)
    last = max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    return shared if shared >= MIN_SHARED_TOKENS else 0


def memory_bound_rows(model, num_tokens: int, max_new_tokens: int = 0) -> int:
    """Return how many rows fit into half of the free memory.

    Each has its keys and values, the activations of a layer and its logits: of its last token, or of all tokens in
    float32 and in float64 where no new ones are generated and the loss is wanted.
    """
    config = model.config.get_text_config()
    itemsize = torch.empty((), dtype=model.dtype).element_size()
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * config.num_hidden_layers * kv_heads * head_size * itemsize * (num_tokens + max_new_tokens)
    activations = num_tokens * 16 * config.hidden_size * itemsize
    logits = 3 * 4 * config.vocab_size * (1 if max_new_tokens else num_tokens + 1)
    row = 2 * cached + activations + logits  # twice: where the cache of a batch grows, it is copied
    return int(max(1, min(MAX_BATCH_SIZE, free_memory_bytes(model.device) / 2 // row)))


def free_memory_bytes(device: torch.device) -> int:
    """Memory free for new tensors on ``device``, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class _Job:
    """The prompts, what is known about ending them, and the answers so far."""

    def __init__(self, model, tokenizer, prompts: Sequence[Sequence[int]], bounds: Bounds, on_answer: OnAnswer | None):
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.bounds = bounds
        self.on_answer, self.out = on_answer, [""] * len(prompts)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        generation = model.generation_config
        ends = generation.eos_token_id
        self.eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # A stop string cannot span more tokens than it has bytes.
        self.stop_strings = list(bounds.stop_strings)
        self.lookback = max((len(stop.encode()) for stop in self.stop_strings), default=0)
        self.processors: list = []
        if generation.repetition_penalty not in (None, 1.0):
            self.processors.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
        if generation.no_repeat_ngram_size:
            self.processors.append(NoRepeatNGramLogitsProcessor(generation.no_repeat_ngram_size))

    def next_tokens(self, rows: list[list[int]], logits_BV: Tensor) -> list[int]:
        """The most likely token after each row."""
        for process in self.processors:
            logits_BV = logits_BV.float()  # as transformers' own; bfloat16 would round a penalty away
            for row, ids in enumerate(rows):
                logits_BV[row] = process(torch.tensor([ids], device=logits_BV.device), logits_BV[row][None])[0]
        return logits_BV.argmax(-1).tolist()

    def is_over(self, tokens: list[int]) -> bool:
        """Whether the answer ``tokens`` ends with its last token."""
        if tokens[-1] in self.eos_ids or len(tokens) >= self.bounds.max_new_tokens:
            return True
        if not self.stop_strings:
            return False
        tail = self.tokenizer.decode(tokens[-self.lookback :], skip_special_tokens=False)
        return any(stop in tail for stop in self.stop_strings)

    def finish(self, index: int, tokens: list[int]) -> None:
        """Keep the answer of one prompt."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self.stop_strings if stop in text]
        self.out[index] = text[: min(ends)] if ends else text
        if self.on_answer:
            self.on_answer(index, self.out[index])


def _generate_in_rows(job: _Job, cache: RowCache, size: int) -> None:
    waiting = deque(length_sorted_batches([len(ids) for ids in job.prompts], len(job.prompts))[0])
    rows: list[tuple[int, list[int]]] = []  # each prompt's index, and its tokens with those of the answer
    num_open = 0  # rows behind these are done
    while waiting or num_open:
        # Prompts are read, and take the places of rows that are done, an eighth of the batch at a time.
        first = 0
        if waiting and num_open < size - size // 8:
            first = num_open
            taken = [waiting.popleft() for _ in range(min(len(waiting), size - first))]
            rows[first:] = [(index, list(job.prompts[index])) for index in taken]
            num_open = len(rows)
            logits_BV = cache.add([ids for _, ids in rows[first:]], first)
        else:
            # With one that is done where that makes 8, 16, ...: products with a row less take longer.
            logits_BV = cache.step([ids for _, ids in rows[: num_open + (num_open % 8 == 7)]])
        tokens = job.next_tokens([ids for _, ids in rows[first:num_open]], logits_BV)
        for place in reversed(range(first, num_open)):
            index, ids = rows[place]
            ids.append(tokens[place - first])
            answer = ids[len(job.prompts[index]) :]
            if job.is_over(answer):
                job.finish(index, answer)
                num_open -= 1
                rows[place], rows[num_open] = rows[num_open], rows[place]
                cache.move(num_open, place)


def _attention_is_known(model) -> bool:
    """Try it: logits with a shared prefix, rows of two lengths and one step must be those of the plain forward pass."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    shorter = ids[:-4]
    try:
        if {type(layer) for layer in DynamicCache(config=model.config).layers} != {DynamicLayer}:
            return False  # a state that is no keys and values, or a window over them
        plain = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
        expected = plain[[len(ids) - 2, len(shorter) - 2, len(ids) - 1]]
        with attention(model):
            cache = RowCache(model, 2, ids[: _PROBE_TOKENS // 2])
            found = torch.cat([cache.add([ids[:-1], shorter[:-1]], 0), cache.step([ids])]).float()
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
        return False  # an architecture with another kind of cache, mask or attention: nothing to report
    return bool(((found - expected).abs().mean(1) <= 0.02 * expected.std()).all())


# In batches, by transformers


def _generate_in_batches(job: _Job, batch_size: int) -> None:
    for indices in length_sorted_batches([len(prompt) for prompt in job.prompts], batch_size):
        ids_BT, mask_BT = pad([job.prompts[i] for i in indices], job.pad_id, job.model.device, side="left")
        generated_BT = job.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=job.bounds.max_new_tokens,
            do_sample=False,
            **dict.fromkeys(("temperature", "top_p", "top_k")),
            pad_token_id=job.pad_id,
            eos_token_id=sorted(job.eos_ids),
            stop_strings=job.stop_strings or None,
            tokenizer=job.tokenizer if job.stop_strings else None,
        )[:, ids_BT.shape[1] :]
        for index, tokens in zip(indices, generated_BT.tolist(), strict=True):
            job.finish(index, tokens)
