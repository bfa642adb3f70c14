"""Attention within the rows of a batch without padding is that of each row alone."""

import pytest
import torch
import transformers
from peft import get_peft_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import tiny
from maskft import MaskConfig
from maskft.training import row_attention
from maskft.training.row_attention import PREFIX, attention_within_rows

LENGTHS = [3, 7, 1, 5]
GEMMA2 = {"attn_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8}
MODELS = {
    **tiny.MODELS,
    # Windows that are shorter than a row, between windows and all of a row, and longer than the batch.
    "short windows": lambda: tiny.decoder(
        transformers.MistralConfig, transformers.MistralForCausalLM, sliding_window=3
    ),
    "windows": lambda: tiny.decoder(transformers.MistralConfig, transformers.MistralForCausalLM, sliding_window=6),
    "long windows": lambda: tiny.decoder(
        transformers.MistralConfig, transformers.MistralForCausalLM, sliding_window=99
    ),
    "soft caps": lambda: tiny.decoder(transformers.Gemma2Config, transformers.Gemma2ForCausalLM, **GEMMA2),
}

CASES = [(name, "eager") for name in MODELS] + [(name, "sdpa") for name in MODELS if name != "soft caps"]


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def joined(rows, names=("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")):
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": row} for row in rows])
    return {name: batch[name] for name in names if name in batch}


def results(model, batches):
    """Logits of all tokens, and gradients of the sum of their squares."""
    model.zero_grad()
    logits = torch.cat([model(**batch, use_cache=False).logits[0] for batch in batches])
    logits.pow(2).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize(
    "names", [("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q"), ("input_ids", "position_ids")]
)
@pytest.mark.parametrize(("model_name", "implementation"), CASES)
def test_rows_see_themselves_alone(model_name, implementation, names, rows):
    model = MODELS[model_name]()
    model.set_attn_implementation(implementation)
    alone = results(model, [{"input_ids": torch.tensor([row])} for row in rows])
    with attention_within_rows(model):
        assert model.config._attn_implementation == PREFIX + implementation
        together = results(model, [joined(rows, names)])
    assert model.config._attn_implementation == implementation
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_scores_of_pairs_of_different_rows_are_not_computed(implementation, rows, monkeypatch):
    model = tiny.tiny_llama()
    model.set_attn_implementation(implementation)
    shapes = []
    function = row_attention._function

    def watched(name, module):
        def attend(module, query, key, value, mask, **kwargs):
            shapes.append((query.shape[0], query.shape[2], key.shape[2]))
            return function(name, module)(module, query, key, value, mask, **kwargs)

        return attend

    monkeypatch.setattr(row_attention, "_function", watched)
    with attention_within_rows(model):
        model(**joined(rows), use_cache=False)
    assert set(shapes) == {(len(rows), max(LENGTHS), max(LENGTHS))}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_name", ["llama", "windows", "gpt2"])
def test_other_batches_are_computed_as_before(model_name, implementation, rows):
    """Batches with padding on either side, one row, and answers with a cache."""
    model = MODELS[model_name]()
    model.set_attn_implementation(implementation)
    ids = torch.tensor([rows[0] + [0] * 4, rows[1]])
    batches = [
        {"input_ids": ids, "attention_mask": (ids != 0).long()},
        {"input_ids": ids.flip(1), "attention_mask": (ids != 0).long().flip(1)},
        {"input_ids": torch.tensor([rows[1]])},
    ]

    def outputs():
        with torch.no_grad():
            logits = [model(**batch).logits for batch in batches]
            answers = [model.generate(**batch, max_new_tokens=4, do_sample=False) for batch in batches]
        return logits + answers

    before = outputs()
    with attention_within_rows(model):
        within = outputs()
    for one, other in zip(within, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_mask_trains_through_it(rows):
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(selection="logit", task_type="CAUSAL_LM"))
    alone = results(model, [{"input_ids": torch.tensor([row])} for row in rows])
    with attention_within_rows(model):
        together = results(model, [joined(rows)])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_saved_configuration_does_not_name_it(tmp_path):
    model = tiny.tiny_llama()
    with attention_within_rows(model):
        model.save_pretrained(tmp_path)
    assert PREFIX not in (tmp_path / "config.json").read_text()


def test_another_implementation_stays():
    model = tiny.tiny_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with attention_within_rows(model):
        assert model.config._attn_implementation == "flash_attention_2"
