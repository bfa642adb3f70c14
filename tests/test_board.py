"""recipes/peft_metamathqa: inputs, forgetting as PEFT measures it, results in the layout of its comparison."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from maskft import MaskConfig
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "peft_metamathqa" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_inputs_have_the_text_and_the_rows_of_peft_s_comparison(tmp_path, capsys):
    asked = [{"question": f"What is {n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(60)]
    sources = {
        "metamathqa": [{"query": "1 + 1?", "response": "The answer is: 2"}, {"query": "x" * 1300, "response": "y"}],
        "gsm8k_train": asked,
        "gsm8k_test": asked[:2],
        "finewiki": [{"text": f"Page {n}"} for n in range(102)],
    }
    (tmp_path / "in").mkdir()
    for name, rows in sources.items():
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = script("make_inputs")
    inputs.main(tmp_path / "in", tmp_path / "out")
    read = {f.name[:-9]: list(map(json.loads, gzip.open(f, "rt"))) for f in (tmp_path / "out").iterdir()}
    assert read["metamathqa"] == [{"text": "Question: 1 + 1? Think step by step.\nAnswer:The answer is: 2"}]
    assert len({row["text"] for row in read["gsm8k_valid"]}) == 50 and len(read["wikipedia"]) == 100
    assert read["gsm8k_test"][1] == {
        "prompt": "Question: What is 1 + 1? Think step by step.\nAnswer:",
        "completion": "It is.\n#### 2",
        "answer": "2",
        "answer_type": "number",
    }
    (tmp_path / "in" / "finewiki.jsonl").unlink()
    with pytest.raises(UserError, match=r"0 files in .* have 'finewiki' in their name"):
        inputs.main(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "config", [MaskConfig(sparsity=0.3), LoraConfig(target_modules=["q_proj"])], ids=["mask", "lora"]
)
def test_forgetting_is_the_mean_loss_of_all_tokens_but_the_first(config, monkeypatch):
    """Text by text and token by token, without padding; one text is cut."""
    module, tokenizer = script("forgetting"), tiny_tokenizer()
    monkeypatch.setattr(module, "MAX_TOKENS", 12)
    model = get_peft_model(tiny.tiny_llama(vocab_size=len(tokenizer)), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    texts = ["one", "a longer text of many more tokens than are kept", "two and three"]

    @torch.no_grad()
    def mean():
        losses = []
        for text in texts:
            ids = torch.tensor(tokenizer(text, truncation=True, max_length=12)["input_ids"])
            logits = model(input_ids=ids[None]).logits[0]
            losses += [-torch.log_softmax(logits[t], -1)[ids[t + 1]].item() for t in range(len(ids) - 1)]
        return sum(losses) / len(losses)

    after = mean()
    with model.disable_adapter():
        before = mean()
    assert module.forgetting(model, tokenizer, texts) == pytest.approx(after - before, abs=1e-6)
    assert abs(after - before) > 1e-4


def test_rows_and_steps_of_a_run(monkeypatch):
    """Rows of all micro-batches of a step; evaluations after a number of steps, or a share of all."""
    board = script("board")
    file = sorted((ROOT / "results" / "smollm2-curve-sums").glob("full*.json.gz"))[0]
    result = board.read_result(file)
    trained = json.loads((file.parent / "training.json").read_text())[result["study"]["run"]]
    settings = result["study"]["settings"]
    num_steps = trained["num_steps"]

    def rows_and_steps(**changed):
        settings.update(changed)
        record = board.experiment(result, trained, 0.0)
        train_config = record["run_info"]["train_config"]
        return record["train_info"]["metrics"][-1]["train samples"], train_config["eval_steps"]

    num_rows = settings["per_device_train_batch_size"]
    assert rows_and_steps(eval_steps=0.5) == (num_steps * num_rows, num_steps // 2)
    assert rows_and_steps(eval_steps=8, gradient_accumulation_steps=2) == (2 * num_steps * num_rows, 8)
    assert rows_and_steps(global_batch_size=96) == (96 * num_steps, 8)


def test_the_board_of_smollm2_is_what_its_results_say(tmp_path):
    """The committed files; and every field that PEFT's processing.py reads is there."""
    sources = [ROOT / "results" / f"smollm2-curve-sums{end}" for end in ("-rivals", "")]
    board = ROOT / "results" / "board-smollm2"
    # The lines above the table were written by a person, and stay.
    head, _, _ = (board / "table.md").read_text().partition("| method |")
    (tmp_path / "table.md").write_text(head + "| method |\n")
    table = script("board").main(tmp_path, sources, "wikipedia")
    written = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*.*")}
    assert written == {file.relative_to(board): file.read_text() for file in board.rglob("*.*")}
    assert "| LoRA r 16 | 0 | 0.507 | +0.1173 | 4,884,480 | 9,768,960 |" in table
    records = [json.loads(text) for path, text in written.items() if path.suffix == ".json"]
    assert {str(r["run_info"]["peft_config"] and r["run_info"]["peft_config"]["peft_type"]) for r in records} == {
        "MASK", "LORA", "IA3", "OFT", "OSF", "SHIRA", "LN_TUNING", "None"
    }  # fmt: skip
    for record in records:
        run, train, last = record["run_info"], record["train_info"], record["train_info"]["metrics"][-1]
        assert {"created_at", "total_time", "experiment_name", "peft_branch", "train_config"} <= set(run)
        memory = {f"accelerator_memory_{name}" for name in ("reserved_avg", "max", "reserved_99th")}
        assert memory | {"train_time", "file_size", "num_trainable_params", "status"} <= set(train)
        assert set(last) >= {"test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
        assert {"package_info", "system_info"} <= set(record["meta_info"])
        counts = [train[name] for name in (*memory, "file_size", "num_trainable_params")]  # it makes them integers
        assert all(isinstance(n, int) for n in (*counts, last["train samples"], last["train total tokens"]))
