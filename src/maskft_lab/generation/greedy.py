"""Batched greedy generation: a shared prefix is computed once, and finished rows make room for the next prompts.

Shapes: B rows, T tokens, V vocabulary, N logits that are compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

from maskft.loss import length_sorted_batches, pad
from maskft_common.errors import UserError

from .row_cache import RowCache, attention, kept_dtype

MAX_BATCH_SIZE = 64
MIN_SHARED_TOKENS = 16  # a shorter prefix is not worth a separate forward pass
PROBE_TOKENS = 24
# Of the end of a prompt, with which the beginning of its answer is decoded.
CONTEXT_TOKENS = 16

# Settings in a model's generation_config that this code follows, or that change no greedy answer. A model with any
# other setting is left to transformers.
SUPPORTED_SETTINGS = {
    # followed
    "repetition_penalty",
    "no_repeat_ngram_size",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    # of sampling
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    # replaced by Bounds
    "max_length",
    "max_new_tokens",
    # of beam search
    "num_beams",
    "early_stopping",
    "length_penalty",
    # of other ways to the same answer
    "prompt_lookup_num_tokens",
    # without influence on the answer
    "bos_token_id",
    "use_cache",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "transformers_version",
}

# Kinds of rotary position embeddings whose frequencies, and so all keys, depend on the longest position of a forward
# pass.
_ROPE_BY_LENGTH = ("dynamic", "longrope")

# Errors of models with another kind of cache, mask or attention, wherever in their code it matters.
_OTHER_ARCHITECTURE = (
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    KeyError,
    IndexError,
)

OnAnswer = Callable[[int, str], None]


@dataclass(frozen=True)
class Bounds:
    """When an answer ends, and how many are generated together.

    Args:
        max_new_tokens: Upper bound on generated tokens, > 0.
        batch_size: Prompts at one time; None: as many as fit into half of the free memory, at most 64.
        stop_strings: Generation of an item ends at the first of these.
        end_tokens: Generation of an item also ends at these tokens, beside the tokenizer's and the model's own.
        option: The user's name of ``max_new_tokens``, for messages.
    """

    max_new_tokens: int = 256
    batch_size: int | None = 16
    stop_strings: Sequence[str] = ()
    end_tokens: Sequence[int] = ()
    option: str = "max_new_tokens"


@torch.inference_mode()
def greedy_generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    bounds: Bounds,
    on_answer: OnAnswer | None = None,
) -> list[str]:
    """Continue each prompt greedily until end of text, a stop string, or ``max_new_tokens``.

    The prefix that all prompts share is computed once. Finished rows leave the batch, and the next prompts take their
    places. Models whose attention is not supported are given to ``model.generate``.

    Args:
        model: A causal language model; put into evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        bounds: When an answer ends, and how many are generated together.
        on_answer: Called with index and text of each prompt when it is done, in the order in which they are.

    Returns:
        The generated texts in the order of ``prompts``, without special tokens, cut before the first stop string.

    Raises:
        UserError: If a prompt is empty, or it and its answer may be longer than the model's context.
    """
    model.eval()
    if not prompts:
        return []

    check_not_empty(prompts)
    longest = max(len(prompt) for prompt in prompts)
    max_new_tokens = bounds.max_new_tokens
    check_context(model, longest, max_new_tokens, bounds.option)

    # Settings first: they are compared in no time, while the attention is tried with forward passes.
    is_known = _settings_are_known(model) and _attention_is_known(model)
    num_shared = shared_prefix_length(prompts) if is_known else 0

    batch_size = bounds.batch_size
    if not batch_size:
        cache_dtype = kept_dtype(model.dtype, model.device) if is_known else None
        batch_size = memory_bound_rows(
            model,
            # The prefix is kept once for all rows, so a row pays only for the tokens after it.
            longest - num_shared,
            max_new_tokens,
            cache_dtype=cache_dtype,
        )
    batch_size = min(batch_size, len(prompts))

    job = _Job(model, tokenizer, prompts, bounds, on_answer)
    if is_known:
        prefix = prompts[0][:num_shared]
        with attention(model):
            cache = RowCache(model, batch_size, prefix)
            _generate_in_rows(job, cache, batch_size)
    else:
        _generate_in_batches(job, batch_size)
    return job.out


def check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    """Raise for prompts without a token: a model predicts the next token after at least one."""
    num_empty = sum(not prompt for prompt in prompts)
    if num_empty:
        # Padding would take the prompt's place, and the answer would be to that.
        raise UserError(
            f"{num_empty} of {len(prompts)} prompts are empty, and this tokenizer begins no text with a token of its "
            "own: there is nothing to answer; leave these rows out"
        )


def check_context(
    model,
    longest: int,
    max_new_tokens: int = 0,
    option: str = "max_new_tokens",
) -> None:
    """Raise if items of up to ``longest`` tokens, with their answers, may be longer than the model's context.

    Args:
        model: A causal language model.
        longest: Tokens of the longest item.
        max_new_tokens: Upper bound on generated tokens; 0: a loss is measured, nothing is generated.
        option: The user's name of ``max_new_tokens``, for messages.
    """
    if not longest:
        raise UserError("all prompts are empty")

    config = model.config.get_text_config()
    # Models without position embeddings, such as Mamba, have no limit. Some configs have the name, and None or -1.
    context = getattr(config, "max_position_embeddings", None) or 0
    is_limited = context > 0
    if not is_limited or longest + max_new_tokens <= context:
        return

    if max_new_tokens:
        answer = f" and its answer may have {max_new_tokens}"
        # Prompts are never cut: if one fills the context, a shorter answer does not help.
        advice = f"lower {option} to {context - longest}, or " if longest < context else ""
    else:
        answer = ""
        advice = "lower max_length, or "
    raise UserError(
        f"the longest item has {longest} tokens{answer}, the model's context {context}: {advice}leave out items "
        "that long"
    )


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the prefix that all prompts share; at least one token of each prompt is not part of it."""
    # One prompt shares nothing, and reading it twice, as prefix and rest, saves nothing.
    if len(prompts) < 2:
        return 0

    # The first and the last in lexicographic order differ at least as early as any other two.
    first = min(prompts)
    last = max(prompts)
    shortest = min(len(prompt) for prompt in prompts)
    # The logits after a row come from its own last token, so that one cannot be in the prefix.
    limit = shortest - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return length if length >= MIN_SHARED_TOKENS else 0


