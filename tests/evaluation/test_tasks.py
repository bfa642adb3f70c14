"""Benchmarks through lm-eval: prompts, scores, records, and our backend against lm-eval's on the same items."""

import importlib.util
import json
import random

import datasets
import nltk
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model

import benchmark_files
import tiny
from benchmark_files import GSM8K, HUMANEVAL, IFEVAL, MATH, ScriptedLM
from maskft.models import load_model
from maskft_common.errors import UserError
from maskft_lab.evaluation import tasks as evaluated
from maskft_lab.evaluation.journal import Journal, Resuming
from maskft_lab.evaluation.tasks import check_chat_template, check_names, load_tasks, run_task
from maskft_lab.generation import greedy
from maskft_lab.generation.lm_eval_model import BatchedLM
from maskft_lab.results.schema import build_result
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return benchmark_files.write(tmp_path_factory.mktemp("data") / "files")


def record_of(name, answers, folder, **options):
    lm = ScriptedLM(answers, TOKENIZER)
    record = run_task(lm, name, load_tasks([name], folder)[name], **options)
    build_result("x", {"name_or_path": "m"}, {}, {name: record})  # checks the record
    return record, lm.prompts


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    return str(benchmark_files.write_local_tasks(tmp_path_factory.mktemp("local") / "tasks"))


# Scores


def test_gsm8k(folder):
    answers = {
        GSM8K[0]["question"]: " 3 + 4 is 7. The answer is 7.",
        GSM8K[1]["question"]: " 10 and 5 make 15 pens",
        GSM8K[2]["question"]: " The answer is 13.",
        GSM8K[3]["question"]: "",
    }
    record, prompts = record_of("gsm8k", answers, folder)
    assert [item["accuracy"] for item in record["items"]] == [1, 1, 0, 0]
    assert [item["accuracy_strict"] for item in record["items"]] == [1, 0, 0, 0]
    assert list(record["metrics"]) == ["accuracy", "accuracy_strict"]
    expected = {"value": 0.5, "stderr": pytest.approx(1 / 12**0.5), "num_items": 4}
    assert record["metrics"]["accuracy"] == expected | {"higher_is_better": True, "unit": "fraction"}
    assert record["num_fewshot"] == 8 and record["lm_eval_task"] == "gsm8k_cot" and record["chat_template_hash"] is None
    assert all(prompt.count("Q:") == 9 and prompt.endswith("A:") for prompt in prompts)
    assert record["items"][1]["output"] == " 10 and 5 make 15 pens" and record["items"][1]["answer"] == "15"


def test_minerva_math(folder):
    answers = {
        MATH[0]["problem"]: " It is 5, so $\\boxed{5}$.",
        MATH[1]["problem"]: " Final Answer: The final answer is $1.5$. I hope it is correct.",
    }
    record, prompts = record_of("minerva_math", answers, folder)
    assert [item["accuracy"] for item in record["items"]] == [1, 1]
    assert [item["exact_match"] for item in record["items"]] == [0, 1]
    assert record["num_fewshot"] == 4 and all(prompt.count("Problem:") == 5 for prompt in prompts)


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
def test_code_is_run_in_the_sandbox(name, folder):
    answers = {HUMANEVAL[0]["prompt"]: "    return x + x\n", HUMANEVAL[1]["prompt"]: "    return x ** 3\n"}
    record, prompts = record_of(name, answers, folder)
    assert record["metrics"]["pass_at_1"]["value"] == 0.5 and prompts == [row["prompt"] for row in HUMANEVAL]
    passed, failed = record["items"]
    assert (passed["id"], passed["status"], failed["status"]) == ("HumanEval/0", "passed", "failed")
    assert "AssertionError" in failed["reason"] and "answer" not in failed
    assert record["confinement"] == "confined"


def test_ifeval(folder):
    answers = {IFEVAL[0]["prompt"]: "Hello there", IFEVAL[1]["prompt"]: "A banana."}
    record, prompts = record_of("ifeval", answers, folder)
    assert [item["prompt_level_strict_acc"] for item in record["items"]] == [0, 1]
    assert record["items"][0]["inst_level_strict_acc_each"] == [1, 0]
    metric = record["metrics"]["inst_level_strict_acc"]
    assert metric["value"] == pytest.approx(2 / 3)
    # Ratio of means, by hand: residuals sum(parts) - 2 / 3 * number of parts are -1/3 and 1/3, over 3/2 parts per item.
    assert metric["stderr"] == pytest.approx(((2 / 9 / 1.5**2) / (2 - 1) / 2) ** 0.5)
    assert next(iter(record["metrics"])) == "prompt_level_strict_acc"
    assert [item["id"] for item in record["items"]] == ["1000", "1005"]
    assert prompts[0] == f"<|im_start|>user\n{IFEVAL[0]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    assert record["chat_template_hash"]


