"""Data: every format, split and span by hand, and every mistake in the input as one clear line."""

import gzip
import json
import logging
import os
import signal

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from maskft.data import formats
from maskft.data.arguments import DataArguments
from maskft.data.mixtures import load_examples
from maskft.data.splits import load_splits
from maskft.data.tokenizing import (
    IGNORED,
    completion_of,
    end_of_turn,
    format_sample,
    prompt_ids,
    supervised_token_count,
    tokenize_dataset,
    tokenize_example,
)
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BASE_TOKENIZER = tiny_tokenizer(chat_template=False)
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}

# Writes an empty thought before the last turn only, as Qwen 3 does, and an end of text after it, as Phi 3 does.
LAST_TURN_DIFFERS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% if loop.last and not add_generation_prompt %}<pad>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


def numbered(count):
    return [{"prompt": f"say {n}", "completion": f" {n}", "answer": n} for n in range(count)]


def supervised_stretches(tokenized):
    """The texts between [[ and ]], without format_sample: runs of equal input_ids and labels."""
    stretches, run = [], []
    for token, label in [*zip(tokenized["input_ids"], tokenized["labels"], strict=True), (None, IGNORED)]:
        assert label in (token, IGNORED)
        if label != IGNORED:
            run.append(label)
        elif run:
            stretches.append(TOKENIZER.decode(run))
            run = []
    return stretches


# Formats -------------------------------------------------------------------------------------------------------------

CHAT_PAIR = {"prompt": [USER], "completion": [ASSISTANT]}


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": [USER, ASSISTANT | {"tool_calls": None, "id": 7}], "tools": []}, {"messages": [USER, ASSISTANT]}),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            {"messages": [USER, ASSISTANT]},
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        (CHAT_PAIR, CHAT_PAIR),
        (
            {"prompt": "a", "completion": "b", "answer": 3},
            {"prompt": "a", "completion": "b", "answer": "3", "answer_type": "number"},
        ),
        (
            {"prompt": "a", "completion": "b", "answer": "12", "answer_type": "exact"},
            {"prompt": "a", "completion": "b", "answer": "12", "answer_type": "exact"},
        ),
        ({"question": "2 + 2?", "answer": "4"}, CHAT_PAIR | {"answer": "4", "answer_type": "number"}),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, CHAT_PAIR),
        (
            {"instruction": "Translate.", "input": "chat", "output": "cat"},
            {
                "prompt": [{"role": "user", "content": "Translate.\n\nchat"}],
                "completion": [{"role": "assistant", "content": "cat"}],
            },
        ),
        ({"text": "once", "url": 3}, {"text": "once"}),
    ],
    ids=lambda value: "+".join(value),
)
def test_formats(write, row, example):
    (read,) = load_examples(write([row]))
    assert len(read.pop("id")) == 16
    assert read == example


def test_a_format_is_one_entry(write, monkeypatch):
    """As docs/architecture.md tells: columns, and a function from a row to an example."""
    toy = {("ask", "reply"): lambda row, as_chat, *columns: {"prompt": row["ask"], "completion": row["reply"]}}
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS | toy)
    (read,) = load_examples(write([{"ask": "1+1=", "reply": "2"}]))
    assert (read["prompt"], read["completion"]) == ("1+1=", "2")


@pytest.mark.parametrize(
    ("answer", "reference", "answer_type"),
    [
        ("2 + 2 = 4\n#### 4", "4", "number"),
        ("so\n#### 1,234", "1234", "number"),
        ("so\n#### -3.50", "-3.50", "number"),
        ("so\n#### x + 1", "x + 1", "exact"),
        ("12", "12", "number"),
        ("because", None, None),
    ],
)
def test_reference_of_question_and_answer(write, answer, reference, answer_type):
    (example,) = load_examples(write([{"question": "q", "answer": answer}]))
    assert (example.get("answer"), example.get("answer_type")) == (reference, answer_type)
    assert example["completion"] == [{"role": "assistant", "content": answer}]


def test_question_and_answer_as_plain_text(write):
    path = write([{"question": "2 + 2?", "answer": "#### 4"}])
    for kwargs in ({"as_chat": False}, {"tokenizer": BASE_TOKENIZER}):
        (example,) = load_examples(path, **kwargs)
        assert (example["prompt"], example["completion"]) == ("Question: 2 + 2?\nAnswer:", " #### 4")
    (example,) = load_examples(path, tokenizer=TOKENIZER)
    assert example["prompt"] == [USER]


