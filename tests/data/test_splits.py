"""Splits by hand: shares, prompts, messages, and what a seed decides."""

import hashlib
import json

import pytest

from maskft.data.arguments import DataArguments
from maskft.data.splits import SplitReport, _shares, clusters_of, load_splits, prompt_digest
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    for name, count in (("small", 40), ("large", 60), ("other", 30)):
        rows = [{"id": f"{name} {n}", "prompt": f"{name} {n}?", "completion": f"{n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def split(folder, name, seed=0, **options):
    return load_splits(DataArguments(dataset_name=name, data_dir=str(folder), **options), seed, tiny_tokenizer())


def ids(rows):
    return rows["id"][:]


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (10, [50, 50], [5, 5]),
        (10, [34, 33, 33], [4, 3, 3]),
        (5, [10, 30, 10], [1, 3, 1]),
        (2, [1, 1000], [1, 2]),  # at least one of each
        (7, [50, 50], [4, 3]),
    ],
)
def test_shares_of_a_count(count, sizes, shares):
    assert _shares(count, sizes) == shares


def test_the_largest_remainders_are_rounded_up():
    # Exact: 1.2, 3.7, 5.1. One is left after rounding down, and 3.7 takes it.
    assert _shares(10, [12, 37, 51]) == [1, 4, 5]
    # Exact: 2.6, 1.7, 5.7. Two are left, and the remainders of 0.7 take them.
    assert _shares(10, [26, 17, 57]) == [2, 2, 6]


def test_the_report_in_words():
    assert str(SplitReport(1234, 0, 1000, 234, {"a": 1234})) == "read 1,234 rows: 1,000 to train on, 234 held out"
    assert str(SplitReport(12, 2, 7, 3, {"a": 4, "b": 8})) == (
        "read 12 rows (4 of a, 8 of b): 7 to train on, 3 held out; "
        "2 left out of training because their prompt is held out"
    )


@pytest.mark.parametrize("as_chat", [True, False])
def test_empty_answers_are_counted(as_chat, tmp_path):
    """A blank cell of a CSV file taught to say nothing, without a word; null in JSON is an error."""
    heldout = tmp_path / "heldout.jsonl"
    for columns in (("prompt", "completion"), ("question", "answer")):
        lines = [f"{n}+1=,{cell}" for n, cell in enumerate(["7", "", "  ", "8", '""'])]
        (tmp_path / "sums.csv").write_text("\n".join([",".join(columns), *lines]))
        heldout.write_text(json.dumps(dict.fromkeys(columns, "other")))
        args = DataArguments(dataset_name=str(tmp_path / "sums.csv"), eval_dataset_name=str(heldout), as_chat=as_chat)
        report = load_splits(args, 0, tiny_tokenizer()).report
        assert (report.train, report.empty) == (5, 3)
        assert str(report).endswith("; 3 to train on have an empty answer, and teach to say nothing")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    args = DataArguments(dataset_name=str(tmp_path / "text.jsonl"), eval_split_size=1)
    assert load_splits(args, 0, tiny_tokenizer()).report.empty == 0


def test_a_prompt_is_its_words_before_the_first_answer():
    def expected(text):
        return hashlib.sha256(text.encode()).hexdigest()

    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one  two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    ]
    assert prompt_digest({"messages": messages}) == expected("one two three")
    assert prompt_digest({"prompt": messages[:3]}) == expected("one two three")
    assert prompt_digest({"prompt": " one\ntwo ", "completion": "x"}) == expected("one two")
    assert prompt_digest({"text": "once  upon"}) == expected("once upon")


def test_rows_without_words_before_the_answer_are_prompts_of_their_own(tmp_path):
    """All conversations that the assistant begins were one prompt: held out as a whole, or trained as a whole."""
    (tmp_path / "greetings.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "assistant", "content": f"{n}"}, {"role": "user", "content": "?"}]})
            for n in range(20)
        )
    )
    (tmp_path / "free.jsonl").write_text("\n".join(json.dumps({"prompt": "", "completion": f"{n}"}) for n in range(20)))
    for name in ("greetings", "free"):
        found = split(tmp_path, name, eval_split_size=5)
        assert (len(found.train), len(found.heldout)) == (15, 5)
        assert clusters_of(found.heldout) == [None] * 5

    def begun(role):
        return {"messages": [{"role": "assistant", "content": "a"}, {"role": role, "content": "b"}]}

    assert prompt_digest(begun("user")) != prompt_digest(begun("assistant"))


def test_rows_of_one_prompt_are_a_cluster():
    rows = [{"id": str(n), "prompt": prompt, "completion": "x"} for n, prompt in enumerate(("a", "b", " a", "c"))]
    assert clusters_of(rows) == ["0", "1", "0", "3"]
    assert clusters_of(rows[:2]) == [None, None]
    # Such as rows with an empty prompt: one cluster could not be compared at all.
    assert clusters_of([rows[0], rows[2]]) == [None, None]
    assert clusters_of([row | {"cluster_id": "p"} for row in rows]) == ["p"] * 4
    assert clusters_of([{"id": "0", "text": "a"}, {"id": "1", "text": "a"}, {"id": "2", "text": "b"}]) == [
        "0",
        "0",
        "2",
    ]