def test_chat_template_and_number_of_items_by_choice(folder):
    answers = {row["prompt"]: "" for row in IFEVAL}
    record, prompts = record_of("ifeval", answers, folder, apply_chat_template=False, limit=1)
    assert prompts == [IFEVAL[0]["prompt"]] and record["chat_template_hash"] is None and len(record["items"]) == 1


# Backend


@pytest.mark.parametrize("batch_size", [3, None])
def test_same_answers_as_lm_evals_backend(batch_size):
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER), max_position_embeddings=512)
    for parameter in net.parameters():
        parameter.data *= 3
    net.generation_config.eos_token_id = TOKENIZER.eos_token_id
    draw = random.Random(0)
    few_shot = "Q: What is 1+1?\nA: 2\n\n" * 5
    settings = [{"until": ["e", "</s>"], "do_sample": False, "max_gen_toks": 25}, {"until": [], "max_gen_toks": 12}]
    texts = [few_shot + "".join(draw.choices("abc 123", k=draw.randint(1, 40))) for _ in range(14)]
    requests = [
        Instance("generate_until", {}, (text, settings[n % 2]), 0, metadata=(f"task{n % 2}", n, 1))
        for n, text in enumerate(texts)
    ]
    # A context that does not fit is cut on its left.
    requests.append(Instance("generate_until", {}, (few_shot * 9, settings[0]), 0, metadata=("task0", 14, 1)))
    theirs = HFLM(pretrained=net, tokenizer=TOKENIZER, batch_size=1).generate_until(requests, disable_tqdm=True)
    ours = BatchedLM(net, TOKENIZER, batch_size=batch_size).generate_until(requests)
    assert ours == theirs and len(set(ours)) > 10