def test_rows_without_an_answer_may_come_first(write):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "c", "completion": "d", "answer": "d"}]
    examples = load_examples(write(rows))
    assert examples["answer"][:] == [None, None, None, "d"]


def test_rows_may_carry_the_cluster_they_are_of(write):
    rows = [{"prompt": "a", "completion": "b", "cluster_id": 7}, {"prompt": "c", "completion": "d", "cluster_id": "p"}]
    assert load_examples(write(rows))["cluster_id"][:] == ["7", "p"]
    assert "cluster_id" not in load_examples(write([{"prompt": "a", "completion": "b"}])).column_names


def test_every_file_kind_gives_the_same_examples(tmp_path, write):
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": "é\u2028"}]}]
    lines = write(rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(open(lines, "rb").read()))
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\ufeff\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = load_examples(lines).to_list()
    for name in ("rows.jsonl.gz", "array.json", "lines.json", "rows.parquet"):
        assert load_examples(str(tmp_path / name)).to_list() == expected, name
    (tmp_path / "rows.csv").write_text('\ufeffprompt,completion\n"a, ""b""",1\n"two\nlines",007\n')
    pairs = [{"prompt": 'a, "b"', "completion": "1"}, {"prompt": "two\nlines", "completion": "007"}]
    assert load_examples(str(tmp_path / "rows.csv")).to_list() == load_examples(write(pairs)).to_list()


def test_ids_name_the_content(write):
    first, twin, other = load_examples(write([{"text": "a"}, {"text": "a"}, {"text": "b"}]))["id"]
    assert twin == f"{first}#2"
    assert other not in (first, twin)
    assert load_examples(write([{"text": "b", "url": 1}]))["id"][0] == other


def test_a_list_of_names_is_a_mixture():
    args = DataArguments(dataset_name=["a.jsonl", "b.jsonl"], eval_dataset_name={"c.jsonl": 3})
    assert (args.dataset_name, args.eval_dataset_name) == ("a.jsonl,b.jsonl", "c.jsonl:3")


def test_text_column_can_be_named(write):
    path = write([{"body": "once"}])
    (example,) = load_examples(path, text_field="body")
    assert example["text"] == "once"
    assert supervised_stretches(tokenize_example(example, TOKENIZER)) == ["nce<|im_end|>"]


# Splits --------------------------------------------------------------------------------------------------------------


def splits(name, seed=0, **kwargs):
    return load_splits(DataArguments(dataset_name=name, **kwargs), seed, TOKENIZER)


def test_held_out_part(write):
    train, heldout, report = splits(write(numbered(40)), eval_split_size=0.25)
    assert (report.read, report.dropped_overlap, report.train, report.heldout) == (40, 0, len(train), len(heldout))
    assert (len(train), len(heldout)) == (30, 10)
    assert not set(train["prompt"]) & set(heldout["prompt"])
    assert len(splits(write(numbered(40)), eval_split_size=7).heldout) == 7
    assert len(splits(write(numbered(3)), eval_split_size=0.1).heldout) == 1


def test_held_out_part_depends_on_seed_and_content_only(write):
    path, backwards = write(numbered(40)), write(numbered(40)[::-1], "backwards.jsonl")
    prompts = set(splits(path).heldout["prompt"])
    assert set(splits(path).heldout["prompt"]) == prompts
    assert set(splits(backwards).heldout["prompt"]) == prompts
    assert set(splits(path, seed=1).heldout["prompt"]) != prompts


def test_held_out_rows_come_before_the_caps(write):
    path = write(numbered(40))
    full, capped = splits(path), splits(path, max_train_samples=5, max_eval_samples=2)
    assert capped.train.to_list() == full.train.to_list()[:5]
    assert capped.heldout.to_list() == full.heldout.to_list()[:2]
    assert (capped.report.train, capped.report.heldout) == (5, 2)