def memory_bound_rows(
    model,
    num_tokens: int,
    max_new_tokens: int = 0,
    bytes_per_logit: int = 12,
    cache_dtype: torch.dtype | None = None,
) -> int:
    """Return how many rows fit into half of the free memory, 1 to `MAX_BATCH_SIZE`.

    A row needs its keys and values, the activations of one layer, and logits: those of its last token in generation;
    for a loss (``max_new_tokens`` is 0) those of all tokens.

    Args:
        model: A causal language model.
        num_tokens: Tokens of the longest row.
        max_new_tokens: Upper bound on generated tokens.
        bytes_per_logit: Logits of a batch and all their copies; by default in float32, with one in float64.
        cache_dtype: Of keys and values; None: the model's.
    """
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    num_heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    head_size = getattr(config, "head_dim", None)
    if not head_size:
        head_size = config.hidden_size // num_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads

    # Keys and values of all layers.
    key_size = config.num_hidden_layers * num_kv_heads * head_size
    # 2: keys and values.
    cache_bytes_per_token = 2 * key_size * (cache_dtype or model.dtype).itemsize
    max_tokens = num_tokens + max_new_tokens
    cache_bytes = cache_bytes_per_token * max_tokens
    # A cache that grows is copied, one layer after another.
    copied_bytes = cache_bytes / config.num_hidden_layers

    # About 16 tensors of the hidden size in one layer: those of attention, and of an MLP four times as wide.
    activation_bytes = 16 * config.hidden_size * itemsize * num_tokens

    num_positions = 1 if max_new_tokens else num_tokens + 1
    num_logits = num_positions * config.vocab_size
    logit_bytes = bytes_per_logit * num_logits

    row_bytes = cache_bytes + copied_bytes + activation_bytes + logit_bytes
    # Half, because this is an estimate, and other processes may take memory meanwhile.
    usable_bytes = free_memory_bytes(model.device) / 2
    num_rows = int(usable_bytes // row_bytes)
    return max(1, min(MAX_BATCH_SIZE, num_rows))


def free_memory_bytes(device: torch.device) -> int:
    """Memory free for new tensors on ``device``, in bytes."""
    if device.type == "cuda":
        # Of the device, not of this process. Memory that torch has cached and does not use counts as taken, so that the
        # estimate errs on the safe side.
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes
    return psutil.virtual_memory().available


class _Job:
    """The prompts, the conditions that end an answer, and the answers so far."""

    def __init__(
        self,
        model,
        tokenizer,
        prompts: Sequence[Sequence[int]],
        bounds: Bounds,
        on_answer: OnAnswer | None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.bounds = bounds
        self.on_answer = on_answer
        self.out = [""] * len(prompts)

        # Many base models have no padding token. Any token will do, because padding is masked; the end of text is also
        # dropped when answers are decoded.
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id
        if self.pad_id is None:
            self.pad_id = 0

        config = model.generation_config
        eos_ids = config.eos_token_id  # a number, a list, or None
        if not isinstance(eos_ids, list):
            eos_ids = [eos_ids]
        # A chat model may end its turn with another token than the tokenizer's end of text.
        self.eos_ids = {tokenizer.eos_token_id, *eos_ids, *bounds.end_tokens}
        self.eos_ids.discard(None)

        # Whether an answer has reached a stop string is checked at every token. Decoding all of the answer each time
        # would be quadratic: the last tokens are enough, because a stop string has at most as many tokens as bytes.
        of_model = config.stop_strings or []  # a text, a list, or None
        if isinstance(of_model, str):
            of_model = [of_model]
        # An empty one would end every answer at once.
        self.stop_strings = [stop for stop in [*bounds.stop_strings, *of_model] if stop]
        self.lookback = 0
        for stop in self.stop_strings:
            num_bytes = len(stop.encode())
            self.lookback = max(self.lookback, num_bytes)

        # Tokens that decoding drops.
        added = tokenizer.added_tokens_decoder
        self.special_ids = {token_id for token_id, token in added.items() if token.special}

        # In the order in which transformers applies them: a penalty changes logits that the ban on n-grams then
        # removes.
        self.processors: list = []
        if config.repetition_penalty not in (None, 1.0):
            self.processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.no_repeat_ngram_size:
            self.processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))

    def next_tokens(
        self,
        rows: list[list[int]],
        logits_BV: Tensor,
    ) -> list[int]:
        """The most likely token after each row."""
        for process in self.processors:
            # In float32, as in transformers: bfloat16 would round a penalty away.
            logits_BV = logits_BV.float()
            # Row by row, because a processor takes a matrix of ids, and rows differ in length.
            for row, ids in enumerate(rows):
                ids_1T = torch.tensor([ids], device=logits_BV.device)
                logits_1V = logits_BV[row : row + 1]
                logits_BV[row] = process(ids_1T, logits_1V)[0]
        tokens_B = logits_BV.argmax(-1)
        return tokens_B.tolist()

    def is_over(
        self,
        index: int,
        tokens: list[int],
    ) -> bool:
        """Whether the answer ``tokens`` to one prompt ends with its last token."""
        # The conditions that cost nothing first: decoding is slow.
        if tokens[-1] in self.eos_ids:
            return True
        if len(tokens) >= self.bounds.max_new_tokens:
            return True
        return self.has_stop_string(index, tokens)

    def has_stop_string(
        self,
        index: int,
        tokens: list[int],
    ) -> bool:
        """Whether the last tokens of an answer to one prompt hold a stop string."""
        if not self.stop_strings:
            return False
        # With special tokens: lm-eval has the text of one, such as <|im_end|>, among its stop strings.
        if len(tokens) > self.lookback:
            # One token more, because a decoder may drop the space with which its first token begins.
            last_tokens = tokens[-self.lookback - 1 :]
            tail = self.tokenizer.decode(last_tokens, skip_special_tokens=False)
        else:
            tail = self.text_of(index, tokens, skip_special_tokens=False)
        return any(stop in tail for stop in self.stop_strings)

    def text_of(
        self,
        index: int,
        tokens: list[int],
        skip_special_tokens: bool,
    ) -> str:
        """The text of an answer as it follows its prompt.

        Decoders of SentencePiece's vocabularies, such as Llama 2's, drop the space with which a text begins: of code,
        the first line would lose a part of its indentation.

        Args:
            index: Of the prompt.
            tokens: Of the answer.
            skip_special_tokens: Whether special tokens have no text.
        """
        # All of it at once: tokens decoded one by one would lose spaces and characters of several tokens.
        alone = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        # Without special tokens: the first text after <s> has no space before it.
        end_of_prompt = self.prompts[index][-CONTEXT_TOKENS:]
        context = [token for token in end_of_prompt if token not in self.special_ids]
        if not tokens or not context:
            return alone

        before = self.tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
        both = self.tokenizer.decode([*context, *tokens], skip_special_tokens=skip_special_tokens)
        # Only spaces are put back. The text may differ in more where a character is split between prompt and answer.
        num_dropped = len(both) - len(before) - len(alone)
        if num_dropped <= 0:
            return alone
        restored = " " * num_dropped + alone
        return restored if both == before + restored else alone

    def finish(
        self,
        index: int,
        tokens: list[int],
    ) -> None:
        """Decode the answer of one prompt, cut it before the first stop string, and keep it."""
        # Not all of these need be special tokens, which decoding drops: Gemma's <end_of_turn> was none.
        ends = [place for place, token in enumerate(tokens) if token in self.eos_ids]
        tokens = tokens[: min(ends, default=None)]
        text = self.text_of(index, tokens, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self.stop_strings]
        found = [end for end in ends if end >= 0]
        if found:
            text = text[: min(found)]

        self.out[index] = text
        if self.on_answer:
            self.on_answer(index, text)


