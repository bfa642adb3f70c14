"""Batches without padding: the same training, the advice, and models that would mix rows."""

import itertools
import json
from statistics import mean

import pytest
import torch
from datasets import Dataset
from transformers import MambaConfig, MambaForCausalLM

import tiny
from maskft.masks.mask_set import MaskSet
from maskft.training.arguments import TrainingArguments
from maskft.training.padding import expected_longest, padding_advice, padding_share, separates_rows
from maskft.training.record import read_record
from maskft_lab.cli.main import main
from tiny_tokenizer import tiny_tokenizer

ADVICE = "of a batch is padding: --padding_free true trains without it"


@pytest.fixture
def uneven(tmp_path):
    """Rows of 4 to 40 tokens."""
    file = tmp_path / "uneven.jsonl"
    rows = [{"prompt": "1+" * (1 + n % 19) + "1=", "completion": f"{2 + n % 19}"} for n in range(64)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_expected_longest_row_by_hand(batch_size):
    lengths = [5, 1, 2, 2]
    batches = itertools.product(lengths, repeat=batch_size)
    assert expected_longest(lengths, batch_size) == pytest.approx(mean(map(max, batches)))


def test_the_share_of_padding():
    assert padding_share([7, 7, 7], batch_size=4) == 0
    assert padding_share([1, 3], batch_size=1) == 0
    # Three of four batches have a row of 3.
    assert padding_share([1, 3], batch_size=2) == pytest.approx(1 - 2 / 2.5)


@pytest.mark.parametrize("terms", [{}, {"kl_to_base": 1.0}])
def test_training_without_padding_is_the_same(terms, words, uneven, tmp_path, capsys):
    options = {
        "dataset_name": uneven, "method": "mask", "learning_rate": 1e-2, "keep_worse": True, "max_steps": 4,
        "logging_steps": 1, **terms,
    }  # fmt: skip
    assert main(words("padded", **options)) == 0
    assert ADVICE in capsys.readouterr().err
    assert main(words("free", **options, padding_free=True)) == 0
    assert ADVICE not in capsys.readouterr().err
    runs = [read_record(tmp_path / name).summary for name in ("padded", "free")]
    assert runs[0].num_train_tokens == runs[1].num_train_tokens
    losses = [[row["loss"] for row in run.history if "loss" in row] for run in runs]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    padded, free = (MaskSet.from_adapter(tmp_path / name) for name in ("padded", "free"))
    assert all(torch.equal(padded[name], free[name]) for name in padded)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_keeps_rows_apart(implementation):
    for model in (tiny.tiny_llama(), tiny.tiny_gpt2()):
        model.set_attn_implementation(implementation)
        assert separates_rows(model, [3, 4, 5], [6, 7, 8, 9])
        assert not model.training


def test_a_model_whose_logits_are_not_finite_is_not_called_mixing():
    model = tiny.tiny_llama()
    model.lm_head.weight.data[0] = torch.nan
    assert separates_rows(model, [3, 4, 5], [6, 7, 8, 9])


def test_a_recurrent_model_is_refused(words, uneven, tmp_path, capsys):
    """Also where rows are packed: its state runs from row to row. Methods that do not train may share the option."""
    folder = tmp_path / "mamba"
    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {"model_name_or_path": folder, "dataset_name": uneven, "method": "full"}
    for option, more in (("padding_free", {}), ("packing", {"max_length": 64})):
        assert main(words("out", **options, **more, **{option: True})) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.endswith(
            f"{option}: models of type mamba do not keep rows of one sequence apart; train without {option}"
        )
    assert not (tmp_path / "out").exists()
    options |= {"method": "l1_mask", "mask_target_modules": "in_proj"}
    assert main(words("l1", **options, padding_free=True)) == 0


def test_no_advice_where_it_does_not_help(tmp_path):
    model = tiny.tiny_llama()

    def advice(lengths, **options):
        rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
        return padding_advice(model, rows, TrainingArguments(str(tmp_path), **options))

    uneven = [4, 8, 40, 12] * 8
    assert advice(uneven, per_device_train_batch_size=4).startswith("48% of a batch is padding")
    assert advice(uneven, per_device_train_batch_size=1) is None
    assert advice([10] * 32, per_device_train_batch_size=4) is None
    assert advice(uneven, per_device_train_batch_size=4, padding_free=True) is None
    by_length = {"train_sampling_strategy": "group_by_length"}
    assert advice(uneven, per_device_train_batch_size=4, **by_length) is None
    # Long rows too: attention is within rows.
    assert advice([100 * length for length in uneven], per_device_train_batch_size=4) is not None
