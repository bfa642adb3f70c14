"""The cache of the frozen prefix: the same losses, fewer forward passes, and what it refuses."""

import json

import pytest
import torch
from peft import get_peft_model

import tiny
from maskft import MaskConfig
from maskft.training.prefix_cache import PrefixCache
from maskft_base.errors import UserError
from maskft_base.files import TRAINING
from maskft_lab.cli.main import main


def masked(dtype=torch.float32, layers=(2,), make=tiny.tiny_llama, **overrides):
    return get_peft_model(make(**overrides).to(dtype), MaskConfig(layers_to_transform=list(layers)))


def batch(*lengths, seed=1):
    ids = tiny.token_ids(len(lengths), max(lengths), seed=seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length], ids[row, length:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_of(model, inputs):
    return model(**inputs, use_cache=False).loss


def gpt2_without_dropout():
    return tiny.tiny_gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, summary_first_dropout=0.0)


@pytest.mark.parametrize("make", [tiny.MODELS["llama"], gpt2_without_dropout, tiny.MODELS["gemma3"]])
def test_a_second_epoch_gives_the_same_losses_and_gradients_without_running_the_prefix(make, tmp_path):
    model = get_peft_model(make().bfloat16(), MaskConfig(layers_to_transform=[2]))
    batches = [batch(9, 5), batch(7, 8, seed=2)]
    expected = [loss_of(model, b) for b in batches]
    expected[0].backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    cache = PrefixCache(model, tmp_path, 1e9, None)
    assert [loss_of(model, b).item() for b in batches] == [e.item() for e in expected]
    assert cache.num_hits == 0
    again = [loss_of(model, b) for b in batches]
    assert cache.num_hits == 4
    # A bfloat16 model's hidden states are kept exactly.
    assert [loss.item() for loss in again] == [e.item() for e in expected]
    again[0].backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, _with_grad(model), strict=True))
    # Rows are known whatever batch they are in.
    mixed = {k: torch.stack([batches[0][k][0], torch.nn.functional.pad(batches[1][k][1], (0, 1))]) for k in batches[0]}
    mixed["labels"] = mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    hits = cache.num_hits
    loss_of(model, mixed)
    assert cache.num_hits == hits + 2
    cache.remove()
    assert loss_of(model, batches[0]).item() == expected[0].item()


def _with_grad(model):
    return [p for p in model.parameters() if p.grad is not None]


def test_the_layers_do_not_run_on_a_known_batch(tmp_path):
    model, inputs = masked(), batch(9, 5)
    ran = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    cache = PrefixCache(model, tmp_path, 1e9, None)
    loss_of(model, inputs)
    loss_of(model, inputs)
    assert ran == [0, 1, 2, 2] and cache.num_hits == 2
    cache.remove()


def test_float32_is_rounded_to_bfloat16(tmp_path):
    model, inputs = masked(), batch(9, 5)
    exact = loss_of(model, inputs).item()
    cache = PrefixCache(model, tmp_path, 1e9, None)
    first, second = loss_of(model, inputs).item(), loss_of(model, inputs).item()
    assert first == second != exact and first == pytest.approx(exact, abs=2e-3) and cache.num_hits == 2
    cache.remove()


def test_another_run_finds_the_rows_and_another_model_does_not(tmp_path):
    inputs = batch(9, 5)
    for model, hits in ((masked(), 0), (masked(), 2), (masked(layers=(1,)), 0), (masked(seed=5), 0)):
        cache = PrefixCache(model, tmp_path, 1e9, None)
        loss_of(model, batch(4, seed=7))  # the first batch of a run always goes through the layers
        loss_of(model, inputs)
        assert cache.num_hits == hits
        cache.remove()


def test_a_killed_run_and_deleted_rows_leave_what_can_be_used(tmp_path):
    model, inputs = masked(), batch(9, 5)
    cache = PrefixCache(model, tmp_path, 1e9, None)
    loss_of(model, inputs)
    cache.remove()
    first, second = (file for folder in tmp_path.iterdir() for file in folder.iterdir())
    first.unlink()
    second.rename(second.with_name(f"{second.name}.1234"))  # killed before the row was whole
    cache = PrefixCache(model, tmp_path, 1e9, None)
    assert cache.num_bytes == 0
    loss_of(model, batch(9, 9, seed=3))
    expected = loss_of(model, inputs).item()
    assert cache.num_hits == 0 and loss_of(model, inputs).item() == expected
    assert cache.num_hits == 2
    cache.remove()


