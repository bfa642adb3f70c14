"""TRL's trainers with ``peft_config=MaskConfig(...)``: training, resuming, merging, and the reference model of each."""

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import utils

import tiny
from maskft import MaskConfig, current_masks, set_mask_progress
from tiny_tokenizer import tiny_tokenizer

PAIRS = [(a, b) for a in range(4) for b in range(4)]
PROMPTS = [f"{a}+{b}=" for a, b in PAIRS]
ROWS = {
    "sft": [{"prompt": p, "completion": f"{a + b}"} for p, (a, b) in zip(PROMPTS, PAIRS, strict=True)],
    "dpo": [{"prompt": p, "chosen": f"{a + b}", "rejected": "9"} for p, (a, b) in zip(PROMPTS, PAIRS, strict=True)],
    "kto": [
        {"prompt": p, "completion": f"{a + b}", "label": b % 2 == 0} for p, (a, b) in zip(PROMPTS, PAIRS, strict=True)
    ],
    "grpo": [{"prompt": p} for p in PROMPTS],
    "gkd": [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"{a + b}"}]}
        for p, (a, b) in zip(PROMPTS, PAIRS, strict=True)
    ],
}
ROWS |= {"rloo": ROWS["grpo"], "distillation": ROWS["grpo"]}
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
OPTIONS = {
    "grpo": SAMPLED,
    "rloo": SAMPLED,
    "distillation": {"max_completion_length": 4},
    "gkd": {"max_new_tokens": 4, "max_length": 64},
}
CLASSES = {
    "sft": (trl.SFTConfig, trl.SFTTrainer),
    "dpo": (trl.DPOConfig, trl.DPOTrainer),
    "kto": (trl.KTOConfig, trl.KTOTrainer),
    "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
    "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    "distillation": (trl.DistillationConfig, trl.DistillationTrainer),
    "gkd": (GKDConfig, GKDTrainer),
}
WITH_REFERENCE = ["dpo", "kto", "grpo", "rloo"]


def slow_but(kinds, *fast):
    """The trainers that are used most are tested by ``make test``, the others by ``make test-slow``."""
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


# Earlier Trainers do not load an adapter that has another beside it.
RESUMES_TWO_ADAPTERS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def mask(**changes):
    settings = {"sparsity": 0.2, "layers_to_transform": [1], "task_type": "CAUSAL_LM", "save_scores": True}
    return MaskConfig(**{**settings, **changes})


def reward(completions, **kwargs):
    return [float(sum(map(ord, text)) % 3) for text in completions]


def trainer_of(kind, model, folder, **changes):
    config_class, trainer_class = CLASSES[kind]
    parts = {key: changes.pop(key) for key in ("peft_config", "ref_model") if key in changes}
    settings = {
        "learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4,
        "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False,
        "dataloader_pin_memory": False, **OPTIONS.get(kind, {}),
    }  # fmt: skip
    if kind in ("grpo", "rloo"):
        parts["reward_funcs"] = reward
    if kind in ("distillation", "gkd"):
        parts["teacher_model"] = teacher(model)
    return trainer_class(
        model=model,
        args=config_class(str(folder), **{**settings, **changes}),
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=tiny_tokenizer(),
        **parts,
    )


def teacher(student):
    return tiny.tiny_llama(vocab_size=student.config.vocab_size, seed=1)


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


def scores(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("mask_scores.default")}


@pytest.mark.parametrize("kind", slow_but(CLASSES, "sft", "dpo", "grpo"))
def test_a_trainer_learns_resumes_and_merges(kind, base, tmp_path):
    """Killed after step 2 and resumed, the scores are bit for bit those of four steps; merged, so are the logits.

    A teacher has no mask, and the weights that it had before.
    """
    trainer = trainer_of(kind, load(base), tmp_path / "out", peft_config=mask())
    model = trainer.model
    start = scores(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(start) and len(start) == 7
    trainer.train()
    trained = scores(model)
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    if kind in ("distillation", "gkd"):
        before, after = teacher(model).state_dict(), trainer.teacher_model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    again = trainer_of(kind, load(base), tmp_path / "out", peft_config=mask())
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed = scores(again.model)
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)

    trainer.save_model(str(tmp_path / "adapter"))
    masked = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.equal(masked(input_ids=ids).logits, expected)
        assert torch.equal(masked.merge_and_unload()(input_ids=ids).logits, expected)
        assert not torch.equal(load(base).eval()(input_ids=ids).logits, expected)