def test_a_size_of_one_is_one_row_and_less_is_a_fraction(folder):
    assert len(split(folder, "small", eval_split_size=1).heldout) == 1
    assert len(split(folder, "small", eval_split_size=0.9).heldout) == 36
    assert len(split(folder, "small", eval_split_size=0.001).heldout) == 1
    assert len(split(folder, "small,large", eval_split_size=1).heldout) == 2, "at least one of each set"


def test_a_seed_decides_what_is_held_out_and_the_order(folder):
    first = split(folder, "small,large", eval_split_size=0.2)
    again = split(folder, "small,large", eval_split_size=0.2)
    other = split(folder, "small,large", eval_split_size=0.2, seed=1)
    for part in ("train", "heldout"):
        assert ids(getattr(first, part)) == ids(getattr(again, part)), part
        assert sorted(ids(getattr(first, part))) != sorted(ids(getattr(other, part))), part
        assert ids(getattr(first, part)) != sorted(ids(getattr(first, part))), "shuffled"


def test_a_seed_decides_the_rows_of_a_mixture_beside_held_out_data(folder):
    common = {"eval_dataset_name": "other:10"}
    first = split(folder, "small:20,large:20", **common)
    again = split(folder, "small:20,large:20", **common)
    other = split(folder, "small:20,large:20", seed=1, **common)
    assert ids(first.train) == ids(again.train) and ids(first.heldout) == ids(again.heldout)
    assert sorted(ids(first.train)) != sorted(ids(other.train))
    assert sorted(ids(first.heldout)) != sorted(ids(other.heldout))
    assert first.report == SplitReport(50, 0, 40, 10, {"small": 20, "large": 20})


def test_a_fraction_is_never_trained_on_however_few_rows_are_taken(folder):
    """One recipe takes all rows of a set, another few: none trains on what the other holds out."""
    whole = split(folder, "large", eval_split_size=0.2)
    part = split(folder, "large:10", eval_split_size=0.2)
    assert len(part.train) == 8 and len(part.heldout) == 2
    assert set(ids(part.heldout)) <= set(ids(whole.heldout))
    assert not set(ids(part.train)) & set(ids(whole.heldout))
    other = split(folder, "large:10", eval_split_size=0.2, seed=1)
    assert set(ids(part.train)) != set(ids(other.train))


def test_other_rows_of_a_reserved_prompt_are_not_trained_on(tmp_path):
    """Each prompt stands twice; a mixture that takes few rows may reserve one of them, and must not draw the other."""
    rows = [{"id": str(n), "prompt": f"{n // 2}?", "completion": "x"} for n in range(40)]
    (tmp_path / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = split(tmp_path, "twice", eval_split_size=0.5)
    held_prompts = {prompt_digest(row) for row in whole.heldout}
    part = split(tmp_path, "twice:8", eval_split_size=0.5)
    trained = {prompt_digest(row) for row in part.train}
    assert len(part.train) == 4 and not trained & held_prompts


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {}, "dataset_name is missing; give a data file or a hub name"),
        (
            "small",
            {"dataset_eval_split": "test"},
            "dataset_eval_split is 'test', but FILE has no splits; name the held-out data with eval_dataset_name, or "
            "hold out a part with eval_split_size",
        ),
        (
            "small",
            {"eval_dataset_name": "small"},
            "all 40 training rows of small have a prompt that is also held out; give other held-out data, or a smaller "
            "eval_split_size",
        ),
        (
            "small",
            {"eval_dataset_name": "other", "eval_split_size": 0.2},
            "eval_split_size is 0.2, and eval_dataset_name 'other' names other held-out rows: remove one of the two",
        ),
        (
            "small",
            {"eval_split_size": 40},
            "eval_split_size 40 holds out 40 of the 40 rows of small, which leaves none to train on; make it smaller",
        ),
        (
            "small",
            {"dataset_config": "main"},
            "dataset_config is 'main', but there is none to choose for FILE; leave it out",
        ),
        (
            "small",
            {"dataset_train_split": "validation"},
            "dataset_train_split is 'validation', but a file has no splits: FILE; leave it out, and name the file of "
            "the rows that are meant",
        ),
    ],
)
def test_messages_in_full(name, options, message, folder):
    # "small" may be a hub data set that is looked for in data_dir; a path is a file.
    if "FILE" in message:
        name = str(folder / "small.jsonl")
        message = message.replace("FILE", name)
    with pytest.raises(UserError) as error:
        split(folder, name, **options)
    assert str(error.value) == message
