"""Masks over bases that bitsandbytes holds in 8 or 4 bits: the mask falls on the dequantised weight."""

import copy
import json
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from maskft import MaskConfig
from maskft.adapter.merge import merge
from maskft.adapter.verify import verify
from maskft.masking import topk_mask
from maskft.tuner.model import adapter_layers, current_masks
from maskft_base.errors import UserError
from tiny import TRAINER, tiny_llama, token_ids
from tiny_tokenizer import tiny_tokenizer

pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantized]': a wheel of 40 MB")
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
HELD = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of multiples of 64, which bitsandbytes' kernels for CPUs want of layers that are not masked."""
    folder = tmp_path_factory.mktemp("quantised")
    plain_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def plain_llama(seed=0):
    return tiny_llama(2, seed=seed, hidden_size=64, intermediate_size=128)


def load(folder, held, dtype=torch.float32, **settings):
    how = BitsAndBytesConfig(**HELD[held], **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype)


def as_floats(folder, held):
    """The same model with weights of floats, dequantised by bitsandbytes' own functions."""
    plain, quantised = plain_llama(), load(folder, held)
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            plain.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            plain.get_submodule(name).weight.data = int8_vectorwise_dequant(weight.data, weight.SCB)
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, plain_llama().model.layers[0].mlp.up_proj.weight)
    return plain