def test_overlap_leaves_training(write):
    system = {"role": "system", "content": "Be brief."}
    train = write(
        [
            {"messages": [USER, {**ASSISTANT, "content": "four"}]},  # the held-out question, another answer
            {"messages": [system, {**USER, "content": "2  +\n2?"}, ASSISTANT]},  # other spacing, a system message
            {"messages": [{**USER, "content": "3 + 3?"}, ASSISTANT]},
        ]
    )
    heldout = write([{"question": "2 + 2?", "answer": "4"}], "heldout.jsonl")
    result = splits(train, eval_dataset_name=heldout)
    assert [row["messages"][0]["content"] for row in result.train] == ["3 + 3?"]
    assert len(result.heldout) == 1
    assert (result.report.read, result.report.dropped_overlap) == (4, 2)
    assert "2 left out of training" in str(result.report)


def test_text_overlap_leaves_training(write):
    heldout = write([{"text": "a"}], "heldout.jsonl")
    result = splits(write([{"text": "a"}, {"text": "b"}]), eval_dataset_name=heldout)
    assert result.train["text"][:] == ["b"]


def test_everything_overlaps(write):
    with pytest.raises(UserError, match=r"all 2 training rows .* prompt that is also held out"):
        splits(write(numbered(2)), eval_dataset_name=write(numbered(2), "heldout.jsonl"))


# Mistakes in the input -----------------------------------------------------------------------------------------------

GOOD_LINE = '{"prompt": "a", "completion": "b"}\n'
CUT_GZIP = gzip.compress(GOOD_LINE.encode() * 99, mtime=0)[:40]  # without the time, which would stand in a test's name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.jsonl", GOOD_LINE + "\n{'prompt': 1}\n", r"a\.jsonl is not JSON at line 3: .*column 2"),
        ("a.json", GOOD_LINE + "{", r"a\.json is not JSON at line 2"),
        ("a.jsonl", GOOD_LINE + GOOD_LINE + '{"text": \n' + GOOD_LINE, r"a\.jsonl is not JSON at line 3:"),
        ("a.jsonl", GOOD_LINE + '{"text": "a"\r\n', r"a\.jsonl is not JSON at line 2:"),
        ("a.jsonl", GOOD_LINE + "[1]\n", r"a\.jsonl: line 2: holds a list, not an object"),
        (
            "a.jsonl",
            '{"Prompt": "a", "reply": "b"}',
            r"line 1: no usable column among 'Prompt', 'reply'; .*messages \|",
        ),
        ("a.jsonl", GOOD_LINE + '{"prompt": "a"}', r"line 2: 'completion' is missing"),
        ("a.jsonl", GOOD_LINE + '{"prompt": 5, "completion": "b"}', r"line 2: 'prompt' holds 5, not text"),
        ("a.jsonl", GOOD_LINE + '{"prompt": null, "completion": "b"}', r"line 2: 'prompt' holds nothing, not text"),
        ("a.jsonl", '{"text": ["a"]}', r"line 1: 'text' holds a list, not text"),
        ("a.jsonl", GOOD_LINE + json.dumps(CHAT_PAIR), r"line 2: 'prompt' is text in some rows and messages in others"),
        ("a.jsonl", '{"messages": "hi"}', r"line 1: 'messages' holds text, not a list of messages"),
        ("a.jsonl", '{"messages": []}', r"line 1: 'messages' holds an empty list"),
        ("a.jsonl", '{"messages": ["hi"]}', r"line 1: message 1 of 'messages' is text, not an object"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}', r"role 'bot'; it must be one of .*assistant"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"a\.jsonl cannot be read at line 1: Exceeds the limit"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl cannot be read at line 1: maximum recursion depth"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}', r"has a list as content, not text"),
        ("a.jsonl", json.dumps({"messages": [USER | {"thinking": "so"}]}), r"message 1 .* has 'thinking', which"),
        ("a.jsonl", json.dumps(CHAT_PAIR | {"tools": [{}]}), r"line 1: 'tools' is not empty, .* into a system message"),
        ("a.jsonl", '{"text": "a", "answer": ["b"]}', r"line 1: 'answer' holds a list"),
        ("a.jsonl", '{"text": "a", "answer": "b", "answer_type": "near"}', r"'answer_type' is 'near'"),
        ("a.jsonl", b"\xff\xfe", r"a\.jsonl is not UTF-8"),
        (
            "a.jsonl",
            GOOD_LINE + r'{"prompt": "\ud83d", "completion": "b"}',
            r"line 2: '\\ud83d' is half a surrogate pair",
        ),
        (
            "a.jsonl",
            GOOD_LINE + r'{"prompt": "a", "completion": "b", "answer": "\ud83d"}',
            r"line 2: '\\ud83d' is half a surrogate pair",
        ),
        (
            "a.jsonl",
            r'{"instruction": "a", "input": "\ud83d", "output": "b"}',
            r"line 1: '\\ud83d' is half a surrogate pair",
        ),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read: .*gzip"),
        ("a.jsonl.gz", CUT_GZIP, r"a\.jsonl\.gz cannot be read: .*end-of-stream"),
        ("a.parquet", b"not parquet", r"a\.parquet cannot be read: .*[Pp]arquet"),
        ("a.tsv", "prompt\tcompletion\n", r"a\.tsv has an unsupported ending; convert it to \.jsonl"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv cannot be read: .*Expected 2 columns, got 3"),
        ("a.csv", 'prompt,completion\n"a,b\n', r"a\.csv cannot be read: .*"),
        ("a.csv", "", r"a\.csv cannot be read: Empty CSV file"),
        ("a.csv", "prompt;completion\na;b\n", r"one column, 'prompt;completion': separate columns by commas"),
        ("a.csv", "prompt\tcompletion\na\tb\n", r"one column, 'prompt\\tcompletion': separate columns by commas"),
        (
            "a.csv",
            "prompt,completion,completion\na,b,c\n",
            r"a\.csv has 2 columns named 'completion'; give each its own",
        ),
        (
            "a.json",
            '{\n "prompt": "a",\n "completion": "b"\n}\n',
            r"a\.json holds one object over several lines; write a",
        ),
        ("a.csv", "prompt,completion\né,b\n".encode("latin-1"), r"not UTF-8 text, in column 'prompt'; save it in"),
    ],
)
def test_file_mistakes_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        splits(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "completion", "completion"]),
            "has 2 columns named 'completion'",
        ),
        (
            pyarrow.table({"text": ["a"], "when": pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())}),
            r"a value that Python has no type for \(OverflowError: .*leave out its column",
        ),
        (
            pyarrow.table({"text": ["a"], "when": pyarrow.array([1], pyarrow.timestamp("us", tz="No/Where"))}),
            r"a value that Python has no type for \(.*No/Where.*leave out its column",
        ),
    ],
)
def test_columns_of_parquet_that_are_no_rows_are_one_line(tmp_path, table, message):
    """A row kept the last of two columns of one name; a date after 9999 ended in a traceback."""
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        load_examples(str(tmp_path / "a.parquet"))


