"""Batched greedy generation: a shared prefix once, every row stops by itself, and its slot goes to the next prompt."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from maskft.loss import length_sorted_batches, pad
from maskft_base.errors import UserError

from .row_cache import ATTENTION, RowCache, UnsupportedAttention

MAX_BATCH_SIZE = 64
MIN_SHARED_TOKENS = 16  # a shorter common beginning is not worth a pass of its own
_SPARE_TOKENS = 64
_PROBE_TOKENS = 24

OnAnswer = Callable[[int, str], None]


@dataclass(frozen=True)
class Bounds:
    """When an answer ends, and how many are generated together.

    Args:
        max_new_tokens: Upper bound on generated tokens, > 0.
        batch_size: Prompts at one time; None: as many as ``max_memory_bytes`` allows, at most 64.
        max_memory_bytes: Bound on the memory of a batch, in bytes, without the model; default: half of what is free.
        stop_strings: Generation of an item ends at the first of these.
    """

    max_new_tokens: int = 256
    batch_size: int | None = 16
    max_memory_bytes: float | None = None
    stop_strings: Sequence[str] = ()


@torch.inference_mode()
def greedy_generate(
    model, tokenizer, prompts: Sequence[Sequence[int]], bounds: Bounds, on_answer: OnAnswer | None = None
) -> list[str]:
    """Continue each prompt greedily until end of text, a stop string, or ``max_new_tokens``.

    What the prompts have in common at their beginning is computed once. Finished rows leave the batch, and the next
    prompts take their slots. Models whose attention this does not know are given to ``model.generate``.

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
    longest, max_new_tokens = max(len(prompt) for prompt in prompts), bounds.max_new_tokens
    check_context(model, longest, max_new_tokens)
    is_known = _attention_is_known(model)
    shared = shared_prefix_length(prompts) if is_known else 0
    size = bounds.batch_size or memory_bound_rows(model, longest - shared, max_new_tokens, bounds.max_memory_bytes)
    if is_known:
        with _attention(model):
            _generate_in_slots(job, shared, size)
    else:
        _generate_in_batches(job, size)
    return job.out


def context_length(model) -> int:
    """The model's context in tokens; 0: it has no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0


def check_context(model, longest: int, max_new_tokens: int) -> None:
    """Refuse a prompt of ``longest`` tokens whose answer may not fit into the context."""
    context = context_length(model)
    if 0 < context < longest + max_new_tokens:
        raise UserError(
            f"the longest prompt has {longest} tokens and its answer may have {max_new_tokens}, the model's context "
            f"{context}; lower the bound on new tokens, or leave out prompts that long"
        )


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with alike; every prompt keeps at least one of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    return shared if shared >= MIN_SHARED_TOKENS else 0


def memory_bound_rows(
    model, num_tokens: int, max_new_tokens: int, max_memory_bytes: float | None = None, extra_row_bytes: float = 0
) -> int:
    """Return how many rows fit, each with its keys and values, its logits, and the activations of a layer."""
    config = model.config.get_text_config()
    itemsize = torch.empty((), dtype=model.dtype).element_size()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * config.num_hidden_layers * kv_heads * head_size * itemsize * (num_tokens + max_new_tokens)
    activations = num_tokens * 16 * config.hidden_size * itemsize
    # Twice: when rows come and go a new cache is built while the old one still exists.
    row = 2 * cached + activations + 3 * 4 * config.vocab_size + extra_row_bytes
    limit = free_memory_bytes(model.device) / 2 if max_memory_bytes is None else max_memory_bytes
    return int(max(1, min(MAX_BATCH_SIZE, limit // row)))


def free_memory_bytes(device: torch.device) -> int:
    """Memory free for new tensors on ``device``, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@dataclass
