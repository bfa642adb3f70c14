"""Mixtures: amounts, seeds, and what is held out of them."""

import json
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from maskft.data.arguments import DataArguments
from maskft.data.mixtures import load_examples, parse_mixture, rename_sets
from maskft.data.splits import load_splits
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer

SAMPLES = str(Path(__file__).parent / "samples")


@pytest.fixture
def sets(tmp_path):
    for name, count in (("small", 40), ("large", 100)):
        rows = [{"question": f"{name} {n}?", "answer": f"#### {n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.jsonl").write_text('{"text": "once"}\n' * 20)
    return str(tmp_path)


def splits(sets, name, seed=0, **kwargs):
    return load_splits(DataArguments(dataset_name=name, data_dir=sets, **kwargs), seed, tiny_tokenizer())


def questions(examples):
    column = "messages" if "messages" in examples.column_names else "prompt"
    return {example[column][0]["content"] for example in examples}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", [("a", None)]),
        ("a:5", [("a", 5)]),
        ("a:40_000, b:0.5 ,org/c", [("a", 40_000), ("b", 0.5), ("org/c", None)]),
        ("a:1,b:1.0", [("a", 1), ("b", 1.0)]),
    ],
)
def test_parse(text, parts):
    found = [(part.name, part.amount) for part in parse_mixture(text)]
    assert found == parts
    assert [type(amount) for _, amount in found] == [type(amount) for _, amount in parts]


def test_a_file_is_not_a_mixture(tmp_path):
    path = tmp_path / "a,b:3.jsonl"
    path.write_text('{"text": "once"}')
    assert [part.name for part in parse_mixture(str(path))] == [str(path)]


def test_counts_and_fractions(sets):
    result = splits(sets, "small:0.5,large:30", eval_split_size=0.1)
    assert result.report.taken == {"small": 20, "large": 30}
    assert (result.report.read, len(result.train), len(result.heldout)) == (50, 45, 5)
    train, heldout = questions(result.train), questions(result.heldout)
    assert (len(train), len(heldout), len(train & heldout)) == (45, 5, 0)
    assert sum(question.startswith("small") for question in train) == 18
    assert sum(question.startswith("small") for question in heldout) == 2
    assert "20 of small, 30 of large" in str(result.report)
    assert result.train.column_names == ["id", "messages", "answer", "answer_type"]


def test_seed_chooses_rows_and_order(sets):
    one, again, two = (splits(sets, "small:20,large:30", seed).train.to_list() for seed in (1, 1, 2))
    assert one == again
    assert {row["id"] for row in one} != {row["id"] for row in two}
    from_first_set = [row["messages"][0]["content"].startswith("small") for row in one]
    assert from_first_set != sorted(from_first_set, reverse=True)  # shuffled: a cap takes of both sets


def test_more_rows_contain_fewer_rows(sets):
    few, more, all_rows = (splits(sets, name) for name in ("large:20", "large:50", "large"))
    assert questions(few.train) < questions(more.train) < questions(all_rows.train)
    assert questions(few.heldout) < questions(more.heldout) < questions(all_rows.heldout)


def test_what_one_recipe_holds_out_no_other_trains_on(sets):
    alone, mixed = splits(sets, "large"), splits(sets, "small,large:20")
    assert questions(mixed.heldout) - {q for q in questions(mixed.heldout) if q.startswith("small")} < questions(
        alone.heldout
    )
    assert not questions(mixed.train) & questions(alone.heldout)


def test_count_of_held_out_rows_is_shared(sets):
    result = splits(sets, "small:20,large:60", eval_split_size=8)
    assert sum(question.startswith("small") for question in questions(result.heldout)) == 2
    assert (len(result.heldout), len(result.train)) == (8, 72)


def test_a_mixture_may_be_longer_than_a_file_name(sets):
    names = ",".join(f"set{n}:100" for n in range(60))
    assert len(names) > 255 and len(parse_mixture(names)) == 60
    assert rename_sets("a:3,b:0.5,c", str.upper) == "A:3,B:0.5,C"