def test_a_cell_longer_than_a_block_of_a_csv_file(tmp_path):
    """pyarrow reads a megabyte at a time by itself, and no row across two of these."""
    text = "word " * 800_000
    (tmp_path / "a.csv").write_text(f"prompt,completion,,\na,{text},,\nb,c,,\n")
    assert load_examples(str(tmp_path / "a.csv"))["completion"][:] == [text, "c"]


def test_optional_columns_without_a_value(write, tmp_path):
    """NaN was an answer and a cluster of its own, a blank cell one cluster of all such rows."""
    row = {"prompt": "a", "completion": "b"}
    [found] = load_examples(write([row | {"answer": float("nan"), "cluster_id": float("nan")}]))
    assert found == load_examples(write([row]))[0]
    (tmp_path / "a.csv").write_text("prompt,completion,cluster_id\na,b,\nc,d,p\n")
    assert load_examples(str(tmp_path / "a.csv"))["cluster_id"][:] == [None, "p"]
    (tmp_path / "b.csv").write_text("question,answer,answer_type\na,so #### 2,\nc,so #### 3,number\n")
    assert load_examples(str(tmp_path / "b.csv"))["answer"][:] == ["2", "so #### 3"]


def test_names_that_are_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/a\.jsonl does not exist$"):
        load_examples("nowhere/a.jsonl")
    with pytest.raises(UserError, match=r"~nobody-of-this-name/a\.jsonl does not exist$"):
        load_examples("~nobody-of-this-name/a.jsonl")
    with pytest.raises(UserError, match="is a folder; name one file in it"):
        load_examples(str(tmp_path))


def test_hub_name_without_network(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"'some/data' is not a local file, and the hub gave no split 'train'.*Couldn't reach"
    ):
        splits("some/data")


