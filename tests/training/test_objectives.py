"""``maskft train --objective dpo | grpo``: what is trained, what is measured, and the verdict on the mask."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from maskft.adapter.mask_set import MaskSet
from maskft.data import load_examples
from maskft.data.formats import FORMATS, from_preference
from maskft.training.objectives import _for_dpo, _pair, answer_reward
from maskft.training.record import read_record
from maskft.training.verdict import read_heldout
from maskft.tuner.model import resumes_two_adapters
from maskft_base.errors import UserError
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": "no"} for a in range(6) for b in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def guesser(base, tmp_path_factory):
    """A model that answers 0 or 1 to any sum, and data whose answers are the parities."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), tiny_tokenizer()
    sums = [f"{a}+{b}=" for a in range(8) for b in range(8)]
    ids = torch.tensor([tokenizer(f"{text}{n}")["input_ids"] + [tokenizer.eos_token_id] for text in sums for n in "01"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("guesser")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": t, "completion": str(n), "answer": str(n)} for t in sums for n in [(int(t[0]) + int(t[2])) % 2]]
    (folder / "parities.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model_name_or_path": folder, "dataset_name": folder / "parities.jsonl"}


MASK = {"mask_layers_to_transform": [1], "mask_sparsity": 0.2, "keep_worse": "true", "max_steps": 4, "save_steps": 2}
GRPO = {"num_generations": 4, "max_completion_length": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2}


def log_prob(model, tokenizer, prompt, completion):
    """Sum over the completion and the token that ends it."""
    before = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(logps[n - 1, ids[0, n]]) for n in range(len(before), ids.shape[1]))


def test_dpo_is_measured_by_its_own_loss(call, base, pairs, tmp_path):
    status, err = call(dataset_name=pairs, objective="dpo", beta=0.5, learning_rate=1e-2, **MASK)
    assert status == 0, err
    out, record = tmp_path / "out", read_record(tmp_path / "out")
    assert record.summary.objective == record.verdict.objective == "dpo"
    assert record.summary.start_loss == pytest.approx(math.log(2), abs=1e-6)
    assert "held-out preference loss without the mask 0.6931" in err and "nats/pair" in err
    assert record.summary.best_loss < record.summary.start_loss  # "no" is easily told from a number
    # By hand, of one held-out pair.
    plain = AutoModelForCausalLM.from_pretrained(base)
    tokenizer, found = tiny_tokenizer(), read_heldout(out)
    assert found.parent_nll == [pytest.approx(math.log(2))] * 16 and found.num_tokens == [1] * 16
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    losses = []
    for a in range(6):
        for b in range(6):
            prompt = f"{a}+{b}="
            gain = [
                log_prob(masked, tokenizer, prompt, t) - log_prob(plain, tokenizer, prompt, t)
                for t in (f"{a + b}", "no")
            ]
            losses.append(math.log1p(math.exp(-0.5 * (gain[0] - gain[1]))))
    assert all(min(abs(loss - each) for each in losses) < 1e-5 for loss in found.nll)


@pytest.mark.parametrize("is_chat", [False, True])
def test_pairs_have_the_tokens_that_trl_gives_them(is_chat):
    tokenizer = tiny_tokenizer()
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "42"}  # "42" is one token, and "=4" is two
    if is_chat:
        row = {
            key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in row.items()
        }
    example = from_preference(row, is_chat, "prompt", "chosen", "rejected")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    config = SimpleNamespace(dataset_num_proc=None, max_length=None)
    [expected] = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, config, "train")
    found = _for_dpo(*_pair(example, tokenizer, None))
    assert found == {key: expected[key] for key in found}