class _StopStrings(StoppingCriteria):
    """Ends rows of ``model.generate`` at a stop string in their answers.

    transformers' own criterion looks at the prompt too: a stop string of a line break and "#" would end an answer that
    begins with "#" after a prompt that ends with a line break.

    Args:
        job: Knows the stop strings.
        indices: Of the prompts in the batch.
        prompt_length: Tokens of each prompt with its padding.
    """

    def __init__(
        self,
        job: _Job,
        indices: Sequence[int],
        prompt_length: int,
    ):
        self.job = job
        self.indices = indices
        self.prompt_length = prompt_length

    def __call__(
        self,
        input_ids: Tensor,
        scores,
        **kwargs,
    ) -> Tensor:
        answers_BT = input_ids[:, self.prompt_length :]
        # No more than are looked at. One more than a stop string has shows that they are not the whole answer.
        last_tokens_BT = answers_BT[:, -self.job.lookback - 1 :]
        pairs = zip(self.indices, last_tokens_BT.tolist(), strict=True)
        is_over = [self.job.has_stop_string(index, tokens) for index, tokens in pairs]
        return torch.tensor(is_over, device=input_ids.device)


class _Row(NamedTuple):
    """A prompt that is being answered."""

    index: int  # of the prompt
    ids: list[int]  # its tokens, then those of the answer


