"""What PEFT's and transformers' own tests found: checkpoints of plain trainers, heads, views, regular expressions."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from maskft import MaskConfig, UserError, adapter_layers, current_masks
from tiny import tiny_llama, token_ids

CAUSAL = {"task_type": "CAUSAL_LM"}


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def head_model():
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, num_labels=3, **SIZES))


def model_of(task):
    if task == "SEQ_CLS":
        return head_model()
    torch.manual_seed(0)
    if task == "TOKEN_CLS":
        return BertForTokenClassification(BertConfig(vocab_size=50, num_labels=3, **SIZES))
    if task == "QUESTION_ANS":
        return BertForQuestionAnswering(BertConfig(vocab_size=50, **SIZES))
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, **t5))


def scores_of(model):
    return {name: layer.mask_scores["default"].detach().clone() for name, layer in adapter_layers(model).items()}


def keys_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return list(tensors.keys())


@pytest.mark.parametrize("options", [{}, {"init_scores": "magnitude"}])
def test_a_plain_trainer_resumes_exactly(tmp_path, options):
    ids = token_ids().tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids * 4])

    def train(folder, resume, **settings):
        model = get_peft_model(tiny_llama(num_layers=2), MaskConfig(**CAUSAL, **options))
        args = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2,
            report_to="none", use_cpu=True, disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder / "final"))
        return model

    straight = train(tmp_path / "straight", None)
    resumed = train(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-2"))
    for name, scores in scores_of(straight).items():
        assert torch.equal(scores, scores_of(resumed)[name]), name
    assert any(key.endswith("mask_scores") for key in keys_of(tmp_path / "straight" / "checkpoint-4"))
    assert not any(key.endswith("mask_scores") for key in keys_of(tmp_path / "straight" / "final"))


def test_layers_beside_a_regular_expression_are_refused():
    with pytest.raises(UserError, match="layers_to_transform has no effect beside a regular expression"):
        MaskConfig(target_modules=r".*q_proj", layers_to_transform=[1])
    assert MaskConfig(target_modules="all-linear", layers_to_transform=[1]).layers_to_transform == [1]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 0, 4)])
def test_a_masked_output_can_be_changed_in_place(shape):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    model = get_peft_model(copy.deepcopy(plain), MaskConfig(target_modules=["0"], sparsity=0.2))
    x = torch.randn(shape)
    y = model(x)
    y.sum().backward()
    layer = next(iter(adapter_layers(model).values()))
    assert layer.mask_scores["default"].grad.shape == (5, 4)
    plain[0].weight.data.masked_fill_(~current_masks(model)["0"], 0)
    assert torch.equal(y, plain(x)) and y.shape == (*shape[:-1], 2)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"])
def test_models_of_other_tasks_train_load_and_merge(task, tmp_path):
    """New heads are trained beside the mask; encoder-decoders are masked in both stacks and generate."""
    model, ids = get_peft_model(model_of(task), MaskConfig(task_type=task, sparsity=0.2)), token_ids() % 50
    labels = {"SEQ_CLS": {"labels": ids[:, 0] % 3}, "TOKEN_CLS": {"labels": ids % 3}, "SEQ_2_SEQ_LM": {"labels": ids}}
    batch = {"input_ids": ids, **labels.get(task, {"start_positions": ids[:, 0] % 9, "end_positions": ids[:, 1] % 9})}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, masks = [parameter.detach().clone() for parameter in trained], current_masks(model)
    model.train()(**batch).loss.backward()
    torch.optim.AdamW(trained, lr=0.1).step()
    assert not any(map(torch.equal, before, trained))
    assert any(not torch.equal(masks[name], mask) for name, mask in current_masks(model).items())
    assert {name.split(".")[0] for name in masks} >= ({"encoder", "decoder"} if task == "SEQ_2_SEQ_LM" else set())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of(task), tmp_path).eval()
    with torch.no_grad():
        expected = model(**batch)
        assert torch.equal(loaded(**batch)[1], expected[1])
        if task == "SEQ_2_SEQ_LM":
            told = loaded.generate(input_ids=ids, max_new_tokens=4)
            assert torch.equal(told, model.generate(input_ids=ids, max_new_tokens=4))
        assert torch.equal(loaded.merge_and_unload()(**batch)[1], expected[1])
    with pytest.raises(UserError, match="leave out safe_serialization=False"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    model.save_pretrained(tmp_path / "pickled")  # nothing is left of the other


def test_a_base_is_used_again(tmp_path):
    base, ids = tiny_llama(num_layers=2), torch.arange(8)[None]
    model = get_peft_model(base, MaskConfig(sparsity=0.3))
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(ids).logits, expected)
    assert not any(len(layer.mask_scores) for layer in adapter_layers(model).values())
    for options in ({"modules_to_save": ["nope"]}, {"target_modules": ["q_proj", "nope"]}):
        with pytest.raises(UserError, match="entry 'nope' matches no layer"):
            get_peft_model(tiny_llama(num_layers=2), MaskConfig(**options))


def test_new_tokens_of_a_tied_model_get_one_clear_line():
    with pytest.raises(UserError, match="before the mask"):
        get_peft_model(tiny_llama(num_layers=2), MaskConfig(trainable_token_indices=[1]))
    with pytest.raises(UserError, match="leave it out"):
        get_peft_model(tiny_llama(num_layers=2, tie_word_embeddings=True), MaskConfig(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("excluded", [None, ["intermediate.dense"], r".*intermediate\.dense"])
def test_by_default_only_layers_of_the_stack_are_masked(excluded):
    """The pooler shares the name "dense" with them; without a loss on it, its scores would stay as they were drawn."""
    torch.manual_seed(0)
    model = get_peft_model(BertModel(BertConfig(vocab_size=50, **SIZES)), MaskConfig(exclude_modules=excluded))
    names = list(current_masks(model))
    assert names and all(".layer." in name for name in names)
    assert any("intermediate" in name for name in names) == (excluded is None)
    model(input_ids=token_ids() % 50).last_hidden_state.sum().backward()
    assert all(layer.mask_scores["default"].grad is not None for layer in adapter_layers(model).values())
