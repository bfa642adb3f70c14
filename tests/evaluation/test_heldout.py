"""Losses and answers of held-out rows: kept one by one, and bounded in memory."""

import json

import pytest

import tiny
from maskft.data.arguments import DataArguments
from maskft.loss import nll_per_item
from maskft_common.errors import UserError
from maskft_lab.evaluation import heldout as evaluate
from maskft_lab.evaluation.command_line import check_inputs, make_parser
from maskft_lab.evaluation.evaluation_arguments import EvaluationArguments
from maskft_lab.evaluation.heldout import (
    evaluate_kl,
    evaluate_rows,
    heldout_rows,
    name_of_test_set,
    num_wrong_completions,
)
from maskft_lab.evaluation.journal import Journal
from maskft_lab.evaluation.load_models import Loaded
from maskft_lab.generation import greedy
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [{"id": str(n), "prompt": f"{n}+1=", "completion": str(n + 1), "answer": str(n + 1)} for n in range(6)]
LOSSES = EvaluationArguments(no_generate=True)


def answers_of(max_new_tokens, batch_size=2):
    return EvaluationArguments(max_new_tokens=max_new_tokens, batch_size=batch_size)


@pytest.fixture
def net():
    return tiny.tiny_llama(vocab_size=len(TOKENIZER), num_layers=1)


def test_completions_that_do_not_count_as_their_answer(net):
    """The answer is not all of the completion, so that a model that has learned the rows would be right for none."""
    explained = [row | {"completion": f"It is {row['answer']}.", "answer_type": "exact"} for row in ROWS]
    with pytest.raises(UserError, match=r"no completion counts .*answer '1', completion 'It is 1\.'"):
        evaluate_rows(net, TOKENIZER, explained, answers_of(4))
    # As numbers they count: the last one in the text.
    numbers = [row | {"answer_type": "number"} for row in explained]
    assert "note" not in evaluate_rows(net, TOKENIZER, numbers, answers_of(4))
    some = [*explained[:2], *ROWS[2:]]
    note = "2 of 6 completions of the rows do not count as their answer"
    assert evaluate_rows(net, TOKENIZER, some, answers_of(4))["note"] == note
    # Nothing is generated, so nothing is checked.
    evaluate_rows(net, TOKENIZER, explained, LOSSES)
    # Of a conversation it is the last turn of the assistant.
    turns = [{"role": "user", "content": "0+1="}, {"role": "assistant", "content": "1"}]
    assert num_wrong_completions([{"messages": turns, "answer": "1"}]) == 0


def test_rows_of_a_part_depend_on_the_seed_of_the_split(tmp_path):
    """--split_seed was ignored where a part of a file is measured."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = []
    for seed in (0, 0, 1):
        data = DataArguments(dataset_name=f"{file}:10", split_seed=seed)
        prompts.append({row["prompt"] for row in heldout_rows(data, None, TOKENIZER)})
    assert prompts[0] == prompts[1] != prompts[2]


def test_a_study_checks_answers_where_they_are_generated(tmp_path):
    """Rows of which some have an answer are measured by their loss, which the check of a study refused."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}+1=", "completion": f"It is {n + 1}."} for n in range(6)]
    rows[0] |= {"answer": "1", "answer_type": "exact"}
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["a/model", "--output_dir", "out", "--dataset_name", str(file)]
    args = make_parser().parse_args(words)
    assert len(check_inputs(args)) == 6
    rows = [row | {"answer": "1", "answer_type": "exact"} for row in rows]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match="no completion counts as its row's answer"):
        check_inputs(args)


def test_items_keep_the_cluster_of_their_row(net):
    rows = [row | {"cluster_id": f"p{index // 2}"} for index, row in enumerate(ROWS)]
    record = evaluate_rows(net, TOKENIZER, rows, answers_of(4))
    assert [item["cluster_id"] for item in record["items"]] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    alone = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4))
    assert record["metrics"]["nll"]["value"] == alone["metrics"]["nll"]["value"]
    assert record["metrics"]["nll"]["stderr"] != alone["metrics"]["nll"]["stderr"]


def test_rows_of_one_prompt_are_not_independent(net, tmp_path):
    """Each row twice gave intervals as of twice as many rows."""
    twice = ROWS + [row | {"id": f"{row['id']}#2"} for row in ROWS]
    record = evaluate_rows(net, TOKENIZER, twice, answers_of(4))
    assert [item["cluster_id"] for item in record["items"]] == ["0", "1", "2", "3", "4", "5"] * 2
    alone = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4))
    assert record["metrics"]["nll"]["stderr"] == pytest.approx(alone["metrics"]["nll"]["stderr"])
    loaded = Loaded(net, TOKENIZER, {}, "x", {name: 1.1 * weight for name, weight in net.named_parameters()})
    record = evaluate_kl(loaded, twice, LOSSES, Journal(tmp_path / "twice.jsonl", {}))
    assert [item["cluster_id"] for item in record["items"]] == ["0", "1", "2", "3", "4", "5"] * 2