class _Job:
    """The prompts, what is known about ending them, and the answers so far."""

    model: object
    tokenizer: object
    prompts: Sequence[Sequence[int]]
    bounds: Bounds
    on_answer: OnAnswer | None
    out: list[str] = field(init=False)

    def __post_init__(self):
        self.out = [""] * len(self.prompts)
        tokenizer, generation = self.tokenizer, self.model.generation_config
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.eos_ids = {tokenizer.eos_token_id, *_as_list(generation.eos_token_id)} - {None}
        # A stop string cannot span more tokens than it has bytes.
        self.stop_strings = list(self.bounds.stop_strings)
        self.lookback = max((len(stop.encode()) for stop in self.stop_strings), default=0)
        self.processors = []
        if generation.repetition_penalty not in (None, 1.0):
            self.processors.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
        if generation.no_repeat_ngram_size:
            self.processors.append(NoRepeatNGramLogitsProcessor(generation.no_repeat_ngram_size))

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


# In slots: a row that is done makes room for the next prompt


@dataclass
class _Rows:
    """Prompts being answered; row r of the cache belongs to ``indices[r]`` and begins at token ``starts[r]``."""

    cache: RowCache
    indices: list[int]
    starts: Tensor  # (B,), int64
    answers: list[list[int]]
    is_done: list[bool]


def _generate_in_slots(job: _Job, shared: int, batch_size: int) -> None:
    waiting = [i for batch in length_sorted_batches([len(p) for p in job.prompts], batch_size) for i in batch]
    prefix = None
    if shared:
        prefix, _ = _prefill(job.model, [list(job.prompts[0][:shared])], job.pad_id, None)
    rows: _Rows | None = None
    while waiting or rows:
        rows = _fill_slots(job, rows, waiting, prefix, shared, batch_size)
        # Slots are filled, and the batch shrinks, an eighth of it at a time: each time the cache is copied once.
        while rows and rows.is_done.count(True) <= len(rows.is_done) // 8 and rows.cache.length < rows.cache.capacity:
            if all(rows.is_done):
                break
            _step(job, rows, prefix, shared)
        if rows and all(rows.is_done) and not waiting:
            rows = None


def _fill_slots(
    job: _Job, rows: _Rows | None, waiting: list[int], prefix, shared: int, batch_size: int
) -> _Rows | None:
    """Drop the rows that are done, and give their slots to prompts from ``waiting``."""
    device = job.model.device
    kept = [r for r, done in enumerate(rows.is_done) if not done] if rows else []
    taken = [waiting.pop(0) for _ in range(min(len(waiting), batch_size - len(kept)))]
    newcomers = None
    if taken:
        own = [list(job.prompts[i][shared:]) for i in taken]
        cache, logits_BV = _prefill(job.model, own, job.pad_id, prefix)
        starts = torch.tensor([cache.length - len(ids) for ids in own], device=device)
        newcomers = _Rows(cache, taken, starts, [[] for _ in taken], [False] * len(taken))
        _append(job, newcomers, logits_BV)
    if not kept:
        if newcomers is None:
            return None
        kept_rows, cache = torch.arange(len(taken), device=device), newcomers.cache
        newcomers.cache = cache.rebuilt(kept_rows, None, cache.length, _SPARE_TOKENS)
        return newcomers
    kept_rows = torch.tensor(kept, device=device)
    lengths = rows.cache.length - rows.starts[kept_rows]
    if newcomers:
        lengths = torch.cat([lengths, newcomers.cache.length - newcomers.starts])
    width = int(lengths.max())
    new = newcomers or _Rows(None, [], None, [], [])
    return _Rows(
        rows.cache.rebuilt(kept_rows, new.cache, width, _SPARE_TOKENS),
        [rows.indices[r] for r in kept] + new.indices,
        width - lengths,
        [rows.answers[r] for r in kept] + new.answers,
        [False] * len(kept) + new.is_done,
    )


def _step(job: _Job, rows: _Rows, prefix: RowCache | None, shared: int) -> None:
    """Add one token to every row."""
    device, length = job.model.device, rows.cache.length
    ids_B1 = torch.tensor([[answer[-1]] for answer in rows.answers], device=device)
    mask_BT = torch.arange(length + 1, device=device) >= rows.starts[:, None]
    positions_B1 = (shared + length - rows.starts)[:, None]
    _append(job, rows, _logits(job.model, ids_B1, mask_BT[:, None, None], positions_B1, rows.cache, prefix))


