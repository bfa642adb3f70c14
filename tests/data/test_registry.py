"""The registered sets, on small files of our own in the hub's formats."""

import json
from pathlib import Path

import pytest

from maskft.data.mixtures import load_examples
from maskft.data.registry import TRAINING_SETS
from maskft.data.sources import split_of
from maskft.data.tokenizing import tokenize_example
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer

SAMPLES = Path(__file__).parent / "samples"


def rows_of_the_docs():
    docs = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    return {line.split("|")[1].strip(" `"): line for line in docs.splitlines() if line.startswith("| `")}


def conversation(example):
    return example["messages"] if "messages" in example else example["prompt"] + example["completion"]


@pytest.mark.parametrize("name", TRAINING_SETS)
def test_every_set_becomes_messages(name):
    examples = load_examples(name, data_dir=str(SAMPLES))
    assert len(examples) == 10
    tokenizer = tiny_tokenizer()
    for example in examples:
        roles = [message["role"] for message in conversation(example)]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"].strip() for message in conversation(example))
        assert any(label != -100 for label in tokenize_example(example, tokenizer)["labels"])


def test_conversion_by_hand():
    (metamath, *_) = load_examples("metamathqa", data_dir=str(SAMPLES))
    assert metamath["prompt"] == [
        {"role": "user", "content": "Ada packs 2 crates with 6 kites in each. How many kites are packed?"}
    ]
    assert metamath["completion"][0]["content"].endswith("The answer is: 12")
    (gsm, *_) = load_examples("gsm8k", data_dir=str(SAMPLES))
    assert (gsm["answer"], gsm["answer_type"]) == ("17", "number")
    orca = load_examples("open_orca", data_dir=str(SAMPLES))
    assert [message["role"] for message in orca[0]["prompt"]] == ["system", "user"]
    assert [message["role"] for message in orca[1]["prompt"]] == ["user"]  # its system prompt is empty
    code = load_examples("code_alpaca", data_dir=str(SAMPLES))
    assert code[1]["prompt"][0]["content"].endswith("sentence.\n\ndef reverse_words(sentence):")
    assert "\n\n" not in code[0]["prompt"][0]["content"]
    _, solution = load_examples("numinamath_tir", data_dir=str(SAMPLES))[0]["messages"]  # tools in one turn
    assert "```python\n" in solution["content"] and "```output\n14\n```" in solution["content"]


def test_plain_text_for_a_tokenizer_without_a_template():
    examples = load_examples("open_orca", data_dir=str(SAMPLES), tokenizer=tiny_tokenizer(chat_template=False))
    assert examples[0]["prompt"].startswith("You are a teacher. Explain each step.\n\nQuestion: Sentence: the kites")
    assert examples[1]["prompt"].startswith("Question: ")


def test_hub_is_asked_for_the_registered_set(monkeypatch):
    import datasets

    asked = []

    def from_hub(name, config, split, **kwargs):
        asked.append((name, config, split, kwargs))
        rows = [json.loads(line) for line in (SAMPLES / "numinamath_tir.jsonl").read_text().splitlines()]
        return datasets.Dataset.from_list([*rows, {**rows[0], "source": "another set of the mixture"}])

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert len(load_examples("numinamath_tir")) == 10
    with pytest.raises(UserError, match=r"open_orca: row 1: no usable column among .* one of: system_prompt \+"):
        load_examples("open_orca")
    assert asked == [
        ("allenai/tulu-3-sft-mixture", None, "train", {}),
        ("Open-Orca/OpenOrca", None, "train", {"data_files": "1M-GPT4-Augmented.parquet"}),
    ]


def test_another_split_of_a_registered_set(tmp_path, monkeypatch):
    import datasets

    for split, answer in (("train", 1), ("test", 2)):
        row = {"question": f"What is {answer}?", "answer": f"#### {answer}"}
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(json.dumps(row) + "\n")
        (row,) = load_examples("gsm8k", split, data_dir=str(tmp_path))
        assert row["answer"] == str(answer)
    asked = []

    def from_hub(name, config, split, **kwargs):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "What is 1?", "answer": "#### 1"}])

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    load_examples("gsm8k", config="socratic")
    load_examples("gsm8k,ours/other")
    assert asked == [("openai/gsm8k", config, "train") for config in ("socratic", "main")] + [
        ("ours/other", None, "train")
    ]


def test_a_file_without_a_split_in_its_name_is_that_of_training(tmp_path, monkeypatch):
    """Held out by that name, it would be the training rows."""
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "What is 1?", "answer": "#### 1"}) + "\n")
    with pytest.raises(UserError, match=r"holds none of gsm8k_test\.jsonl"):
        load_examples("gsm8k", "test", data_dir=str(tmp_path))
    assert len(load_examples("gsm8k", data_dir=str(tmp_path))) == 1
    monkeypatch.setattr("maskft.data.sources.load_from_hub", lambda *_, **__: [{"question": "2?", "answer": "#### 2"}])
    (row,) = load_examples("openai/gsm8k", "test", data_dir=str(tmp_path))
    assert row["answer"] == "2"
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "What is 3?", "answer": "#### 3"}) + "\n")
    assert len(load_examples("own", "test", data_dir=str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("name", "asked", "split"),
    [
        ("gsm8k", None, "test"),
        ("openai/gsm8k", None, "test"),
        ("metamathqa", None, "train"),
        ("meta-math/MetaMathQA", None, "train"),
        ("ours/other", None, "test"),
        ("gsm8k", "dev", "dev"),
    ],
)
def test_the_split_that_a_set_is_read_from(name, asked, split):
    assert split_of(name, asked) == split


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match=r"no known data set 'metamatqa' \(did you mean 'metamathqa'\?\)"):
        load_examples("metamatqa")
    with pytest.raises(UserError, match=r"holds none of .* metamathqa\.jsonl .* download meta-math/MetaMathQA"):
        load_examples("metamathqa", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data_dir .*nowhere is not a folder"):
        load_examples("metamathqa", data_dir=str(tmp_path / "nowhere"))


def test_table_in_the_docs():
    rows = rows_of_the_docs()
    for name, spec in TRAINING_SETS.items():
        assert all(f"`{part}`" in rows[name] for part in (spec.hub_id, spec.source, spec.data_files) if part)
        assert all(f"`{column}`" in rows[name] for columns in spec.formats for column in columns)
