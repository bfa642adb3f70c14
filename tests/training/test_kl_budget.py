"""A budget of KL(base || model): the multiplier, runs that end at it, resuming, and input that cannot be one."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForCausalLM

import tiny
from maskft import MaskConfig
from maskft.loss import mean_nll
from maskft.training.kl import Base, KLOnTask, KLOnText, KLSum, kl_per_row
from maskft.training.kl_budget import AIM, KLBudget, excess
from maskft.training.near_base import KLReport, NearBase
from maskft.training.record import read_record
from maskft.training.trainer import MaskTrainer
from maskft.training.verdict import read_heldout
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS, TRAINING

LORA = json.dumps({"peft_type": "LORA", "r": 4, "target_modules": "all-linear"})
# Rates, with budgets that the tiny model reaches without a term.
METHODS = {
    "full": {"method": "full", "learning_rate": 0.003},
    "mask": {"method": "mask", "learning_rate": 0.3, "mask_init_scores": "magnitude", "keep_worse": True},
    "lora": {"method": "peft", "peft_config": LORA, "learning_rate": 0.02},
}


# The multiplier


def test_the_first_steps_by_hand():
    budget = KLBudget(0.1)
    assert budget.multiplier == 1.0
    budget.update(0.0)  # below by more than a factor of 3, which counts as one of 3
    assert budget.multiplier == pytest.approx(math.exp(-2 * math.log(3) - 0.5 * 0.2))
    budget.update(0.11 / 0.7)  # the running mean is 0.7 of it: just the aim
    assert budget.kl == pytest.approx(0.11) == AIM * 0.1
    assert budget.multiplier == pytest.approx(math.exp(-0.5 * 0.2))


@pytest.mark.parametrize("scale", [0.0003, 0.005, 0.08])
def test_it_finds_the_multiplier_whatever_its_size(scale):
    """A model whose KL settles at scale / multiplier, half of the way in every step."""
    budget = KLBudget(0.1)
    kl = 0.0
    for _ in range(200):
        kl += 0.5 * (min(scale / budget.multiplier, 10.0) - kl)
        budget.update(kl)
    assert kl == pytest.approx(AIM * 0.1, rel=0.02)
    assert budget.multiplier == pytest.approx(scale / kl, rel=0.05)


def test_it_keeps_up_with_a_model_that_drifts_away():
    """As a mask does while it sharpens: the same multiplier holds it less and less."""
    budget = KLBudget(0.1)
    kl = 0.0
    for step in range(48):
        target = 0.01 * math.exp(0.03 * step) / budget.multiplier
        kl += (min(target, 10.0) - kl) / 8
        budget.update(kl)
        if step >= 24:
            assert 0.8 * budget.aim <= kl <= 1.1 * budget.aim


def test_the_term_never_outweighs_the_task():
    """And the multiplier falls as soon as KL does: nothing is wound up."""
    budget = KLBudget(0.1)
    for _ in range(48):
        budget.update(3.0)
        assert budget.multiplier == 1.0
    budget.kl = 0.05
    budget.update(0.05)
    assert budget.multiplier < 0.5


def test_a_budget_that_does_not_bind_takes_the_term_away():
    budget = KLBudget(5.0)
    for _ in range(48):
        budget.update(0.01)
    assert budget.multiplier < 1e-3


def test_the_excess_over_a_budget():
    assert excess(0.3, None) == excess(0.1, 0.1) == excess(0.0, 0.1) == 0
    assert excess(0.3, 0.1) == pytest.approx(0.2) and excess(math.nan, 0.1) == math.inf


def test_a_resumed_multiplier_goes_the_same_way_bit_for_bit():
    one, other = KLBudget(0.3), KLBudget(0.3)
    for kl in (0.0, 0.7, 0.123456789, 1 / 3):
        one.update(kl)
    other.load(json.loads(json.dumps(one.state())))
    for kl in (0.2, 0.41):
        one.update(kl)
        other.update(kl)
    assert one.state() == other.state()


# The measurement


def test_kl_per_row_is_that_of_a_loop():
    model = tiny.tiny_llama()
    base = Base(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, -100, 8, 9, 10]},
        {"input_ids": [11, 12, 13], "labels": [-100, 12, 13]},
    ]
    expected = []
    for row, places in zip(rows, ((2, 3, 4), (0, 1)), strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), base.of(model) as unchanged:
            p = unchanged(input_ids=ids).logits[0].log_softmax(-1)
            q = model(input_ids=ids).logits[0].log_softmax(-1)
        per_token = [float((p[place].exp() * (p[place] - q[place])).sum()) for place in places]
        expected.append(sum(per_token) / len(per_token))
    found = kl_per_row(model, base, rows, batch_size=2)
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-4) and min(expected) > 1e-3
    assert [count for _, count in found] == [3, 2]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny.tiny_llama, {"target_modules": "all-linear"}),
        (tiny.tiny_llama, {"target_modules": "all-linear", "init_lora_weights": "pissa"}),
        (tiny.tiny_llama, {"target_modules": "all-linear", "init_lora_weights": "olora"}),
        (tiny.tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ],
)
@torch.no_grad()
def test_the_base_is_the_model_before_training_whatever_an_adapter_changes(make, settings):
    """PiSSA and OLoRA take a part of the weights away, and biases are trained where they are."""
    model, ids = make(), tiny.token_ids()
    expected = model(input_ids=ids).logits
    adapted = get_peft_model(model, LoraConfig(r=4, **settings))
    base = Base(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    with base.of(adapted) as unchanged:
        assert torch.allclose(unchanged(input_ids=ids).logits, expected, atol=1e-4)
    assert not torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-2)


def test_logits_that_are_not_the_heads_are_noticed_where_the_embedding_of_padding_is_zero():
    model = tiny.tiny_llama()
    assert not model.get_input_embeddings().weight[0].any()
    forward = model.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs

    model.forward = scaled
    with pytest.raises(UserError, match="the logits of a llama model are not its head's output"):
        KLOnTask(model, Base(model))


def test_a_decoder_that_is_not_one_is_noticed():
    model = tiny.decoder(transformers.ModernBertDecoderConfig, transformers.ModernBertDecoderForCausalLM)
    with pytest.raises(UserError, match="the logits of a modernbert-decoder model are not its head's output"):
        KLOnTask(model, Base(model))


def test_rows_of_a_batch_follow_from_its_number():
    rows = [{"input_ids": [n], "labels": [n]} for n in range(5)]

    def sequence(rank, num_processes):
        term = KLOnText(None, rows, 2, seed=3, rank=rank, num_processes=num_processes)
        return [[row["input_ids"][0] for row in term.rows_of(number)] for number in range(5)]

    alone = list(itertools.chain(*sequence(0, 1)))
    assert sorted(alone[:5]) == sorted(alone[5:]) == list(range(5)) and alone[:5] != alone[5:]
    first, second = sequence(0, 2), sequence(1, 2)
    together = itertools.chain(*(a + b for a, b in zip(first, second, strict=True)))
    assert list(together)[:10] == alone


@pytest.mark.parametrize("settings", [{"init_scores": "wanda"}, {"selection": "gumbel"}])
def test_the_term_can_be_made_before_scores_and_progress_are_there(settings):
    """A resumed run loads both later."""
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(**settings)).train()
    KLOnTask(model, Base(model))
    assert model.training


def test_the_term_can_be_made_before_the_model_is_on_the_gpu_that_its_attention_needs():
    """As with flash attention: the Trainer moves the model later."""

    def attend(*args, **kwargs):
        raise RuntimeError("no kernel for the CPU")

    AttentionInterface.register("gpu_alone", attend)
    model = get_peft_model(tiny.tiny_llama(), MaskConfig())
    model.get_base_model().set_attn_implementation("gpu_alone")
    KLOnTask(model, Base(model))
    assert model.config._attn_implementation == "gpu_alone"


def test_the_sums_of_a_step_take_no_float64_where_there_is_none(monkeypatch):
    monkeypatch.setattr("maskft.training.near_base.widest_float", lambda device: torch.float32)
    near_base = NearBase.__new__(NearBase)
    near_base.budget, near_base._weight, near_base._is_on_task, near_base._sums = None, 2.0, True, None
    near_base._term = SimpleNamespace(after_forward=lambda model: KLSum(torch.tensor(0.5), 3))
    for _ in range(2):
        assert near_base.after_forward(None, 4, 1) == 2.0 * 0.5 / 4
    assert near_base._sums.dtype == torch.float32 and near_base._sums.tolist() == [1.0, 6.0]


# Runs

BUDGETS = {"full": 0.05, "mask": 0.002, "lora": 0.01}


@pytest.mark.parametrize("method", ["mask", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "lora"))])
@pytest.mark.parametrize("rows", ["task", "text"])
def test_a_run_ends_at_the_budget(method, rows, call, text, tmp_path):
    options = {"max_steps": 48, "eval_steps": 8, "save_steps": 8, "logging_steps": 1, **METHODS[method]}
    budget = BUDGETS[method]
    if rows == "text":
        options |= {"kl_dataset_name": text, "kl_batch_size": 8}
    status, err = call(kl_budget=budget, **options)
    assert status == 0, err
    kl = read_record(tmp_path / "out").summary.kl
    history = read_record(tmp_path / "out").summary.history
    assert kl.budget == budget and kl.rows == ("task" if rows == "task" else text.name) and kl.num_tokens > 0
    assert 0.5 * budget < kl.reached <= budget and kl.is_met
    assert "KL(base || model) 0.0" in err and f"budget {budget}, multiplier" in err
    steps = [row for row in history if "loss" in row]
    assert all("kl" in row and "kl_multiplier" in row for row in steps)
    assert steps[-1]["kl_multiplier"] == pytest.approx(kl.multiplier)


def test_a_budget_that_is_not_met_keeps_the_nearest_and_says_so(call, tmp_path):
    """A mask that removes a random tenth is far from the base before its first step."""
    options = {"mask_init_scores": "normal", "mask_sparsity": 0.5, "keep_worse": True}
    status, err = call(kl_budget=1e-6, **options)
    assert status == 0, err
    kl = read_record(tmp_path / "out").summary.kl
    assert not kl.is_met and kl.reached > 1e-6
    assert "the budget is not met: the nearest checkpoint is kept; raise kl_budget" in err
    measured = [row["eval_kl"] for row in read_record(tmp_path / "out").summary.history if "eval_kl" in row]
    assert kl.reached == min(measured)


# A fifth of what the run reaches without a term, so that a part of the change has to be taken back.
TIGHT = {"full": 0.003, "mask": 0.0005, "lora": 0.001, "wanda": 0.0005}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{"eval_steps": 4}, {"eval_strategy": "no"}, {"eval_steps": 4, "load_best_model_at_end": False}]
)
def test_beyond_the_budget_a_part_of_the_change_is_kept(method, options, call, tmp_path):
    budget = TIGHT[method]
    # Autocast keeps rounded weights: a part would have the KL of the whole.
    settings = {"max_steps": 4, "save_steps": 4, "bf16": True, **METHODS[method]}
    status, err = call(kl_budget=budget, **settings, **options)
    assert status == 0, err
    summary = read_record(tmp_path / "out").summary
    kl = summary.kl
    assert kl.is_met and 0 < kl.part < 1 and kl.at_end > budget
    assert f"{kl.part:.2f} of the change is kept" in err and "not met" not in err
    # A weight moves in few steps; of a mask entries flip one by one.
    assert kl.reached >= (0.1 if method == "mask" else 0.9) * budget
    if "eval_steps" in options:
        last = [row for row in summary.history if "eval_kl" in row][-1]
        assert (last["eval_kl"], last["eval_part"], last["eval_kl_whole"]) == (kl.reached, kl.part, kl.at_end)
        # What is saved is what was measured.
        losses = read_heldout(tmp_path / "out")
        rows = list(zip(losses.nll, losses.num_tokens, strict=True))
        assert mean_nll(rows) == pytest.approx(last["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("options", [{"eval_strategy": "no"}, {"load_best_model_at_end": False}])
def test_where_no_checkpoint_is_chosen_the_last_step_is_measured_and_kept(options, call, tmp_path):
    options |= {"mask_init_scores": "normal", "mask_sparsity": 0.5, "keep_worse": True}
    status, err = call(kl_budget=1e-6, max_steps=3, **options)
    assert status == 0, err
    kl = read_record(tmp_path / "out").summary.kl
    assert not kl.is_met and kl.step is None and kl.reached == kl.at_end
    assert "the budget is not met: the model of the last step is kept; raise kl_budget" in err


def test_a_mask_that_is_not_kept_has_no_line_about_its_kl(call, tmp_path):
    """The adapter that is saved removes nothing."""
    status, err = call(kl_budget=0.01, mask_init_scores="normal", mask_sparsity=0.5)
    assert status == 0 and "an adapter that removes nothing" in err
    assert "KL(base || model)" not in err and read_record(tmp_path / "out").summary.kl.reached > 0


@pytest.mark.parametrize(
    ("reached", "shown"), [(0.0921, "0.0921"), (0.100003, "0.100003"), (0.099998, "0.099998"), (0.0, "0.0000")]
)
def test_it_is_seen_on_which_side_of_the_budget_a_kl_is(reached, shown):
    report = KLReport(budget=0.1, reached=reached, at_end=reached, multiplier=2.0, rows="task", num_tokens=9, step=3)
    assert f"{shown} nats per token on 9 held-out tokens, budget 0.1, " in str(report)


def test_a_start_that_nothing_within_the_budget_beats_is_said():
    report = KLReport(budget=0.1, reached=0.0, at_end=0.4, multiplier=2.0, rows="task", num_tokens=9, step=0)
    assert "no later checkpoint is better and within the budget (at the end 0.4000); raise kl_budget" in str(report)
    # The budget was no obstacle: a higher one would not help.
    within = str(report.model_copy(update={"at_end": 0.0}))
    assert "(at the end 0.0000); the end is within it, so the loss did not fall: take more steps" in within
    assert "raise kl_budget" not in within


def test_an_early_checkpoint_that_is_kept_for_the_budget_is_said():
    """It may have learned little, while the last one is just above the budget."""
    report = KLReport(budget=0.1, reached=0.09, at_end=0.11, multiplier=2.0, rows="task", num_tokens=9, step=12)
    assert "it is of step 12: at the end KL is 0.1100, above the budget; raise kl_budget, lower lea" in str(report)
    assert "step 12" not in str(report.model_copy(update={"at_end": 0.1}))


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_the_base_is_rounded_as_the_model(method, call, tmp_path):
    """Before the first step both are the same model, so their divergence is zero, not that of their rounding."""
    options = {**METHODS[method], "mask_sparsity": 0.0} if method == "mask" else METHODS[method]
    status, err = call(kl_to_base=0.1, bf16=True, eval_on_start=True, max_steps=1, **options)
    assert status == 0, err
    first, *_ = [row["eval_kl"] for row in read_record(tmp_path / "out").summary.history if "eval_kl" in row]
    assert first == 0.0


def test_without_evaluation_it_is_measured_at_the_end(call, tmp_path):
    status, err = call(kl_budget=0.05, eval_strategy="no", method="full", max_steps=3)
    assert status == 0, err
    assert read_record(tmp_path / "out").summary.kl.reached > 0


# Scores of a mask that begins on data are not those of its base alone.
RESUMED = METHODS | {"wanda": METHODS["mask"] | {"mask_init_scores": "wanda"}}


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("lora", "text"),
        ("full", "text"),
        ("mask", "text"),
        pytest.param("lora", "task", marks=pytest.mark.slow),
        pytest.param("wanda", "text", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(method, rows, call, text, tmp_path):
    """Weights, losses, multipliers and parts of the change, bit for bit."""
    options = {"max_steps": 8, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "save_total_limit": 8}
    options |= RESUMED[method] | {"kl_budget": TIGHT[method]}
    if rows == "text":
        options |= {"kl_dataset_name": text, "gradient_accumulation_steps": 2}
    status, err = call(**options)
    assert status == 0, err
    out, resumed = tmp_path / "out", tmp_path / "resumed"
    shutil.copytree(out, resumed)
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(resumed / name)
    weights = "model.safetensors" if method == "full" else ADAPTER_WEIGHTS
    for name in (weights, TRAINING):
        (resumed / name).unlink()
    status, err = call("resumed", resume_from_checkpoint="true", **options)
    assert status == 0, err
    assert (resumed / weights).read_bytes() == (out / weights).read_bytes()
    names = ("step", "loss", "eval_loss", "eval_kl", "eval_part", "eval_kl_whole", "kl", "kl_multiplier")
    one, other = (
        [{name: row.get(name) for name in names} for row in read_record(folder).summary.history]
        for folder in (out, resumed)
    )
    assert one == other
    assert any(row["eval_part"] is not None and row["eval_part"] < 1 for row in one)
    assert read_record(out).summary.kl == read_record(resumed).summary.kl
    text.write_text("\n".join(text.read_text().splitlines()[1:]))
    if rows == "text":
        status, err = call("resumed", resume_from_checkpoint="true", **options)
        assert status == 2 and "kl_data" in err


def test_a_fixed_coefficient_may_be_on_named_rows(call, text, tmp_path):
    ends = []
    for weight in (0.01, 100.0):
        status, err = call(f"kl{weight}", kl_to_base=weight, kl_dataset_name=text, max_steps=6, **METHODS["full"])
        assert status == 0, err
        kl = read_record(tmp_path / f"kl{weight}").summary.kl
        assert kl.budget is None and kl.multiplier == weight
        ends.append(kl.at_end)
    assert ends[1] < ends[0]


def test_measured_kl_is_that_of_the_saved_model(call, base, text, tmp_path):
    status, err = call(kl_budget=0.05, kl_dataset_name=text, max_steps=6, **METHODS["full"])
    assert status == 0, err
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    held = Base(before)
    from maskft.models import load_tokenizer
    from maskft.training.near_base import load_kl_rows
    from maskft.training.options import parse_words

    words = ["--model_name_or_path", str(base), "--kl_dataset_name", str(text), "--kl_budget", "0.05"]
    rows = load_kl_rows(parse_words([*words, "--dataset_name", str(text)])[0], load_tokenizer(str(base)))
    value = mean_nll(kl_per_row(after, held, list(rows.heldout), 4))
    assert value == pytest.approx(read_record(tmp_path / "out").summary.kl.reached, rel=1e-3)


# Input


def test_rows_that_cannot_be_used_are_noticed_before_the_model_is_loaded(call, text, monkeypatch):
    monkeypatch.setattr("maskft.training.train.load_base", lambda *args: pytest.fail("loaded"))
    text.write_text('{"text": "1+1=2"}')
    status, err = call(kl_budget=0.1, kl_dataset_name=text)
    assert status == 2 and "at least 2 are needed" in err


def test_a_recipe_may_name_rows_as_a_mixture(call, data, text, tmp_path):
    """As it may with the other data. The record is shared, and names no folder of the machine."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"kl_dataset_name:\n  {text}: 12\n")
    status, err = call(kl_to_base=0.1, config=recipe, dataset_name=f"{data}:40")
    assert status == 0, err
    record = read_record(tmp_path / "out")
    assert record.summary.kl.rows == f"{text.name}:12" and record.recipe["dataset_name"] == f"{data.name}:40"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 0}, "kl_budget is 0.0; it must be a finite number above 0, in nats per token"),
        ({"kl_budget": -0.1}, "kl_budget is -0.1"),
        ({"kl_budget": "nan"}, "kl_budget is nan"),
        ({"kl_budget": "inf"}, "kl_budget is inf"),
        ({"kl_budget": 0.1, "kl_to_base": 0.1}, "kl_budget 0.1 and kl_to_base 0.1 are both given"),
        ({"kl_budget": 0.1, "method": "l1_mask"}, "method l1_mask is not trained"),
        ({"kl_dataset_name": "TEXT"}, "give kl_budget (or kl_to_base) too"),
        ({"kl_budget": 0.1, "kl_batch_size": 8}, "kl_dataset_name, which is not given"),
        ({"kl_budget": 0.1, "kl_dataset_name": "TEXT", "kl_batch_size": 0}, "kl_batch_size is 0"),
        ({"kl_budget": 0.1, "kl_dataset_name": "./nowhere.jsonl"}, "nowhere.jsonl"),
        ({"kl_budget": 0.1, "kl_dataset_name": "ONE"}, "has 1 different row; at least 2 are needed"),
        ({"kl_budget": 0.1, "kl_dataset_name": "PROMPTS"}, "completion"),
    ],
)
def test_input_that_cannot_be_a_budget_is_one_line(options, message, call, text, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "1+1=2"}\n{"text": "1+1=2"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "1+2="}\n')
    files = {"TEXT": text, "ONE": tmp_path / "one.jsonl", "PROMPTS": tmp_path / "prompts.jsonl"}
    status, err = call(**{name: files.get(value, value) for name, value in options.items()})
    assert status == 2 and message in err and err.count("error:") == 1, err
    assert "Traceback" not in err and not (tmp_path / "out" / TRAINING).exists()


def test_a_loss_that_is_not_finite_is_not_the_best_within_the_budget():
    """Nothing was chosen, but the best loss so far was forgotten, so that a later and higher one took its place."""
    state = SimpleNamespace(best_metric=1.0)
    trainer = SimpleNamespace(
        guard=SimpleNamespace(is_save_due=True),
        args=SimpleNamespace(save_strategy="steps"),
        near_base=SimpleNamespace(excess=lambda kl: excess(kl, 0.1)),
        kl_of_best=lambda: 0.3,
        state=state,
    )
    metrics = {"eval_kl": 0.05, "eval_loss": float("nan")}
    assert MaskTrainer._is_best(trainer, metrics, trial=None) is False
    assert state.best_metric == 1.0