def train(model, steps=3, micro_batches=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        for part in range(micro_batches):
            ids = token_ids(seed=10 * step + part)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_it_trains_as_the_dequantised_model(held, scope, folder):
    config = MaskConfig(sparsity=0.3, init_scores="magnitude", scope=scope, task_type="CAUSAL_LM")
    plain = get_peft_model(as_floats(folder, held), copy.deepcopy(config)).train()
    base = load(folder, held)
    before = {name: p.clone() for name, p in base.named_parameters()}
    masked = get_peft_model(base, copy.deepcopy(config)).train()
    assert train(masked) == train(plain)
    for name, mask in current_masks(plain).items():
        assert torch.equal(current_masks(masked)[name], mask) and not mask.all()
    plain.eval(), masked.eval()
    ids = token_ids(seed=99)
    with torch.no_grad():
        assert torch.equal(masked(input_ids=ids).logits, plain(input_ids=ids).logits)
        with masked.disable_adapter(), plain.disable_adapter():
            assert torch.equal(masked(input_ids=ids).logits, plain(input_ids=ids).logits)
    unloaded = masked.unload()
    after = dict(unloaded.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert torch.isfinite(unloaded(input_ids=ids).logits).all()  # bitsandbytes' own layers compute again


@pytest.mark.parametrize("held", HELD)
def test_compute_dtypes(held, folder):
    base = load(folder, held, torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16)
    model = get_peft_model(base, MaskConfig(sparsity=0.3, task_type="CAUSAL_LM"))
    train(model, steps=1)
    layers = adapter_layers(model).values()
    assert {layer.effective.value.dtype for layer in layers} == {torch.bfloat16}
    assert {layer.mask_scores["default"].dtype for layer in layers} == {torch.float32}
    assert model(input_ids=token_ids()).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(input_ids=token_ids()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("held", HELD)
def test_the_file_says_it_and_goes_onto_either_base(held, folder, tmp_path):
    config = MaskConfig(sparsity=0.3, task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, held), config).train()
    train(model)
    model.save_pretrained(tmp_path / "mask")
    masks = current_masks(model)
    assert json.loads((tmp_path / "mask" / "adapter_config.json").read_text())["base_quantisation"] == held
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(load(folder, held), tmp_path / "mask")
    model.eval()
    assert torch.equal(again(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
    other = "int8" if held != "int8" else "nf4"
    for base in (plain_llama(), load(folder, other)):
        with pytest.warns(UserWarning, match=f"learned on weights held as {held}, the model's are held as"):
            onto = PeftModel.from_pretrained(base, tmp_path / "mask")
        assert all(torch.equal(mask, masks[name]) for name, mask in current_masks(onto).items())
    changed = load(folder, held)
    weight = changed.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)
    for base in (plain_llama(seed=7), changed):
        with pytest.raises(UserError, match="was trained on other base weights"):
            PeftModel.from_pretrained(base, tmp_path / "mask")


def test_merging_needs_the_full_precision_base(folder, tmp_path):
    base = load(folder, "nf4")
    model = get_peft_model(base, MaskConfig(sparsity=0.3, task_type="CAUSAL_LM"))
    for attempt in (model.merge_and_unload, model.merge_adapter, next(iter(adapter_layers(model).values())).merge):
        with pytest.raises(UserError, match=r"is held as nf4: a mask is merged into full-precision weights"):
            attempt()
    model.save_pretrained(tmp_path / "mask")
    load(folder, "nf4").save_pretrained(tmp_path / "held")
    tiny_tokenizer().save_pretrained(tmp_path / "held")
    with pytest.raises(UserError, match="is held as nf4: a mask is merged into full-precision weights"):
        merge(tmp_path / "mask", tmp_path / "merged", base=str(tmp_path / "held"))
    assert not (tmp_path / "merged").exists()
    with pytest.warns(UserWarning, match="the mask has to be evaluated on these"):
        merge(tmp_path / "mask", tmp_path / "merged", base=str(folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    name, mask = next(iter(current_masks(model).items()))
    full = plain_llama().get_submodule(name).weight
    assert torch.equal(merged.get_submodule(name).weight, torch.where(mask, full, 0.0))
    with pytest.warns(UserWarning):
        lines = verify(tmp_path / "mask", str(folder))
    assert any("compared roughly" in line and "nf4" in line for line in lines)


def test_scores_that_a_trainer_cast_are_the_start_again(folder):
    config = MaskConfig(sparsity=0.3, scope="global", task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, "int8"), config)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # as TRL's trainers do
    model(input_ids=token_ids())
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in after.items())
    # Where they see the mask, they do not.
    # Where they see the mask, they do not.
    assert not model.is_loaded_in_8bit and model.get_base_model().is_loaded_in_8bit


def test_what_is_refused(folder):
    with pytest.raises(UserError, match="removed_value 'base' is not for quantised layers"):
        get_peft_model(load(folder, "nf4"), MaskConfig(removed_value="base", removed_value_model=str(folder)))
    base = load(folder, "nf4").eval()
    weight = base.model.layers[0].mlp.up_proj.weight
    weight.quant_state.packing_format_for_cpu = True  # as a first pass in evaluation mode leaves it with AVX512-BF16
    with pytest.raises(UserError, match="has repacked 4-bit weights for this CPU"):
        get_peft_model(base, MaskConfig())


def test_magnitudes_are_those_of_the_dequantised_weight(folder):
    model = get_peft_model(load(folder, "int8"), MaskConfig(sparsity=0.3, init_scores="magnitude"))
    floats = as_floats(folder, "int8")
    for name, mask in current_masks(model).items():
        assert torch.equal(mask, topk_mask(floats.get_submodule(name).weight, 0.3))


def test_trl_trains_over_it(folder, tmp_path):
    """The trainer loads the base quantised, and casts what trains over it to bfloat16."""
    rows = Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(6) for b in range(6)])
    args = SFTConfig(str(tmp_path / "out"), max_steps=4, model_init_kwargs={"dtype": "float32"}, **TRAINER)
    trainer = SFTTrainer(
        str(folder),
        args,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=MaskConfig(sparsity=0.3, task_type="CAUSAL_LM"),
        quantization_config=BitsAndBytesConfig(**HELD["nf4"]),
    )
    layers = adapter_layers(trainer.model)
    start = {name: layer.fresh_scores(layer.mask_configs["default"]) for name, layer in layers.items()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    for name, layer in layers.items():
        scores = layer.mask_scores["default"]
        assert scores.dtype == torch.float32 and layer.quantisation == "nf4"
        assert 0 < (scores - start[name]).abs().max() < 0.05  # four steps of at most 1e-2 from the start it drew
