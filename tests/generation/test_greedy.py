"""Generation against one forward pass per token, written out."""

import string

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

import tiny
from maskft_common.errors import UserError
from maskft_lab.evaluation.benchmarks import code_with_tests
from maskft_lab.generation import greedy as generation
from maskft_lab.generation import row_cache
from maskft_lab.generation.greedy import Bounds, greedy_generate, memory_bound_rows, shared_prefix_length
from maskft_lab.generation.row_cache import RowCache, _attention
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def model(make=tiny.tiny_llama, **overrides):
    out = make(vocab_size=len(TOKENIZER), **overrides)
    out.generation_config.eos_token_id = EOS
    for parameter in out.parameters():
        parameter.data *= 3  # so that the next token is not nearly the same for every prompt
    return out


def prompts(num_shared=40, lengths=(3, 9, 1, 20, 7, 5, 12, 30, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, len(TOKENIZER), (n,), generator=generator).tolist()

    shared = draw(num_shared)
    return [shared + draw(n) for n in lengths]


@torch.no_grad()
def reference(net, ids, max_new_tokens, stop_strings=()):
    """Token by token without cache, batch or padding."""
    answer = []
    while len(answer) < max_new_tokens:
        answer.append(int(net(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
        text = TOKENIZER.decode(answer, skip_special_tokens=False)
        if answer[-1] == EOS or any(stop in text for stop in stop_strings):
            break
    text = TOKENIZER.decode(answer, skip_special_tokens=True)
    for stop in stop_strings:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize("num_shared", [0, 40])
def test_same_text_as_without_batch_and_cache(batch_size, num_shared):
    net, questions = model(), prompts(num_shared)
    expected = [reference(net, ids, 30) for ids in questions]
    assert len(set(expected)) > 5
    done = []
    found = greedy_generate(net, TOKENIZER, questions, Bounds(30, batch_size), lambda *pair: done.append(pair))
    assert found == expected
    assert sorted(done) == sorted(enumerate(expected))
    assert net.config._attn_implementation == "sdpa", "the model's own attention is put back"


def test_stop_strings_end_each_row_by_itself():
    net, questions = model(), prompts()
    free = [reference(net, ids, 30) for ids in questions]
    stops = [free[0][4:6], free[1][9:10]]
    expected = [reference(net, ids, 30, stops) for ids in questions]
    assert expected[0] != free[0] and len({len(text) for text in expected}) > 2
    assert greedy_generate(net, TOKENIZER, questions, Bounds(30, 4, stop_strings=stops)) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_stop_string_that_begins_in_the_prompt_ends_no_answer(name):
    """A prompt that ends with a line break, an answer that begins with "#", and the stop string of both."""
    net, questions = tiny.MODELS[name](), prompts()
    questions = [[token % 90 + 3 for token in ids] for ids in questions]
    free = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4))
    across = [TOKENIZER.decode(ids[-1:]) + text[:1] for ids, text in zip(questions, free, strict=True)]
    within = free[0][3:6]
    found = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4, stop_strings=[*across, within]))
    for text, before in zip(found, free, strict=True):
        assert text == min((before.split(stop)[0] for stop in [*across, within]), key=len)
    assert found[0] and found[0] != free[0]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_answer_ends_at_an_end_token(name):
    """Those of a chat template: neither the model nor the tokenizer need know them, nor are they special tokens."""
    net, questions = tiny.MODELS[name](), [[token % 90 + 3 for token in ids] for ids in prompts()]
    free = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4))
    letter = free[0][5]
    [end] = TOKENIZER(letter)["input_ids"]
    expected = [text.split(letter)[0] for text in free]
    found = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4, end_tokens=[end]))
    assert found == expected and found[0] != free[0]
    # Nor is one that the model itself names.
    net.generation_config.eos_token_id = [EOS, end]
    assert greedy_generate(net, TOKENIZER, questions, Bounds(12, 4)) == expected