def test_a_head_apart_from_the_embedding_is_kept(tmp_path):
    """Of a checkpoint whose configuration says that they are tied, as a merged adapter of both leaves it."""
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER), tie_word_embeddings=True)
    net.lm_head.weight = torch.nn.Parameter(2 * net.lm_head.weight)
    net.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    BatchedLM(loaded, TOKENIZER)
    assert torch.equal(loaded.lm_head.weight, 2 * loaded.model.embed_tokens.weight)
    loaded.tie_weights()  # the model's own again
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)

    net = tiny.tiny_llama(vocab_size=len(TOKENIZER), tie_word_embeddings=True)
    adapted = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    BatchedLM(adapted, TOKENIZER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ date_string or 'today' }}",  # as Llama 3.2's
        "{{ strftime_now('%d %b %Y') }}",  # as SmolLM3's
    ],
)
def test_the_day_of_the_run_is_in_no_prompt(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    lm = BatchedLM(tiny.tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    assert lm.apply_chat_template([{"role": "user", "content": "2 + 2?"}]) == "26 Jul 2024"


def test_an_answer_in_the_chat_template_ends_at_the_end_of_a_turn(folder):
    """As of a base model that was trained on chats: its own end of text is another token."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<pad>"
    [end] = tokenizer("<|im_end|>")["input_ids"]
    net = tiny.tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    for parameter in net.parameters():
        parameter.data *= 3
    lm = BatchedLM(net, tokenizer, batch_size=1)
    prompt = lm.apply_chat_template([{"role": "user", "content": IFEVAL[0]["prompt"]}])
    ids = lm._prompt_ids(prompt)
    answer = net.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    assert answer[3] not in answer[:3] and end not in answer
    # The model ends its turn after three tokens.
    head = net.lm_head.weight.data
    head[[end, answer[3]]] = head[[answer[3], end]]

    lm = BatchedLM(net, tokenizer, batch_size=1)
    record = run_task(lm, "ifeval", load_tasks(["ifeval"], folder)["ifeval"], limit=1)
    assert record["items"][0]["output"] == tokenizer.decode(answer[:3])
    # No prompt of a chat
    settings = {"until": [], "max_gen_toks": 12}
    plain = Instance("generate_until", {}, (prompt, settings), 0, metadata=("t", 0, 1))
    [text] = BatchedLM(net, tokenizer, batch_size=1).generate_until([plain])
    assert len(text) > len(tokenizer.decode(answer[:3]))


def test_a_tokenizer_without_an_end_of_text():
    """Answers end at stop strings alone."""
    bare = tiny_tokenizer()
    bare.eos_token = None
    net = tiny.tiny_llama(vocab_size=len(bare))
    net.generation_config.eos_token_id = None
    settings = {"until": [], "max_gen_toks": 4}
    request = Instance("generate_until", {}, ("2 + 2", settings), 0, metadata=("t", 0, 1))
    [text] = BatchedLM(net, bare, batch_size=1).generate_until([request])
    ids = bare("2 + 2")["input_ids"]
    answer = net.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert text == bare.decode(answer, skip_special_tokens=True)


def test_prompts_that_were_cut_are_counted(local_tasks, tmp_path):
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER), max_position_embeddings=10)
    task = load_tasks(["long"], include_path=local_tasks)["long"]  # prompts of 5, 6 and 7 tokens, answers of up to 4
    for _ in range(2):  # the second time all answers come from the journal
        lm = Resuming(BatchedLM(net, TOKENIZER, batch_size=2), Journal(tmp_path / "answers.jsonl", {}))
        record = run_task(lm, "long", task)
        assert record["num_truncated"] == 1
        assert record["note"] == "1 of 3 prompts were too long for the model's context and were truncated on the left"
    task = load_tasks(["one"], include_path=local_tasks)["one"]
    record = run_task(BatchedLM(tiny.tiny_llama(vocab_size=len(TOKENIZER)), TOKENIZER), "one", task)
    assert record["num_truncated"] == 0 and "note" not in record


def test_settings_that_ours_does_not_know_are_lm_evals(tmp_path):
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER))
    for parameter in net.parameters():
        parameter.data *= 3
    plain = {"until": [], "max_gen_toks": 12}

    def answers(model, settings):
        requests = [Instance("generate_until", {}, ("ab" * n, settings), 0, metadata=("t", n, 1)) for n in range(1, 4)]
        return model.generate_until(requests)

    ours, ids = BatchedLM(net, TOKENIZER, batch_size=1), torch.tensor([[2, 3, 4]])
    # lm-eval opens an autocast of its own within ours, and ends it.
    assert (
        ours._model_call(ids).dtype == torch.float32 != BatchedLM(net, TOKENIZER, 1, bf16=True)._model_call(ids).dtype
    )
    penalised = answers(ours, {**plain, "repetition_penalty": 5.0})
    theirs = HFLM(pretrained=net, tokenizer=TOKENIZER, batch_size=1)
    assert penalised == answers(theirs, {**plain, "repetition_penalty": 5.0}) != answers(ours, plain)
    resuming = Resuming(ours, Journal(tmp_path / "answers.jsonl", {}))
    for sampled in ({**plain, "do_sample": True, "temperature": 5.0}, {**plain, "temperature": 5.0}):
        assert answers(resuming, sampled) != answers(resuming, sampled), "what is drawn is never reused"


def test_every_model_sees_the_same_examples(local_tasks):
    task = load_tasks(["shots"], include_path=local_tasks)["shots"]
    first, second = ScriptedLM({"": ""}), ScriptedLM({"": ""})
    records = [run_task(lm, "shots", task) for lm in (first, second)]
    assert first.prompts == second.prompts and len(set(first.prompts)) == 20
    assert records[0]["items_fingerprint"] == records[1]["items_fingerprint"]


def test_log_likelihoods_within_a_memory_bound(monkeypatch):
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER))
    texts = [("one two three" * n, " four") for n in range(1, 6)]
    requests = [Instance("loglikelihood", {}, pair, 0, metadata=("t", n, 1)) for n, pair in enumerate(texts, 1)]
    theirs = HFLM(pretrained=net, tokenizer=TOKENIZER, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(greedy, "free_memory_bytes", lambda device: 2e6)
    lm = BatchedLM(net, TOKENIZER)
    ours = lm.loglikelihood(requests, disable_tqdm=True)
    assert [pair[0] for pair in ours] == pytest.approx([pair[0] for pair in theirs], abs=1e-4)
    assert set(lm.batch_sizes.values()) == {2}, "what fits beside the longest"


def test_other_tasks_of_lm_eval(tmp_path):
    """Log-likelihood tasks: a metric per item where there is one, a summary otherwise, and answers that are resumed."""
    rows = [{"text": f"{n} and {n} is", "choices": [f" {n}", f" {2 * n}"], "gold": 1} for n in range(1, 6)]
    common = {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}, "test_split": "test"}
    choice = {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    text = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
    tasks = {
        "choice": ConfigurableTask(config={"task": "choice", "output_type": "multiple_choice", **choice, **common}),
        "text": ConfigurableTask(config={"task": "text", "output_type": "loglikelihood_rolling", **text, **common}),
    }
    net = tiny.tiny_llama(vocab_size=len(TOKENIZER))
    records = []
    for _ in range(2):
        for task in tasks.values():
            task.set_config("num_fewshot", 0)
        lm = BatchedLM(net, TOKENIZER, batch_size=2)
        asked = []
        compute = lm._loglikelihood_tokens
        lm._loglikelihood_tokens = lambda requests, compute=compute, asked=asked, **kw: (
            asked.extend(requests),
            compute(requests, **kw),
        )[1]
        resuming = Resuming(lm, Journal(tmp_path / "answers.jsonl", {}))
        records.append({name: run_task(resuming, name, task) for name, task in tasks.items()})
        build_result("x", {"name_or_path": "m"}, {}, records[-1])
    assert json.dumps(records[0]) == json.dumps(records[1]) and not asked, "the journal knows every answer"
    acc, perplexity = records[0]["choice"]["metrics"]["acc"], records[0]["text"]["metrics"]["word_perplexity"]
    assert acc["value"] == sum(item["acc"] for item in records[0]["choice"]["items"]) / 5 and acc["unit"] == "fraction"
    assert perplexity["value"] > 1 and not perplexity["higher_is_better"]
    assert all("word_perplexity" not in item for item in records[0]["text"]["items"])


def test_an_output_that_is_not_finite_is_null():
    """As in float16, where a model overflows: the file of all results would be refused for one item."""
    sample = {"doc": {}, "doc_id": 0, "target": 1, "prompt_hash": "p", "target_hash": "t"}
    for resps, output in (
        ([[(float("-inf"), False)], [(-1.5, True)]], [[None, False], [-1.5, True]]),
        ([[float("nan")]], None),
        ([["text"]], "text"),
    ):
        assert evaluated._new_item(sample | {"resps": resps}, evaluated._OTHERS)["output"] == output


# Mistakes


def test_unknown_task(local_tasks):
    with pytest.raises(UserError, match=r"unknown task 'gsm8kk' \(did you mean 'gsm8k'\?\)"):
        check_names(["gsm8kk"], local_tasks)
    check_names(["humaneval", "lambada_openai", "pair"], local_tasks)
    with pytest.raises(UserError, match="holds a task gsm8k, the name of a benchmark of maskft; give yours another"):
        check_names(["pair", "gsm8k"], local_tasks)
    with pytest.raises(UserError, match="include_path 'nowhere' is not a folder"):
        check_names(["pair"], "nowhere")


def test_lm_eval_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gsm8k is scored by lm-eval, which is not installed.*\[eval\]"):
        check_names(["gsm8k"])
    check_names([])


def test_model_without_chat_template():
    with pytest.raises(UserError, match="ifeval puts its prompts into the chat template, and this model's tokenizer"):
        check_chat_template(["gsm8k", "ifeval"], tiny_tokenizer(chat_template=False), None)
    check_chat_template(["ifeval"], tiny_tokenizer(chat_template=False), False)


def test_sentence_tables_are_asked_for_when_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    row = IFEVAL[0] | {"instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{"num_sentences": 2}]}
    (tmp_path / "ifeval.jsonl").write_text(json.dumps(IFEVAL[1]) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=r"needs NLTK's punkt_tab for length_constraints:number_sentences.*NLTK_DATA"):
        load_tasks(["ifeval"], tmp_path)
    assert load_tasks(["ifeval"], tmp_path, limit=1)


def test_two_items_of_one_id_are_refused_before_they_are_answered(tmp_path):
    rows = [IFEVAL[0], IFEVAL[1], IFEVAL[1] | {"prompt": "Use the word banana twice."}]
    (tmp_path / "ifeval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="2 items of ifeval have the key 1005; give each its own"):
        load_tasks(["ifeval"], tmp_path)
    assert load_tasks(["ifeval"], tmp_path, limit=2), "the third is not asked"


def test_other_tasks_that_run_code_are_refused(local_tasks):
    assert set(load_tasks(["one"], include_path=local_tasks)) == {"one"}
    with pytest.raises(UserError, match="task code would run model-written code outside the sandbox; use humaneval"):
        load_tasks(["code"], include_path=local_tasks)
    with pytest.raises(UserError, match="task image asks about images or sound"):
        load_tasks(["image"], include_path=local_tasks)


def test_groups_with_a_task_of_the_name_of_ours(local_tasks):
    assert set(load_tasks(["pair"], include_path=local_tasks)) == {"one", "two"}
    with pytest.raises(UserError, match="ours holds lm-eval's own gsm8k, which is not the gsm8k of maskft"):
        load_tasks(["ours"], include_path=local_tasks)