def test_kl_keeps_the_cluster_of_a_row_too(net, tmp_path):
    rows = [row | {"cluster_id": f"p{index // 2}"} for index, row in enumerate(ROWS)]
    loaded = Loaded(net, TOKENIZER, {}, "x", {name: 1.1 * weight for name, weight in net.named_parameters()})
    record = evaluate_kl(loaded, rows, LOSSES, Journal(tmp_path / "clusters.jsonl", {}))
    assert [item["cluster_id"] for item in record["items"]] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    alone = evaluate_kl(loaded, ROWS, LOSSES, Journal(tmp_path / "alone.jsonl", {}))
    assert record["metrics"]["kl"]["value"] == pytest.approx(alone["metrics"]["kl"]["value"])
    assert record["metrics"]["kl"]["stderr"] != alone["metrics"]["kl"]["stderr"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ROWS[0]], "two rows have the id '0', the same row in two sets"),
        ([*ROWS[1:], ROWS[0] | {"cluster_id": "p0"}], "item '1' has cluster_id None: give every item a text"),
    ],
)
def test_rows_that_no_result_can_hold_are_refused_before_the_losses(rows, message, net, tmp_path):
    loaded = Loaded(net, TOKENIZER, {}, "x", dict(net.named_parameters()))
    journal = Journal(tmp_path / "answers.jsonl", {})
    with pytest.raises(UserError, match=message):
        evaluate_rows(net, TOKENIZER, rows, journal=journal)
    with pytest.raises(UserError, match=message):
        evaluate_kl(loaded, rows, LOSSES, journal)
    assert not journal.values


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["heldout_loss", "answer"])
def test_a_run_that_ended_early_is_resumed(kind, net, tmp_path, monkeypatch):
    whole = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4))
    file = tmp_path / "answers.jsonl"
    journal = Journal(file, {})
    keep = journal.add_partial

    def killed(found, *rest):
        keep(found, *rest)
        if found == kind and len(journal.values) % len(ROWS) == 3:
            raise Killed

    monkeypatch.setattr(journal, "add_partial", killed)
    with pytest.raises(Killed):
        evaluate_rows(net, TOKENIZER, ROWS, answers_of(4), journal)
    known = len(journal.values)
    fresh = []
    journal = Journal(file, {})
    assert len(journal.values) == known
    keep_again = journal.add_partial
    monkeypatch.setattr(journal, "add_partial", lambda *answer: (fresh.append(answer), keep_again(*answer)))
    record = evaluate_rows(net, TOKENIZER, ROWS, answers_of(4, 1), journal)
    assert len(fresh) == 2 * len(ROWS) - known
    assert [item["output"] for item in record["items"]] == [item["output"] for item in whole["items"]]
    assert [item["prompt"] for item in record["items"]] == [row["prompt"] for row in ROWS]
    assert record["metrics"]["nll"]["value"] == pytest.approx(whole["metrics"]["nll"]["value"], abs=1e-5)