def llama2_tokenizer():
    """With Llama 2's normalizer and decoder, which drops the space with which a text begins."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:95].replace(" ", "")]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), *(("▁", letter) for letter in string.ascii_lowercase)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    of_spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(of_spaces)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def finished(tokenizer, prompt, answer, **bounds):
    """The text that is kept of an answer; and after how many tokens it is over."""
    job = generation._Job(tiny.tiny_llama(), tokenizer, [prompt], Bounds(99, **bounds), None)
    lengths = [length for length in range(1, len(answer) + 1) if job.is_over(0, answer[:length])]
    length = min(lengths, default=len(answer))
    job.finish(0, answer[:length])
    return job.out[0], length


def test_the_first_line_of_code_keeps_its_indentation():
    tokenizer = llama2_tokenizer()
    row = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}
    body = "    c = a + b\n    return c"
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["prompt"] + body)["input_ids"][len(prompt) :]
    assert tokenizer.decode(answer) == body[1:]
    text, _ = finished(tokenizer, prompt, answer)
    assert text == body
    exec(code_with_tests(row, text), {})
    # Special tokens between them are no text; nor is there a space at the beginning of a text.
    assert finished(tokenizer, [*prompt, tokenizer.bos_token_id], answer)[0] == body
    assert finished(tokenizer, [tokenizer.bos_token_id], answer)[0] == body[1:]
    assert finished(tokenizer, prompt, [*answer, tokenizer.eos_token_id])[0] == body

    # A stop string ends the answer at once, also where it begins with the dropped space.
    for stop in (" return", "    c", " c", "c ="):
        text, length = finished(tokenizer, prompt, answer, stop_strings=[stop])
        assert text == body[: body.find(stop)]
        assert tokenizer.decode([*prompt, *answer[:length]]).endswith(stop)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, llama2_tokenizer()])
def test_a_character_that_is_split_between_prompt_and_answer_changes_nothing(tokenizer):
    ids = tokenizer("a é b")["input_ids"]
    for place in range(1, len(ids)):
        text, _ = finished(tokenizer, ids[:place], ids[place:])
        alone = tokenizer.decode(ids[place:])
        assert text == alone or (tokenizer is not TOKENIZER and text == f" {alone}")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_answers_of_a_tokenizer_that_drops_spaces(name):
    tokenizer = llama2_tokenizer()
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }
    net = tiny.decoder(*classes[name], vocab_size=len(tokenizer), pad_token_id=2)
    with torch.no_grad():
        # Tokens that begin with a space are likely, and bytes are not.
        net.lm_head.weight[:259] = 0
        net.lm_head.weight[-28:] *= 3
    words = ["one two", "three", "four five six", "a b c d", "x y"]
    questions = [tokenizer(text)["input_ids"] for text in words]
    expected = []
    for ids in questions:
        row = net.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=2)[0].tolist()
        expected.append(tokenizer.decode(row)[len(tokenizer.decode(ids)) :])
    assert any(text.startswith(" ") for text in expected)
    assert greedy_generate(net, tokenizer, questions, Bounds(6, 2)) == expected
    stop = next(text[:2] for text in expected if text.startswith(" "))
    found = greedy_generate(net, tokenizer, questions, Bounds(6, 2, stop_strings=[stop]))
    assert found == [text.split(stop)[0] for text in expected]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_tokenizer_without_special_tokens(is_known, monkeypatch):
    """Rows of another length have padding, which no token is for."""
    monkeypatch.setattr(generation, "_attention_is_known", lambda model: is_known)
    bare = tiny_tokenizer()
    bare.pad_token = bare.eos_token = None
    net = model()
    net.generation_config.eos_token_id = None
    questions = prompts(lengths=(3, 9))
    alone = [greedy_generate(net, bare, [ids], Bounds(6, 1))[0] for ids in questions]
    assert greedy_generate(net, bare, questions, Bounds(6, 2)) == alone


def test_finished_rows_leave_and_others_take_their_places(monkeypatch):
    net, questions = model(), prompts() + prompts(seed=1)
    stop = reference(net, questions[0], 30)[8:10]
    read, sizes = [], []
    add, step = RowCache.add, RowCache.step
    monkeypatch.setattr(RowCache, "add", lambda c, rows, at: (read.append([*map(list, rows)]), add(c, rows, at))[1])
    monkeypatch.setattr(RowCache, "step", lambda cache, rows: (sizes.append(len(rows)), step(cache, rows))[1])
    monkeypatch.setattr(generation, "_attention_is_known", lambda model: True)
    greedy_generate(net, TOKENIZER, questions, Bounds(30, 8, stop_strings=[stop]))
    assert max(map(len, read)) == max(sizes) == 8 and len(read) > 2 and sizes[-1] < 8
    assert sorted(ids for rows in read for ids in rows) == sorted(questions), "no prompt twice"


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_architecture(name):
    net = tiny.MODELS[name]()
    ids = [[5, 6, 7, *range(10, 30), n, n + 1] for n in range(40, 45)]
    with torch.no_grad():
        ends = [EOS, net.generation_config.eos_token_id or EOS]
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends}
        expected = [net.generate(torch.tensor([row]), **how)[0, len(row) :] for row in ids]
    texts = greedy_generate(net, TOKENIZER, ids, Bounds(8, 2))
    assert texts == [TOKENIZER.decode(answer, skip_special_tokens=True) for answer in expected]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grouped_heads_are_repeated_but_on_a_cpu(device, monkeypatch):
    """A GPU's fused kernels take no mask with grouped heads; the plain way holds a (Q, T) matrix for each head."""
    real, calls = torch.nn.functional.scaled_dot_product_attention, []

    def record(query, key, value, **kwargs):
        calls.append((key.shape[1], value.shape[1], kwargs["enable_gqa"]))
        return real(query, key, value, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    query, key, mask = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.ones(2, 1, 3, 5, dtype=torch.bool)
    out = _attention(query.to(device), key.to(device), key.to(device), 0.5, mask.to(device))
    assert out.shape == (2, 3, 4, 8)
    assert calls == ([(2, 2, True)] if device == "cpu" else [(4, 4, False)])


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_frequencies_that_depend_on_the_length_are_left_to_transformers(rope_type, is_nested):
    """Within a shared prefix they would be those of a short text."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "original_max_position_embeddings": 32}
    net = model(rope_parameters=rope)
    # Shorter ones than the prefix, and longer ones. In one batch all would have the frequencies of the longest.
    for questions in (prompts(20, (3, 9, 1, 30, 30, 7)), prompts(40)):
        rows = [
            net.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :] for ids in questions
        ]
        expected = [TOKENIZER.decode(row, skip_special_tokens=True) for row in rows]
        assert greedy_generate(net, TOKENIZER, questions, Bounds(8, 4)) == expected
    if is_nested:
        net.config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert not generation._attention_is_known(net)


def test_sliding_windows_are_left_to_transformers():
    assert generation._attention_is_known(tiny.MODELS["llama"]())
    assert not generation._attention_is_known(tiny.MODELS["gemma3"]())


def test_rounding_under_autocast_is_no_other_attention():
    """As of half a billion parameters, whose answers under autocast were all left to transformers."""
    equal = []
    for num_layers, scale in [(8, 20), (8, 50), (16, 20), (16, 50)]:
        net = tiny.tiny_llama(num_layers=num_layers)
        with torch.no_grad():
            for weight in net.parameters():
                if weight.dim() == 2:
                    weight *= scale
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert generation._attention_is_known(net)
            assert torch.is_autocast_enabled("cpu")
            equal.append(generation._rows_are_as_plain(net))
    # Which of them miss the tolerance in bfloat16 differs between versions of torch.
    assert not all(equal)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not generation._attention_is_known(tiny.MODELS["gemma3"]())


@pytest.mark.parametrize("num_shared", [0, 20])
def test_cache_in_the_dtype_of_autocast_changes_no_logit(num_shared, monkeypatch):
    """Its products would cast float32 keys in every step."""
    net = model()
    rows = prompts(num_shared, (8, 3))

    def logits(dtype):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), row_cache.attention(net):
            cache = RowCache(net, 2, rows[0][:num_shared])
            out = [cache.add(rows, 0)]
            out += [cache.step([[*ids, *range(5, 5 + num_new)] for ids in rows]) for num_new in (1, 2, 3)]
        keys, values = cache._rows[0]
        assert keys.dtype == dtype and values.dtype == torch.bfloat16
        return torch.stack(out)

    in_bfloat16 = logits(torch.bfloat16)
    monkeypatch.setattr(row_cache, "kept_dtype", lambda dtype, device: dtype)
    assert torch.equal(in_bfloat16, logits(torch.float32))


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"suppress_tokens": [*range(3, 150)]}])
def test_settings_of_the_model_are_kept(settings):
    net, questions = model(), prompts(20, (3, 8))
    plain = greedy_generate(net, TOKENIZER, questions, Bounds(12))
    net.generation_config.update(**settings)
    rows = [net.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :] for ids in questions]
    expected = [TOKENIZER.decode(row, skip_special_tokens=True) for row in rows]
    assert greedy_generate(net, TOKENIZER, questions, Bounds(12)) == expected != plain
    net.generation_config.repetition_penalty = 1.001  # a bfloat16 of 2 is no smaller for it
    job = generation._Job(net, TOKENIZER, [], Bounds(), None)
    assert job.next_tokens([[5]], torch.tensor([[0.0] * 5 + [2.0, 2.0]], dtype=torch.bfloat16)) == [6]


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_answers_are_greedy_whatever_search_the_model_asks_for(name, settings):
    net, questions = tiny.MODELS[name](), [[token % 90 + 3 for token in ids] for ids in prompts(20, (3, 8, 8))]
    plain = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4))
    net.generation_config.update(**settings)
    assert greedy_generate(net, TOKENIZER, questions, Bounds(12, 4)) == plain


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stop_strings_of_the_model(name):
    net, questions = tiny.MODELS[name](), [[token % 90 + 3 for token in ids] for ids in prompts()]
    free = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4))
    stops = [free[0][3:5], free[1][5:6]]
    expected = greedy_generate(net, TOKENIZER, questions, Bounds(12, 4, stop_strings=stops))
    assert expected != free
    for of_model, of_task in ((stops, []), (stops[0], stops[1:])):
        net.generation_config.stop_strings = of_model
        assert greedy_generate(net, TOKENIZER, questions, Bounds(12, 4, stop_strings=of_task)) == expected


def test_a_least_length_does_not_count_padding():
    net, questions = model(), prompts(20, (3, 30, 3, 12))
    # A token of the first answer ends it, but for the least length.
    end = int(net.generate(torch.tensor(questions[:1]), max_new_tokens=3, do_sample=False)[0, -1])
    net.generation_config.update(eos_token_id=[EOS, end], min_length=30)
    alone = [greedy_generate(net, TOKENIZER, [ids], Bounds(12))[0] for ids in questions]
    assert greedy_generate(net, TOKENIZER, questions, Bounds(12, 4)) == alone
    net.generation_config.min_length = 0
    assert greedy_generate(net, TOKENIZER, questions, Bounds(12, 4)) != alone


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_what_does_not_fit_into_the_context_is_refused(make):
    net = make()
    context = net.config.max_position_embeddings
    prompt = [5] * (context - 4)
    assert len(greedy_generate(net, TOKENIZER, [prompt], Bounds(4))) == 1
    said = f"has {context - 4} tokens and its answer may have 5, the .* context {context}: lower alpaca to 4, or leave"
    with pytest.raises(UserError, match=said):
        greedy_generate(net, TOKENIZER, [[5], prompt], Bounds(5, option="alpaca"))


def test_shared_prefix_length():
    beginning = list(range(20))
    assert shared_prefix_length([[*beginning, 1], [*beginning, 2, 3]]) == 20
    assert shared_prefix_length([beginning, [*beginning, 2]]) == 19, "every prompt keeps a token of its own"
    assert shared_prefix_length([beginning]) == 0 and shared_prefix_length([[1, 2], [1, 3]]) == 0


def test_rows_by_memory(monkeypatch):
    net = tiny.tiny_llama()
    assert generation.free_memory_bytes(torch.device("cpu")) > 1e6

    def rows(free, *lengths, **logits):
        monkeypatch.setattr(generation, "free_memory_bytes", lambda device: free)
        return memory_bound_rows(net, *lengths, **logits)

    assert 1 <= rows(2e6, 100, 50) < rows(8e6, 100, 50) < 64
    assert rows(8e6, 150) < rows(8e6, 149, 1), "the loss needs the logits of all tokens"
    assert rows(2e7, 150, bytes_per_logit=4) > rows(2e7, 150) > rows(2e7, 150, bytes_per_logit=20)
    assert rows(8e6, 100, 50, cache_dtype=torch.bfloat16) > rows(8e6, 100, 50)
    assert rows(2, 100, 50) == 1 and rows(2e12, 1, 1) == 64
    net.config = transformers.MambaConfig()  # has no heads
    assert 1 <= rows(2e9, 100, 50) < rows(2e12, 1, 1)