def test_hub_data_and_splits(monkeypatch):
    import datasets

    asked = []

    def from_hub(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(
            [{"question": f"{name} {split} 1 + {n}?", "answer": f"#### {n + 1}"} for n in range(3)]
        )

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    result = splits("openai/gsm8k", dataset_config="main", dataset_eval_split="test")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert (len(result.train), result.heldout["answer"][:]) == (3, ["1", "2", "3"])
    mixed = splits("gsm8k:2,ours/other:2", dataset_config="own", dataset_eval_split="test")
    sets = [("openai/gsm8k", "main"), ("ours/other", "own")]
    assert asked[2:] == [(*each, split) for split in ("train", "test") for each in sets]
    assert (len(mixed.train), len(mixed.heldout)) == (4, 6)
    splits("ours/other:2", dataset_config="own", eval_dataset_name="ours/other", dataset_eval_split="test")
    assert asked[-1] == ("ours/other", "own", "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_split_size": 10}, r"eval_split_size 10 holds out 10 of the 10 rows"),
        ({"eval_split_size": 11}, r"eval_split_size 11 holds out 11 of the 10 rows"),
        ({"eval_split_size": 0.99}, r"eval_split_size 0\.99 holds out 10 of the 10 rows"),
        ({"eval_split_size": 0}, r"eval_split_size is 0"),
        ({"eval_split_size": -1}, r"eval_split_size is -1"),
        ({"eval_split_size": 2.5}, r"eval_split_size is 2\.5"),
        ({"max_train_samples": 0}, r"max_train_samples is 0; it must be at least 1"),
        ({"max_eval_samples": -4}, r"max_eval_samples is -4"),
        ({"dataset_eval_split": "test"}, r"dataset_eval_split is 'test', but .* has no splits"),
    ],
)
def test_argument_mistakes(write, arguments, message):
    with pytest.raises(UserError, match=message):
        splits(write(numbered(10)), **arguments)


def test_dataset_name_is_missing(write):
    with pytest.raises(UserError, match="dataset_name is missing"):
        splits(None)
    with pytest.raises(UserError, match=r"rows\.jsonl has no splits"):
        splits(f"{write(numbered(10))}:0.5", dataset_eval_split="test")


# Tokens --------------------------------------------------------------------------------------------------------------


def test_plain_completion_by_hand():
    tokenized = tokenize_example({"prompt": "ab", "completion": "cd"}, TOKENIZER)
    a, b, c, d = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcd")
    assert tokenized == {"input_ids": [a, b, c, d, 2], "labels": [IGNORED, IGNORED, c, d, 2]}
    assert prompt_ids({"prompt": "ab", "completion": "cd"}, TOKENIZER) == [a, b]


def test_spaces_at_the_end_of_a_prompt_belong_to_the_completion():
    """A model asked after a space, where training had it joined to the answer, answered 1 % instead of 11 %."""
    spaced, joined = {"prompt": "1+1= ", "completion": "2"}, {"prompt": "1+1=", "completion": " 2"}
    assert tokenize_example(spaced, TOKENIZER) == tokenize_example(joined, TOKENIZER)
    assert supervised_stretches(tokenize_example(spaced, TOKENIZER)) == [" 2<|im_end|>"]
    assert prompt_ids(spaced, TOKENIZER) == prompt_ids(joined, TOKENIZER)
    assert TOKENIZER.decode(prompt_ids({"prompt": " "}, TOKENIZER)) == " "


def test_chat_completion_by_hand():
    tokenized = tokenize_example(CHAT_PAIR, TOKENIZER)
    text = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert TOKENIZER.decode(tokenized["input_ids"]) == text
    assert supervised_stretches(tokenized) == ["4<|im_end|>\n"]
    assert tokenize_example({"messages": [USER, ASSISTANT]}, TOKENIZER) == tokenized
    for example in (CHAT_PAIR, {"messages": [USER, ASSISTANT]}, {"messages": [USER]}):
        assert TOKENIZER.decode(prompt_ids(example, TOKENIZER)) == text[: text.index("4<")]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "4, in short"},
    {"role": "user", "content": "and the 3?"},
    {"role": "assistant", "content": "the three"},
]