@pytest.mark.parametrize("harm", ["zeroed", "cut", "emptied", "deleted"])
def test_a_damaged_row_is_computed_again(harm, tmp_path):
    model, inputs = masked(), batch(9, 5)
    cache = PrefixCache(model, tmp_path, 1e9, None)
    expected = loss_of(model, inputs).item()
    file = next(file for folder in tmp_path.iterdir() for file in folder.iterdir())
    content = file.read_bytes()
    changed = {"zeroed": bytes(len(content)), "cut": content[:-7], "emptied": b""}
    file.unlink() if harm == "deleted" else file.write_bytes(changed[harm])
    assert loss_of(model, inputs).item() == expected and cache.num_hits == 0
    assert file.read_bytes() == content
    assert loss_of(model, inputs).item() == expected and cache.num_hits == 2
    cache.remove()


def test_it_keeps_no_more_than_its_bound(tmp_path):
    model = masked()
    cache = PrefixCache(model, tmp_path, 10 * 32 * 2, None)  # one row, and not two
    for _ in range(2):
        loss_of(model, batch(9, 5))
    assert cache.num_bytes == 9 * 32 * 2 + 4 and cache.num_hits == 0
    assert "full" in cache.summary()
    cache.remove()


def test_padding_on_the_left_and_generation_go_through_the_layers(tmp_path):
    model, inputs = masked(), batch(9, 5)
    cache = PrefixCache(model, tmp_path, 1e9, None)
    flipped = {k: v.flip(1) for k, v in inputs.items()}
    for _ in range(2):
        loss_of(model, flipped)
    model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=3)
    assert cache.num_hits == 0 and cache.num_bytes == 0
    cache.remove()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: masked(layers=(0,)), "layer 0 is trained"),
        (lambda: masked(attention_dropout=0.1), "without dropout, but attention_dropout is 0.1"),
        (
            lambda: get_peft_model(
                tiny.tiny_llama(), MaskConfig(layers_to_transform=[1], modules_to_save=["embed_tokens"])
            ),
            "needs a frozen prefix, but .*embed_tokens.* is trained",
        ),
    ],
)
def test_what_it_refuses(model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        PrefixCache(model(), tmp_path, 1e9, None)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_leave_each_row_once(tmp_path):
    models, inputs = [masked(), masked()], batch(9, 5)
    caches = [PrefixCache(model, tmp_path, 1e9, None) for model in models]
    assert loss_of(models[0], inputs).item() == loss_of(models[1], inputs).item()
    files = [file for folder in tmp_path.iterdir() for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) == (9 + 5) * 32 * 2 + 2 * 4
    assert loss_of(models[1], inputs).item() == loss_of(models[0], inputs).item()
    assert [cache.num_hits for cache in caches] == [2, 2]
    for cache in caches:
        cache.remove()


def test_on_the_command_line(base, data, tmp_path, capsys):
    words = ["train", "--model_name_or_path", base, "--dataset_name", data, "--eval_split_size", 16, "--max_steps", 6]
    words += ["--per_device_train_batch_size", 4, "--bf16", "false", "--gradient_checkpointing", "false"]
    words += ["--mask_layers_to_transform", 2, "--learning_rate", "1e-3"]
    losses = []
    for name, extra in (("plain", []), ("first", ["--mask_prefix_cache", tmp_path / "prefix"])):
        assert main([str(w) for w in [*words, *extra, "--output_dir", tmp_path / name]]) == 0
        history = json.loads((tmp_path / name / TRAINING).read_text())["summary"]["history"]
        losses.append([row["eval_loss"] for row in history if "eval_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert "of rows came from it" in capsys.readouterr().err
    assert main([str(w) for w in [*words, *extra, "--output_dir", tmp_path / "x", "--packing", "true"]]) == 2
    assert "packing" in capsys.readouterr().err