def _generate_in_rows(
    job: _Job,
    cache: RowCache,
    batch_size: int,
) -> None:
    """Answer the prompts with a shared prefix, row by row.

    ``rows`` are in the order of their places in the cache: first the open ones, which are still being answered, then
    those that are done and whose places are free.
    """
    lengths = [len(prompt) for prompt in job.prompts]
    # One batch of all prompts: their indices, the longest prompt first.
    (order,) = length_sorted_batches(lengths, len(lengths))
    # The longest first: later prompts fit into the room of earlier ones, and too little memory shows at once.
    waiting = deque(order)
    refill_below = batch_size - batch_size // 8

    rows: list[_Row] = []
    num_open = 0
    while waiting or num_open:
        # New prompts take the free places once an eighth of the batch is free: reading one at a time is slow.
        if waiting and num_open < refill_below:
            first = num_open
            # Rows that are done are only dropped here. Until then they may fill up a step, see below.
            del rows[first:]
            while waiting and len(rows) < batch_size:
                index = waiting.popleft()
                ids = list(job.prompts[index])
                rows.append(_Row(index, ids))
            num_open = len(rows)
            new_ids = [row.ids for row in rows[first:]]
            logits_BV = cache.add(new_ids, first)
        else:
            first = 0
            num_computed = num_open
            # With 7, 15, ... open rows, one that is done is computed too: products of 8, 16, ... rows are faster.
            if num_open % 8 == 7:
                num_computed += 1
            computed_ids = [row.ids for row in rows[:num_computed]]
            logits_BV = cache.step(computed_ids)

        # After `add` the new rows only: the open ones before them have no new logits.
        open_ids = [row.ids for row in rows[first:num_open]]
        tokens = job.next_tokens(open_ids, logits_BV)
        # From the last to the first, so that a row which is done can change places with the last open one.
        for place in reversed(range(first, num_open)):
            row = rows[place]
            token = tokens[place - first]
            row.ids.append(token)
            prompt_length = lengths[row.index]
            answer = row.ids[prompt_length:]
            if job.is_over(row.index, answer):
                job.finish(row.index, answer)
                # The last open row takes this place: in ``rows`` they change places, in the cache it is copied over.
                num_open -= 1
                rows[place] = rows[num_open]
                rows[num_open] = row
                cache.move(num_open, place)