def test_every_turn_of_a_conversation():
    tokenized = tokenize_example({"messages": CONVERSATION}, TOKENIZER)
    assert supervised_stretches(tokenized) == ["4, in short<|im_end|>\n", "the three<|im_end|>\n"]
    whole = TOKENIZER.apply_chat_template(CONVERSATION, tokenize=False)
    assert TOKENIZER.decode(tokenized["input_ids"]) == whole
    prompt = TOKENIZER.decode(prompt_ids({"messages": CONVERSATION}, TOKENIZER))
    assert prompt == whole.removesuffix("the three<|im_end|>\n")


def test_turns_of_a_template_that_writes_the_last_one_differently():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LAST_TURN_DIFFERS
    tokenized = tokenize_example({"messages": CONVERSATION}, tokenizer)
    last = "<think>\n\n</think>\n\nthe three<|im_end|>\n<pad>"
    assert supervised_stretches(tokenized) == ["4, in short<|im_end|>\n", last]


def test_the_token_that_ends_a_turn():
    tokenizer = tiny_tokenizer()
    im_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<pad>"  # as of a base model, whose texts end otherwise
    assert end_of_turn([USER], tokenizer) == im_end
    tokenizer.chat_template = LAST_TURN_DIFFERS
    assert end_of_turn([USER, ASSISTANT, USER], tokenizer) == im_end
    for mark in ("", "the", "<|unknown|>"):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} " + mark + "\n{% endfor %}"
        assert end_of_turn([USER], tokenizer) is None


def test_template_that_rewrites_earlier_turns():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}"
    with pytest.raises(UserError, match=r"rewrites an assistant turn .*'4, in short'; give .* prompt and completion"):
        tokenize_example({"messages": CONVERSATION}, tokenizer)


def test_turn_without_a_prompt_is_not_trained_on():
    assert supervised_stretches(tokenize_example({"messages": [ASSISTANT, USER]}, TOKENIZER)) == []


def test_text_is_trained_on_but_for_its_first_token():
    assert supervised_stretches(tokenize_example({"text": "once"}, TOKENIZER)) == ["nce<|im_end|>"]


def test_loss_on_everything():
    for example in (CHAT_PAIR, {"prompt": "ab", "completion": "cd"}, {"messages": CONVERSATION}):
        tokenized = tokenize_example(example, TOKENIZER, completion_only_loss=False)
        assert tokenized["labels"] == [IGNORED, *tokenized["input_ids"][1:]]


def test_end_of_sequence_is_not_doubled():
    tokenized = tokenize_example({"prompt": "a", "completion": "b<|im_end|>"}, TOKENIZER)
    assert tokenized["input_ids"].count(TOKENIZER.eos_token_id) == 1


def test_token_across_the_border_is_trained_on(caplog):
    example = {"prompt": "x=", "completion": "=y"}  # the vocabulary has "=="
    assert supervised_stretches(tokenize_example(example, TOKENIZER)) == ["==y<|im_end|>"]
    from datasets import Dataset

    with caplog.at_level(logging.WARNING):
        tokenize_dataset(Dataset.from_list([example]), TOKENIZER)
    assert "differ from '=' on" in caplog.text


def test_truncation_keeps_the_start():
    full = tokenize_example(CHAT_PAIR, TOKENIZER)
    cut = tokenize_example(CHAT_PAIR, TOKENIZER, max_length=7)
    assert cut == {key: values[:7] for key, values in full.items()}


PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1)


@settings(deadline=None)
# "?": the first token, which never has a label, must not be the one that spans the border.
@given(prompt=PRINTABLE.map("?".__add__), completion=PRINTABLE)
def test_what_is_trained_on_is_the_completion(prompt, completion):
    """Up to a token that spans the border, of which the vocabulary has a few."""
    plain = tokenize_example({"prompt": prompt, "completion": completion}, TOKENIZER)
    assert TOKENIZER.decode(plain["input_ids"]) == prompt + completion + "<|im_end|>"
    labels = [label for label in plain["labels"] if label != IGNORED]
    expected = prompt[len(prompt.rstrip(" ")) :] + completion + "<|im_end|>"
    alone = prompt_ids({"prompt": prompt}, TOKENIZER)
    if plain["input_ids"][: len(alone)] == alone:
        assert TOKENIZER.decode(labels) == expected
    else:
        assert TOKENIZER.decode(labels).endswith(expected)

    pair = {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }
    chat = tokenize_example(pair, TOKENIZER)
    assert TOKENIZER.decode([label for label in chat["labels"] if label != IGNORED]) == completion + "<|im_end|>\n"