def test_a_configuration_needs_a_set_that_takes_one(sets):
    """Registered sets of a mixture keep their own, so that the option would be ignored."""
    with pytest.raises(UserError, match="there is none to choose for gsm8k, metamathqa; leave it out"):
        splits(sets, "gsm8k,metamathqa", dataset_config="socratic")
    with pytest.raises(UserError, match="there is none to choose for metamathqa; leave it out"):
        splits(sets, "metamathqa", dataset_config="main")
    # A set of the hub may have it; here its rows are in data_dir.
    assert len(splits(sets, "small", dataset_config="main").train) == 36


def test_a_row_that_two_sets_hold_out_is_counted_once(tmp_path):
    """A result has one value for an id: the evaluation refused such rows after training."""
    row = {"question": "same?", "answer": "#### 1"}
    for name in ("one", "two"):
        rows = [row, *({"question": f"{name} {n}?", "answer": "#### 2"} for n in range(5))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = splits(str(tmp_path), "one,two", eval_split_size=10)
    assert (len(result.heldout), len(set(result.heldout["id"])), result.report.repeated) == (9, 9, 1)
    assert str(result.report).endswith("9 held out; 1 that two sets hold out are counted once")


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (["user", "assistant", "user"], ["assistant"], "'prompt' holds an answer of the assistant"),
        (["user"], ["assistant", "user", "assistant"], "'completion' holds a message that is not the assistant's"),
    ],
)
def test_a_prompt_with_an_answer_is_not_trained_on_in_a_mixture(prompt, completion, message, sets):
    """Alone it is trained on the completion; as a conversation each turn of the assistant would count."""
    row = {
        "prompt": [{"role": role, "content": "words"} for role in prompt],
        "completion": [{"role": role, "content": "words"} for role in completion],
    }
    # Rows of other prompts, so that some can be held out.
    rows = [row | {"prompt": [{"role": "user", "content": f"{n}"}, *row["prompt"]]} for n in range(9)]
    (Path(sets) / "turns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(splits(sets, "turns").train) == 8
    with pytest.raises(UserError, match=f"turns: .*line 1: {message}"):
        splits(sets, "small,turns")


def test_mapping_of_a_recipe():
    assert DataArguments(dataset_name={"metamathqa": 40000, "gsm8k": None}).dataset_name == "metamathqa:40000,gsm8k"
    in_lines = [{"metamathqa": 40000}, {"gsm8k": 0.5}, "own.jsonl"]
    assert DataArguments(dataset_name=in_lines).dataset_name == "metamathqa:40000,gsm8k:0.5,own.jsonl"
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(["--dataset_name", "a:1,b:0.5"])
    assert args.dataset_name == "a:1,b:0.5"


def test_registered_sets_of_three_formats():
    name = "metamathqa:5,oasst_guanaco:0.5,open_orca"
    examples = load_examples(name, data_dir=SAMPLES)
    assert len(examples) == 20 and examples.column_names == ["id", "messages"]
    assert load_examples("gsm8k:3,metamathqa:2", data_dir=SAMPLES)["answer"][:].count("17") == 3


def test_a_file_name_is_looked_for_in_data_dir(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.jsonl").write_text('{"text": "in the folder"}\n')
    assert load_examples("own.jsonl", data_dir=str(folder))["text"] == ["in the folder"]
    # A file of the current folder comes first, as without data_dir.
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text('{"text": "here"}\n')
    assert load_examples("own.jsonl", data_dir=str(folder))["text"] == ["here"]
    with pytest.raises(UserError, match=r"data file .*data/missing\.jsonl does not exist"):
        load_examples("missing.jsonl", data_dir=str(folder))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("small:41", {}, r"the mixture asks for 41 rows of small, which has 40; ask for fewer"),
        ("small:1.5", {}, r"'small:1\.5': give a whole number of rows, at least 1, or a fraction in \(0, 1\]"),
        ("small:0", {}, r"'small:0': give a whole number"),
        ("small:40k", {}, r"'40k' is neither a number of rows \(40000\) nor a fraction"),
        ("small:1,small:2", {}, r"the mixture names small twice"),
        ("small:1,,large:1", {}, r"has an empty entry"),
        ("small,text", {}, r"must be all messages or all plain text, not messages, text"),
        ("small:20,large:20", {"eval_split_size": 50}, r"eval_split_size 50 holds out 25 of the 20 rows of small"),
    ],
)
def test_mistakes_are_one_line(sets, name, kwargs, message):
    with pytest.raises(UserError, match=message) as caught:
        splits(sets, name, **kwargs)
    assert "\n" not in str(caught.value)