def _settings_are_known(model) -> bool:
    """Whether all settings in the model's generation_config are followed here or change no greedy answer."""
    changed = model.generation_config.to_diff_dict()
    # Names with an underscore are notes of transformers, such as _from_model_config, not settings.
    settings = {name for name in changed if not name.startswith("_")}
    return settings <= SUPPORTED_SETTINGS


def _attention_is_known(model) -> bool:
    """Whether `RowCache` computes this model's attention; it is tried, because a list of architectures ages."""
    # The few tokens that are tried would not show it: frequencies change at a length of thousands.
    if _rope_depends_on_length(model):
        return False
    if model.dtype != torch.float32:
        return _rows_are_as_plain(model)
    # Without autocast: rounding in bfloat16 can exceed the tolerance, and a larger one would admit wrong positions.
    with torch.autocast(model.device.type, enabled=False):
        return _rows_are_as_plain(model)


def _rope_depends_on_length(model) -> bool:
    """Whether the keys of a token depend on how many tokens are read together with it."""
    config = model.config.get_text_config()
    # transformers before version 5 has the older name.
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Of a model with several kinds of layers: those of each kind by its name.
    parts = [part for part in parameters.values() if isinstance(part, dict)]
    types = [part.get("rope_type", part.get("type")) for part in [parameters, *parts]]
    return any(rope_type in _ROPE_BY_LENGTH for rope_type in types)