def test_held_out_data_is_evaluated_without_training_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        rows = [{"prompt": f"{name} {n}", "completion": "x"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def rows_of(**words):
        return heldout_rows(DataArguments(**words), None, TOKENIZER)

    alone = rows_of(eval_dataset_name="test.jsonl:3")
    assert alone == rows_of(dataset_name="train.jsonl", eval_dataset_name="test.jsonl:3") and len(alone) == 3
    assert len(rows_of(eval_dataset_name="test.jsonl", max_eval_samples=2)) == 2
    with pytest.raises(UserError, match="dataset_name is missing"):
        rows_of()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"dataset_name": "test.jsonl"}, "test.jsonl"),
        ({"eval_dataset_name": "test.jsonl"}, "test.jsonl"),
        ({"dataset_name": "train.jsonl", "eval_dataset_name": "test.jsonl"}, "test.jsonl"),
        ({"dataset_name": "train.jsonl", "dataset_eval_split": "test"}, None),
        ({"dataset_name": "gsm8k"}, None),
        ({"dataset_name": {"train.jsonl": 3, "test.jsonl": 1}}, None),
        ({"dataset_name": "test.jsonl", "data_dir": "."}, "test.jsonl"),
        ({"dataset_name": "train.jsonl,test.jsonl", "data_dir": "."}, None),
    ],
)
def test_a_test_set_is_named_by_its_file_where_it_is_one(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    assert name_of_test_set(DataArguments(**words), None) == expected
    assert name_of_test_set(DataArguments(dataset_name="train.jsonl"), 16) is None, "a part of the training data"


def test_batches_keep_within_the_memory_bound(net, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        evaluate,
        "nll_per_item",
        lambda *args, batch_size, **kw: (sizes.append(batch_size), nll_per_item(*args, batch_size=batch_size, **kw))[1],
    )
    for free in (2, 2e5, 2e10):
        monkeypatch.setattr(greedy, "free_memory_bytes", lambda device, free=free: free)
        evaluate_rows(net, TOKENIZER, ROWS, LOSSES)
    assert sizes[0] == 1 < sizes[1] < sizes[2] == 16


def test_kl_is_bounded_and_resumed_as_losses_are(net, tmp_path, monkeypatch):
    loaded = Loaded(net, TOKENIZER, {}, "x", {name: 1.1 * weight for name, weight in net.named_parameters()})
    sizes, log_probs = [], evaluate._log_probs
    monkeypatch.setattr(evaluate, "_log_probs", lambda *args: (sizes.append(len(args[2])), log_probs(*args))[1])

    def kl(rows, size):
        return evaluate_kl(loaded, rows, answers_of(1, size), Journal(tmp_path / f"{size}.jsonl", {}))

    values = [[item["kl"] for item in kl(ROWS, size)["items"]] for size in (None, 4, 4)]
    assert sizes == [6, 6, 4, 4, 2, 2] and values[1] == values[2] == pytest.approx(values[0]) and min(values[0]) > 0
    with pytest.raises(UserError, match="the model's context 256: lower max_length"):
        kl([ROWS[0] | {"prompt": "1+" * 150}], 1)


def test_no_rows_are_one_line(net, tmp_path):
    loaded = Loaded(net, TOKENIZER, {}, "x", dict(net.named_parameters()))
    with pytest.raises(UserError, match="there are no items to evaluate"):
        evaluate_rows(net, TOKENIZER, [])
    with pytest.raises(UserError, match="there are no items to evaluate"):
        evaluate_kl(loaded, [], LOSSES, Journal(tmp_path / "answers.jsonl", {}))


def test_the_answer_to_a_chat_ends_with_its_turn(net, monkeypatch):
    """The tokenizer of a base model ends a text otherwise, and the model would go on to the user's next turn."""
    tokenizer = tiny_tokenizer()
    im_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<pad>"
    bounds = []
    monkeypatch.setattr(evaluate, "generated", lambda *args: bounds.append(args[3]) or ["4"])
    chat = {"prompt": [{"role": "user", "content": "2+2"}], "completion": [{"role": "assistant", "content": "4"}]}
    for example in (chat, {"messages": chat["prompt"] + chat["completion"]}, {"prompt": "2+2=", "completion": "4"}):
        evaluate_rows(net, tokenizer, [{"id": "1", "answer": "4", **example}], answers_of(3))
    assert [each.end_tokens for each in bounds] == [[im_end], [im_end], []]


def test_an_empty_prompt_is_refused_before_the_losses(net, tmp_path):
    """The answer would be to padding, and the KL a mean over no tokens."""
    rows = [*ROWS, ROWS[0] | {"id": "empty", "prompt": ""}]
    loaded = Loaded(net, TOKENIZER, {}, "x", dict(net.named_parameters()))
    journal = Journal(tmp_path / "answers.jsonl", {})
    with pytest.raises(UserError, match=r"1 of 7 prompts are empty, .*; leave these rows out"):
        evaluate_rows(net, TOKENIZER, rows, answers_of(3), journal)
    with pytest.raises(UserError, match="1 of 7 prompts are empty"):
        evaluate_kl(loaded, rows, LOSSES, journal)
    assert not journal.values
    assert len(evaluate_rows(net, TOKENIZER, rows, LOSSES)["items"]) == 7, "a loss needs no prompt"


def test_rows_beyond_the_context_are_refused_before_the_losses(net, tmp_path):
    rows = [*ROWS, {"id": "long", "prompt": "1+" * 150, "completion": "150"}]
    journal = Journal(tmp_path / "answers.jsonl", {})
    with pytest.raises(UserError, match="the longest item has 304 tokens, the model's context 256: lower max_length"):
        evaluate_rows(net, TOKENIZER, rows, journal=journal)
    assert not journal.values


def test_a_prompt_without_room_for_its_answer_is_refused_before_the_losses(net, tmp_path):
    journal = Journal(tmp_path / "answers.jsonl", {})
    with pytest.raises(UserError, match="its answer may have 253, the model's context 256"):
        evaluate_rows(net, TOKENIZER, ROWS, answers_of(253), journal)
    assert not journal.values
    record = evaluate_rows(net, TOKENIZER, ROWS, answers_of(3))
    assert record["generation_kwargs"] == {"max_gen_toks": 3}
    assert "generation_kwargs" not in evaluate_rows(net, TOKENIZER, ROWS, LOSSES)


def test_items_whose_prompt_fills_max_length_are_counted(net):
    rows = [*ROWS, {"id": "long", "prompt": "1+1+1+1=", "completion": "4", "answer": "4"}]
    record = evaluate_rows(net, TOKENIZER, rows, EvaluationArguments(max_length=6, max_new_tokens=2))
    assert len(record["items"]) == record["metrics"]["accuracy"]["num_items"] == 6
    assert record["note"] == "1 of 7 items have no supervised token within --max_length 6 and count in no metric"


def test_rows_without_an_answer_of_their_own_are_not_advised_to_raise_max_length(net):
    rows = [{"id": "a", "messages": [{"role": "user", "content": "1+1="}]}]
    with pytest.raises(UserError, match="1 of 1 items have no supervised token; give rows with a completion, or"):
        evaluate_rows(net, TOKENIZER, rows, LOSSES)