@pytest.mark.slow
def test_a_reward_model_learns_resumes_and_merges(base, tmp_path):
    """Its head is new, and is trained and saved beside the mask."""

    def classifier():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)

    def trainer_of_rewards():
        settings = {"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
        args = trl.RewardConfig(
            str(tmp_path / "out"), **settings, bf16=False, use_cpu=True, report_to="none", dataloader_pin_memory=False
        )
        return trl.RewardTrainer(
            model=classifier(),
            args=args,
            train_dataset=Dataset.from_list(ROWS["dpo"]),
            processing_class=tiny_tokenizer(),
            peft_config=mask(task_type="SEQ_CLS"),
        )

    def learned(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    trainer = trainer_of_rewards()
    start = learned(trainer.model)
    assert sum("score.modules_to_save" in name for name in start) == 1 and len(start) == 8
    trainer.train()
    trained = learned(trainer.model)
    assert all(not torch.equal(trained[name], start[name]) for name in start)

    again = trainer_of_rewards()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed = learned(again.model)
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)

    trainer.save_model(str(tmp_path / "adapter"))
    masked = PeftModel.from_pretrained(classifier(), tmp_path / "adapter").eval()
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(masked(input_ids=ids).logits, expected)
        assert torch.equal(masked.merge_and_unload()(input_ids=ids).logits, expected)


def logged(trainer):
    """What the first step logs of policy against reference; nothing is learned."""
    trainer.train()
    names = ("loss", "kl", "reward", "rewards/chosen", "rewards/rejected", "logps/chosen")
    row = trainer.state.log_history[0]
    return {name: row[name] for name in names if name in row}


@pytest.mark.parametrize("kind", slow_but(WITH_REFERENCE, "dpo", "grpo"))
def test_the_reference_of_a_new_mask_is_the_base(kind, base, tmp_path):
    """As the same trainer says that is given the merged model to train and the base as its reference."""
    still = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"}
    masked = logged(trainer_of(kind, load(base), tmp_path / "mask", peft_config=mask(), **still))
    get_peft_model(load(base), mask()).merge_and_unload().save_pretrained(tmp_path / "merged")
    plain = load(tmp_path / "merged")
    if kind in ("dpo", "kto"):
        expected = logged(trainer_of(kind, plain, tmp_path / "plain", ref_model=load(base), **still))
    else:
        trainer = trainer_of(kind, plain, tmp_path / "plain", **still)
        trainer.ref_model = load(base).eval()
        if hasattr(utils, "add_fused_lm_head"):  # since TRL 1.16
            utils.add_fused_lm_head(trainer.ref_model)
        expected = logged(trainer)
    assert masked == pytest.approx(expected, abs=1e-6)
    moved = {"dpo": "rewards/chosen", "kto": "rewards/chosen", "grpo": "kl", "rloo": "kl"}[kind]
    assert abs(masked[moved]) > 1e-4


def trained_mask(base):
    model = get_peft_model(load(base), mask(sparsity=0.3))
    for name in scores(model):
        model.get_parameter(name).data = model.get_parameter(name).data.flip(0)  # another than the seed draws
    return model


@pytest.mark.parametrize("kind", ["dpo", "grpo"])  # the others make theirs as one of these does
def test_the_reference_of_a_trained_mask_is_that_mask(kind, base, tmp_path):
    """TRL copies parameters whose name has ``.default.`` in it, as scores have not: the mask copies itself."""
    model = trained_mask(base)
    start = current_masks(model)
    trainer = trainer_of(kind, model, tmp_path / "out")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen" if kind == "dpo" else "kl"] == pytest.approx(0, abs=1e-6)
    reference, learned = current_masks(model, "ref"), current_masks(model)
    assert all(torch.equal(reference[name], start[name]) for name in start)
    assert any(not torch.equal(learned[name], start[name]) for name in start)
    assert all("default" in name for name, p in model.named_parameters() if p.requires_grad)

    again = trainer_of(kind, trained_mask(base), tmp_path / "out")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed, reference = current_masks(again.model), current_masks(again.model, "ref")
    assert RESUMES_TWO_ADAPTERS == all(torch.equal(resumed[name], learned[name]) for name in learned)
    assert all(torch.equal(reference[name], start[name]) for name in start)


def test_a_reference_keeps_the_size_its_mask_had(base, tmp_path):
    """A ramp moves the mask that is trained, and not the copy that it is compared with."""
    model = get_peft_model(load(base), mask(sparsity=0.3, sparsity_ramp=1.0))
    set_mask_progress(model, 0.5)
    start = current_masks(model)
    trainer_of("dpo", model, tmp_path / "out")
    set_mask_progress(model, 1.0)
    reference, learned = current_masks(model, "ref"), current_masks(model)
    assert all(torch.equal(reference[name], start[name]) for name in start)
    assert sum(int((~m).sum()) for m in learned.values()) > sum(int((~m).sum()) for m in start.values())