def _rows_are_as_plain(model) -> bool:
    """Whether logits with a shared prefix, rows of two lengths and one step are those of the plain forward pass."""
    # Random tokens: no real text would do for every vocabulary. Their generator leaves torch's own untouched.
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=generator)
    ids = ids_T.tolist()
    shorter = ids[:-4]
    try:
        # The kind of cache that transformers would use for each layer.
        usual_cache = DynamicCache(config=model.config)
        layer_types = {type(layer) for layer in usual_cache.layers}
        if layer_types != {DynamicLayer}:
            return False  # a recurrent state, or a window over keys and values

        ids_1T = torch.tensor([ids], device=model.device)
        plain = model(input_ids=ids_1T, use_cache=False)
        plain_TV = plain.logits[0].float()
        # After the two prompts that are added below, and after the step.
        # Logits at position t come from the tokens up to t, so those after n tokens are at n - 1.
        places = [
            len(ids) - 2,
            len(shorter) - 2,
            len(ids) - 1,
        ]
        expected_NV = plain_TV[places]

        with attention(model):
            # A prefix shorter than both prompts, so that all three forward passes of the cache are tried.
            prefix = ids[: PROBE_TOKENS // 2]
            prompts = [ids[:-1], shorter[:-1]]
            cache = RowCache(model, len(prompts), prefix)
            added_BV = cache.add(prompts, 0)
            stepped_BV = cache.step([ids])
            found_NV = torch.cat([added_BV, stepped_BV]).float()
    except _OTHER_ARCHITECTURE:
        # transformers generates then, and the user need not know.
        return False

    # Two kernels round differently. A wrong mask or position moves the logits by far more than this tolerance.
    errors_N = (found_NV - expected_NV).abs().mean(1)
    # Relative to the spread of the logits, whose scale differs between models.
    tolerance = 0.02 * expected_NV.std()
    return bool((errors_N <= tolerance).all())


def _batches(job: _Job, batch_size: int) -> list[list[int]]:
    """Indices of prompts that are answered together by ``model.generate``, the longest first."""
    lengths = [len(prompt) for prompt in job.prompts]
    has_min_length = bool(job.model.generation_config.min_length)
    if not has_min_length and not _rope_depends_on_length(job.model):
        return length_sorted_batches(lengths, batch_size)

    # transformers takes the padded length for that of each prompt: no batch has padding.
    (order,) = length_sorted_batches(lengths, len(lengths))
    out: list[list[int]] = []
    for index in order:
        is_new = not out or len(out[-1]) == batch_size or lengths[out[-1][0]] != lengths[index]
        if is_new:
            out.append([])
        out[-1].append(index)
    return out


def _generate_in_batches(job: _Job, batch_size: int) -> None:
    """Answer the prompts by ``model.generate``."""
    for indices in _batches(job, batch_size):
        prompts = [job.prompts[index] for index in indices]
        ids_BT, mask_BT = pad(
            prompts,
            job.pad_id,
            job.model.device,
            side="left",  # the answer follows the prompt's last token
        )
        prompt_length = ids_BT.shape[1]
        criteria = StoppingCriteriaList()
        if job.stop_strings:
            criteria.append(_StopStrings(job, indices, prompt_length))
        generated_BT = job.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=job.bounds.max_new_tokens,
            do_sample=False,
            # transformers would warn that a greedy run does not use the model's sampling settings.
            temperature=None,
            top_p=None,
            top_k=None,
            # A model's own settings may ask for another kind of search, or another kind of result.
            num_beams=1,
            num_return_sequences=1,
            prompt_lookup_num_tokens=None,
            return_dict_in_generate=False,
            pad_token_id=job.pad_id,
            eos_token_id=sorted(job.eos_ids),
            stop_strings=None,  # the job's have a criterion of their own
            stopping_criteria=criteria,
        )
        # A row that ended before the others has padding behind its answer; it is a special token, decoding drops it.
        answers_BT = generated_BT[:, prompt_length:]
        answers = answers_BT.tolist()
        for index, tokens in zip(indices, answers, strict=True):
            job.finish(index, tokens)
