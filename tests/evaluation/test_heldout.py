"""Losses and answers of held-out rows: kept one by one, and bounded in memory."""

import json

import pytest

import tiny
from maskft.data.arguments import DataArguments
from maskft.loss import nll_per_item
from maskft_base.errors import UserError
from maskft_lab.evaluation import heldout as evaluate
from maskft_lab.evaluation.arguments import EvaluationArguments
from maskft_lab.evaluation.heldout import evaluate_rows, name_of_test_set
from maskft_lab.evaluation.journal import Journal, Resources
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [{"id": str(n), "prompt": f"{n}+1=", "completion": str(n + 1), "answer": str(n + 1)} for n in range(6)]
LOSSES = EvaluationArguments(no_generate=True)


def answers_of(max_new_tokens):
    return EvaluationArguments(max_new_tokens=max_new_tokens)


@pytest.fixture
def net():
    return tiny.tiny_llama(vocab_size=len(TOKENIZER), num_layers=1)


def test_items_keep_the_cluster_of_their_row(net):
    rows = [row | {"cluster_id": f"p{index // 2}"} for index, row in enumerate(ROWS)]
    record = evaluate_rows(net, TOKENIZER, rows, answers_of(4), Resources(2))
    assert [item["cluster_id"] for item in record["items"]] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    alone = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4), Resources(2))
    assert record["metrics"]["nll"]["value"] == alone["metrics"]["nll"]["value"]
    assert record["metrics"]["nll"]["stderr"] != alone["metrics"]["nll"]["stderr"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["heldout_loss", "answer"])
def test_a_run_that_ended_early_is_resumed(kind, net, tmp_path, monkeypatch):
    whole = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4), Resources(2))
    file = tmp_path / "answers.jsonl"
    journal = Journal(file, {})
    keep = journal.add_partial

    def killed(found, *rest):
        keep(found, *rest)
        if found == kind and len(journal.values) % len(ROWS) == 3:
            raise Killed

    monkeypatch.setattr(journal, "add_partial", killed)
    with pytest.raises(Killed):
        evaluate_rows(net, TOKENIZER, ROWS, answers_of(4), Resources(2, journal=journal))
    known = len(journal.values)
    fresh = []
    journal = Journal(file, {})
    assert len(journal.values) == known
    keep_again = journal.add_partial
    monkeypatch.setattr(journal, "add_partial", lambda *answer: (fresh.append(answer), keep_again(*answer)))
    record = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4), Resources(1, journal=journal))
    assert len(fresh) == 2 * len(ROWS) - known
    assert [item["output"] for item in record["items"]] == [item["output"] for item in whole["items"]]
    assert [item["prompt"] for item in record["items"]] == [row["prompt"] for row in ROWS]
    assert record["metrics"]["nll"]["value"] == pytest.approx(whole["metrics"]["nll"]["value"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"dataset_name": "test.jsonl"}, "test.jsonl"),
        ({"dataset_name": "train.jsonl", "eval_dataset_name": "test.jsonl"}, "test.jsonl"),
        ({"dataset_name": "train.jsonl", "dataset_eval_split": "test"}, None),
        ({"dataset_name": "gsm8k"}, None),
        ({"dataset_name": {"train.jsonl": 3, "test.jsonl": 1}}, None),
    ],
)
def test_a_test_set_is_named_by_its_file_where_it_is_one(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    assert name_of_test_set(DataArguments(**words), None) == expected


def test_a_part_of_the_training_data_has_no_name_of_its_own():
    assert name_of_test_set(DataArguments(dataset_name="train.jsonl"), 16) is None


def test_batches_keep_within_the_memory_bound(net, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        evaluate,
        "nll_per_item",
        lambda *args, batch_size, **kw: (sizes.append(batch_size), nll_per_item(*args, batch_size=batch_size, **kw))[1],
    )
    for max_memory_gb in (1e-9, 1e-4, 8):
        evaluate_rows(net, TOKENIZER, ROWS, LOSSES, Resources(max_memory_gb=max_memory_gb))
    assert sizes[0] == 1 < sizes[1] < sizes[2] == 16


def test_rows_beyond_the_context(tmp_path):
    """Learned positions end, which is said at once; rotary ones do not, which is noted."""
    rows = [*ROWS, {"id": "long", "prompt": "1+" * 150, "completion": "150"}]
    journal = Journal(tmp_path / "answers.jsonl", {})
    with pytest.raises(UserError, match="the longest item has 304 tokens, and the model has positions for 256; pass"):
        evaluate_rows(tiny.tiny_gpt2(), TOKENIZER, rows, resources=Resources(journal=journal))
    assert not journal.values
    record = evaluate_rows(tiny.tiny_gpt2(), TOKENIZER, ROWS, answers_of(2))
    assert "note" not in record
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER), num_layers=1)
    record = evaluate_rows(net, TOKENIZER, rows)
    assert record["note"] == "1 of 7 items are longer than the model's context of 256 tokens"


def test_a_prompt_without_room_for_its_answer_is_refused_before_the_losses(net, tmp_path):
    journal = Journal(tmp_path / "answers.jsonl", {})
    with pytest.raises(UserError, match="its answer may have 253, the model's context 256"):
        evaluate_rows(net, TOKENIZER, ROWS, answers_of(253), Resources(journal=journal))
    assert not journal.values
    record = evaluate_rows(net, TOKENIZER, ROWS, answers_of(3))
    assert record["generation_kwargs"] == {"max_gen_toks": 3}
    assert "generation_kwargs" not in evaluate_rows(net, TOKENIZER, ROWS, LOSSES)


def test_items_whose_prompt_fills_max_length_are_counted(net):
    rows = [*ROWS, {"id": "long", "prompt": "1+1+1+1=", "completion": "4", "answer": "4"}]
    record = evaluate_rows(net, TOKENIZER, rows, EvaluationArguments(max_length=6, max_new_tokens=2))
    assert len(record["items"]) == record["metrics"]["accuracy"]["num_items"] == 6
    assert record["note"] == "1 of 7 items have no supervised token within max_length=6 and count in no metric"


def test_the_journal_is_plain_json(net, tmp_path):
    journal = Journal(tmp_path / "answers.jsonl", {"a": 1})
    evaluate_rows(net, TOKENIZER, ROWS[:2], answers_of(2), Resources(journal=journal))
    first, *lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert first == {"a": 1} and [type(line["value"]) for line in lines] == [list, list, str, str]