def test_tokenize_dataset(write, caplog):
    examples = load_examples(write([{"prompt": "a" * n, "completion": "b"} for n in (1, 9, 2)]))
    with caplog.at_level(logging.WARNING):
        tokenized = tokenize_dataset(examples, TOKENIZER, max_length=4)
    assert tokenized.column_names == ["id", "input_ids", "labels"]
    assert tokenized["id"][:] == [examples["id"][0], examples["id"][2]]
    assert "1 of 3 rows are left out: within max_length 4" in caplog.text
    assert supervised_token_count(tokenized) == 4  # b and the end, twice


def test_every_label_is_masked(write):
    for rows, max_length in (([{"prompt": "aaaa", "completion": "b"}], 3), ([{"messages": [USER]}], None)):
        with pytest.raises(UserError, match=rf"every label is masked in all 1 rows: with max_length {max_length}"):
            tokenize_dataset(load_examples(write(rows)), TOKENIZER, max_length=max_length)


def test_tokenizer_without_what_the_data_needs(write):
    examples = load_examples(write([{"messages": [USER, ASSISTANT]}]))
    with pytest.raises(UserError, match="messages but the tokenizer has no chat template"):
        tokenize_dataset(examples, BASE_TOKENIZER)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        tokenize_example({"text": "a"}, endless)
    with pytest.raises(UserError, match="plain text has no prompt"):
        prompt_ids({"text": "a"}, TOKENIZER)
    with pytest.raises(UserError, match="plain text has no prompt"):
        completion_of({"text": "a", "answer": "a"})
    with pytest.raises(UserError, match=r"begins '4' has no prompt to generate from: its last assistant turn comes"):
        prompt_ids({"messages": [ASSISTANT, USER]}, TOKENIZER)


def test_template_that_refuses_the_messages():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"refuses the messages that begin '2 \+ 2\?': roles must alternate"):
        tokenize_example(CHAT_PAIR, tokenizer)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ date_string }}", "26 Jul 2024"),  # as Llama 3.2's
        ('{%- set today = strftime_now("%d %B %Y") -%}{{ today }}', "26 July 2024"),  # as SmolLM3's
        ("{{ strftime_now( '%Y-%m-%d' ) }} {{ strftime_now('%b') }}", "2024-07-26 Jul"),
        ({"default": "{{ strftime_now('%Y') }}", "tool_use": "{{ strftime_now('%d') }}"}, "2024"),
    ],
)
def test_the_day_of_the_run_is_in_no_prompt(template, text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert tokenizer.decode(prompt_ids(CHAT_PAIR, tokenizer)) == text
    # The tokenizer keeps the template that is saved beside a model.
    assert tokenizer.chat_template == template


def test_format_sample():
    tokenized = tokenize_example({"prompt": "say\x1b[31m:", "completion": " hi"}, TOKENIZER)
    assert format_sample(tokenized, TOKENIZER) == "say\\x1b[31m:[[ hi<|im_end|>]]"
    long = tokenize_example({"prompt": "p" * 50, "completion": "c"}, TOKENIZER)
    assert format_sample(long, TOKENIZER, max_chars=20) == f"{'p' * 10} ... {'p' * 10}[[c<|im_end|>]]"


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_a_pipe_is_not_waited_for(ending, tmp_path):
    os.mkfifo(tmp_path / f"rows.{ending}")
    with pytest.raises(UserError, match="a pipe or a device, not a regular file"):
        load_examples(str(tmp_path / f"rows.{ending}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.5 s"),
        ("{{ range(10 ** 9) }}", "refuses the messages"),
        ("{{ 1 // 0 }}", "refuses the messages"),
        ("{{ messages[7].content + 1 }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
        ("{% if", "refuses the messages"),
    ],
)
def test_a_chat_template_that_does_not_end_or_fails_is_one_line(template, message, monkeypatch):
    monkeypatch.setattr("maskft.data.tokenizing._TEMPLATE_SECONDS", 0.5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        tokenize_example({"messages": [USER, ASSISTANT]}, tokenizer)
    assert "\n" not in str(error.value)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_report_names_what_was_left_out_only_where_it_was(write):
    report = load_splits(DataArguments(dataset_name=write(numbered(20)), eval_split_size=4), seed=0).report
    assert str(report) == "read 20 rows: 16 to train on, 4 held out"
