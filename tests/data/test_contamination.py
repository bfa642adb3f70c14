"""Copies, and n-grams shared with test sets: against a naive search, and by hand."""

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft.data import load_splits
from maskft.data.arguments import DataArguments
from maskft.data.contamination import NGRAM, NgramIndex, load_test_texts, unique_rows, words
from maskft_base.errors import UserError

THIRTEEN = "a b c d e f g h i j k l m".split()


def naive_search(items, row):
    """Which items share NGRAM words in a row (or all words, if fewer) with a row, by comparing every window."""
    found = set()
    for index, item in enumerate(items):
        item = words(item)
        length = min(NGRAM, len(item))
        if length < 8:
            continue
        grams = {tuple(item[n : n + length]) for n in range(len(item) - length + 1)}
        for text in row:
            text = words(text)
            if grams & {tuple(text[n : n + length]) for n in range(len(text) - length + 1)}:
                found.add(index)
    return found


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (["x " + " ".join(THIRTEEN) + " y"], True),
        (["A, B. c-d E f (g) h i J k: l m!"], True),  # case and punctuation do not matter
        ([" ".join(THIRTEEN[:12])], False),
        ([" ".join(THIRTEEN[:6]) + " x " + " ".join(THIRTEEN[6:])], False),
        ([" ".join(THIRTEEN[:6]), " ".join(THIRTEEN[6:])], False),  # not from one message into the next
    ],
)
def test_thirteen_words_by_hand(row, found):
    report, rows = NgramIndex({"test": [" ".join(THIRTEEN)]}).search([["unrelated"], row])
    assert rows == ([1] if found else [])
    assert (report["test"].num_rows, report["test"].num_items_found) == (int(found), int(found))


def test_short_items():
    index = NgramIndex({"test": [" ".join(THIRTEEN[:8]), " ".join(THIRTEEN[:7])]})
    report, rows = index.search([[" ".join(THIRTEEN[:8])], [" ".join(THIRTEEN[:7])]])
    assert rows == [0]
    assert (report["test"].num_items, report["test"].num_too_short, report["test"].num_items_found) == (2, 1, 1)


TEXT = st.lists(st.sampled_from("abc"), min_size=5, max_size=30).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(items=st.lists(TEXT, min_size=1, max_size=4), rows=st.lists(st.lists(TEXT, max_size=3), max_size=5))
def test_against_a_naive_search(items, rows):
    report, found = NgramIndex({"test": items}).search(rows)
    expected = [naive_search(items, row) for row in rows]
    assert found == [index for index, hits in enumerate(expected) if hits]
    assert report["test"].num_items_found == len(set().union(*expected))


def test_copies():
    rows = [("a b", "c"), ("a  b\n", "c"), ("a b", "d"), ("A b", "c"), ("ab", "c"), ("ﬁt", "c"), ("fit", "c")]
    examples = Dataset.from_list([{"id": str(n), "prompt": p, "completion": c} for n, (p, c) in enumerate(rows)])
    assert unique_rows(examples) == [0, 2, 3, 4, 5]


@pytest.fixture
def folder(tmp_path):
    question = "How many of the {} green bottles are still standing on the wall at noon today?"
    train = [{"question": question.format(n), "answer": f"#### {n}"} for n in range(20)]
    train += [train[3], {"question": train[4]["question"].replace(" ", "  "), "answer": "#### 4"}]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, train)))
    test = [{"question": f"{question.format(7)} Say a number.", "answer": "#### 7"}]
    test += [{"question": "Entirely different words stand in this other question about nothing", "answer": "#### 1"}]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, test)))
    held = [{"question": "held out?", "answer": "#### 1"}]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    return tmp_path


def splits(folder, **kwargs):
    held = str(folder / "held.jsonl")
    return load_splits(DataArguments(dataset_name="gsm8k", data_dir=str(folder), eval_dataset_name=held, **kwargs), 0)


def test_report_and_removal(folder):
    plain = splits(folder)
    assert len(plain.train) == 22 and plain.report.dropped_duplicates is None
    checked = splits(folder, deduplicate=True, contamination_sets="gsm8k_test")
    assert (len(checked.train), checked.report.dropped_duplicates, checked.report.dropped_contaminated) == (20, 2, 0)
    found = checked.report.contamination["gsm8k_test"]
    # "green bottles ... noon today": the words after the number alone are 11, so only item 7's own row shares 13.
    assert (found.num_items, found.num_items_found, found.num_rows) == (2, 1, 1)
    assert "2 as copies of others; 1 share 13 words in a row with 1 of the 2 items of gsm8k_test" in str(checked.report)
    dropped = splits(folder, contamination_sets="gsm8k_test", drop_contaminated=True)
    assert len(dropped.train) == 21 and "7" not in dropped.train["answer"][:]
    record = json.loads(json.dumps(dropped.report.to_dict()))
    assert record["contamination"]["gsm8k_test"]["num_rows"] == record["dropped_contaminated"] == 1
    assert record["taken"] == {"gsm8k": 22} and record["num_published"] == {"gsm8k": None}


def test_columns_of_test_sets(tmp_path):
    for name, row in (
        ("HumanEval.jsonl", {"task_id": "x", "prompt": "def f():"}),
        ("MATH.jsonl", {"problem": "1 + 1", "solution": "2"}),
        ("ifeval_prompts.jsonl", {"key": 1, "prompt": "Write"}),
    ):
        (tmp_path / name).write_text(json.dumps(row))
    assert load_test_texts("humaneval, math_test,ifeval", str(tmp_path)) == {
        "humaneval": ["def f():"],
        "math_test": ["1 + 1"],
        "ifeval": ["Write"],
    }
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "why?"}')
    assert load_test_texts(str(own), None) == {str(own): ["why?"]}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"contamination_sets": "gsm8k_tes"}, r"no test set 'gsm8k_tes' \(did you mean 'gsm8k_test'\?\)"),
        ({"contamination_sets": "math_test"}, r"holds no file of the test set math_test; add one of math_test\.jsonl"),
        ({"drop_contaminated": True}, r"drop_contaminated needs contamination_sets"),
    ],
)
def test_mistakes(folder, kwargs, message):
    with pytest.raises(UserError, match=message):
        splits(folder, **kwargs)


def test_changed_columns_of_a_test_set(folder):
    (folder / "gsm8k_test.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"gsm8k_test: line 1: expected the column question, found 'text'"):
        splits(folder, contamination_sets="gsm8k_test")