def test_grpo_is_measured_by_its_answers(call, guesser, tmp_path):
    status, err = call(objective="grpo", logging_steps=1, **MASK | GRPO | guesser)
    assert status == 0, err
    record, found = read_record(tmp_path / "out"), read_heldout(tmp_path / "out")
    assert found.objective == "grpo" and set(found.nll) <= {0.0, 1.0} and len(found.nll) == 16
    assert record.summary.best_loss == pytest.approx(sum(found.nll) / 16)
    assert "share of wrong held-out answers" in err and "wrong answers/question" in err
    assert record.recipe["num_generations"] == 4 and "tokens/s" not in err and "with held-out loss it took" in err
    rewards = [row["reward"] for row in record.summary.history if "reward" in row]
    assert len(rewards) == 4 and all(0 < reward < 1 for reward in rewards)
    # By hand: greedy answers of the saved mask.
    masked = AutoModelForCausalLM.from_pretrained(guesser["model_name_or_path"])
    masked = PeftModel.from_pretrained(masked, tmp_path / "out").eval()
    tokenizer, wrong = tiny_tokenizer(), {}
    rows = load_examples(str(guesser["dataset_name"]), "train", tokenizer=tokenizer)
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        text = tokenizer.decode(masked.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
        wrong[row["id"]] = float(text.partition("<|im_end|>")[0] != row["answer"])
    assert found.nll == [wrong[name] for name in found.ids]


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_killed_run_resumes_to_the_same_mask(objective, call, pairs, guesser, tmp_path):
    options = MASK | (GRPO | guesser if objective == "grpo" else {"dataset_name": pairs, "learning_rate": 1e-2})
    options |= {"objective": objective, "load_best_model_at_end": "false", "save_total_limit": 5}
    assert call(**options)[0] == 0
    whole, half = MaskSet.from_adapter(tmp_path / "out"), MaskSet.from_adapter(tmp_path / "out" / "checkpoint-2")
    assert whole.overlap(half) < 1
    for name in ("checkpoint-4", "adapter_model.safetensors", "training.json"):
        path = tmp_path / "out" / name
        path.rename(tmp_path / name)
    status, err = call(resume_from_checkpoint="true", **options)
    if objective == "dpo" and not resumes_two_adapters():
        assert status == 2 and "install transformers>=5.23" in err
        return
    assert status == 0, err
    again = MaskSet.from_adapter(tmp_path / "out")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert whole.sparsity == pytest.approx(0.2, abs=1e-3)


def test_other_rejected_answers_are_other_data(call, pairs, tmp_path):
    """No token of them is trained on, and the loss is of them."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(pairs.read_text())
    options = MASK | {"objective": "dpo", "dataset_name": file, "max_steps": 2}
    assert call(**options)[0] == 0
    file.write_text(pairs.read_text().replace('"no"', '"na"', 1))
    status, err = call(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2", **options)
    assert status == 2 and "is of a run that differs (data: " in err, err


def test_lora_has_the_same_objectives(call, pairs, tmp_path):
    status, err = call(method="lora", objective="dpo", dataset_name=pairs, max_steps=2)
    assert status == 0, err
    assert read_record(tmp_path / "out").summary.objective == "dpo"


def test_rewards_are_those_of_the_evaluation():
    texts = ["so it is 1,200.", "twelve", [{"role": "assistant", "content": "#### 3/4"}], " a  b "]
    assert answer_reward(texts, ["1200", "12", "0.75", "a b"], ["number", "number", "number", "exact"]) == [1, 0, 1, 1]


def test_formats_of_preferences():
    def read(row):
        columns = next(columns for columns in FORMATS if all(column in row for column in columns))
        return from_preference(row, True, *columns)

    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))
    chat = {"prompt": [user], "completion": [good], "rejected": [bad]}
    assert read({"prompt": "q", "chosen": [user, good], "rejected": [user, bad], "messages": []}) == chat
    assert read({"prompt": [user], "chosen": [good], "rejected": [bad]}) == chat
    assert read({"chosen": [user, good], "rejected": [user, bad]}) == chat
    assert read({"prompt": "q", "chosen": "yes", "rejected": "no"})["rejected"] == "no"
    with pytest.raises(UserError, match="must begin with the same messages"):
        read({"chosen": [user, good], "rejected": [user, good]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, "objective dpo needs a completion that is not wanted"),
        ({"objective": "grpo", "num_generations": 3, "per_device_train_batch_size": 4}, "a step has 4 answers"),
        ({"objective": "dpo", "method": "full"}, "goes with --method mask or lora"),
        ({"objective": "dpo", "num_generations": 2}, "num_generations goes with --objective grpo, not with dpo"),
        ({"beta": 0.1}, "beta goes with --objective dpo or grpo, not with sft"),
        ({"objective": "grpo", "packing": "true"}, "does not go with packing"),
        ({"objective": "grpo", "objective_options": '{"los_type": "grpo"}'}, "did you mean 'loss_type'"),
        ({"objective": "grpo", "objective_options": "[1]"}, "write a JSON object"),
    ],
)
def test_mistakes_are_one_line(options, message, call):
    status, err = call(**options)
    assert status == 2 and message in err