def _append(job: _Job, rows: _Rows, logits_BV: Tensor) -> None:
    if job.processors:
        for r, index in enumerate(rows.indices):
            ids = torch.tensor([[*job.prompts[index], *rows.answers[r]]], device=logits_BV.device)
            for process in job.processors:
                logits_BV[r] = process(ids, logits_BV[r][None].float())[0]
    for r, token in enumerate(logits_BV.argmax(-1).tolist()):
        if rows.is_done[r]:
            continue
        rows.answers[r].append(token)
        if job.is_over(rows.answers[r]):
            rows.is_done[r] = True
            job.finish(rows.indices[r], rows.answers[r])


def _prefill(model, rows: list[list[int]], pad_id: int, prefix: RowCache | None) -> tuple[RowCache, Tensor]:
    """Run prompts (without the prefix) through the model; returns their cache and the logits after each, (B, V)."""
    ids_BT, mask_BT = pad(rows, pad_id, model.device, side="left")
    width = ids_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=model.device).tril()
    # Padding attends to itself: with nothing to attend to it would turn NaN, and NaN times zero is NaN.
    itself_TT = torch.eye(width, dtype=torch.bool, device=model.device)
    mask_BTT = (causal_TT & mask_BT.bool()[:, None]) | itself_TT
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0) + (prefix.length if prefix else 0)
    cache = RowCache(model.config.get_text_config().num_hidden_layers)
    return cache, _logits(model, ids_BT, mask_BTT[:, None], positions_BT, cache, prefix)


def _logits(model, ids_BQ, mask_B1QT, positions_BQ, cache: RowCache, prefix: RowCache | None) -> Tensor:
    """Logits after the last token, (B, V)."""
    return model(
        input_ids=ids_BQ,
        attention_mask=mask_B1QT,
        position_ids=positions_BQ,
        use_cache=True,
        logits_to_keep=1,
        shared_prefix=prefix,
        **{_cache_name(model): cache},
    ).logits[:, -1]


def _cache_name(model) -> str:
    """The name of the cache argument, which transformers changed."""
    return "cache" if "cache" in inspect.signature(_unwrapped(model).forward).parameters else "past_key_values"


def _unwrapped(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _attention(model) -> Iterator[None]:
    """Use our attention function inside."""
    base = _unwrapped(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _attention_is_known(model) -> bool:
    """Try it: logits with a shared prefix, rows of two lengths and one step must be those of the plain forward pass."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    shared, end = _PROBE_TOKENS // 2, _PROBE_TOKENS - 1
    try:
        plain = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
        expected = torch.stack([plain[0, end - 1], plain[0, end]]).float()
        with _attention(model):
            prefix, _ = _prefill(model, [ids[:shared]], 0, None)
            cache, first = _prefill(model, [ids[shared:end], ids[shared : end - 4]], 0, prefix)
            cache = cache.rebuilt(torch.tensor([0], device=model.device), None, end - shared, 1)
            mask = torch.ones(1, 1, 1, end - shared + 1, dtype=torch.bool, device=model.device)
            last, where = torch.tensor([[ids[end]]], device=model.device), torch.tensor([[end]], device=model.device)
            second = _logits(model, last, mask, where, cache, prefix)
    except (UnsupportedAttention, TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
        return False  # an architecture with another kind of cache, mask or attention: nothing to report
    found = torch.stack([first[0], second[0]]).float()
    return bool((found - expected).abs().mean() <= 0.02 * expected.std())


# In batches, by transformers


def _generate_in_batches(job: _Job, batch_size: int) -> None:
    for indices in length_sorted_batches([len(prompt) for prompt in job.prompts], batch_size):
        ids_BT, mask_BT = pad([job.prompts[i] for i in indices], job.pad_id, job.model.device, side="left")
        generated_BT = job.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=job.bounds.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=job.pad_id,
            eos_token_id=sorted(job.eos_ids),
            stop_strings=job.stop_strings or None,
            tokenizer=job.tokenizer if job.stop_strings else None,
        )[:, ids_BT.shape[1] :]
        for index, tokens in zip(indices, generated_BT.tolist(), strict=True):
            job.finish(index, tokens)


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]
