"""AlpacaEval against a real server process (tests/judge_server.py); the slow test asks a real language model."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from alpaca_eval.metrics import get_winrate, glm_winrate

from maskft_base.files import ALPACA_OUTPUTS, JOURNAL, RESULT
from maskft_lab.cli.main import main
from maskft_lab.evaluation import judge
from maskft_lab.evaluation.journal import Journal, Resources
from maskft_lab.evaluation.judge import Judge, length_controlled_win_rate, preferences
from maskft_lab.results.schema import read_result
from tiny_tokenizer import tiny_tokenizer

SERVER = Path(__file__).parents[1] / "judge_server.py"
NUM_PROMPTS = 12
REFERENCES = [
    {
        "dataset": "counting",
        "instruction": f"Count to {n}.",
        "output": " ".join(str(i) for i in range(n)),
        "generator": "gold",
    }
    for n in range(NUM_PROMPTS)
]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(judge, "NUM_RESAMPLES", 8)  # each refits the package's regression


@contextlib.contextmanager
def judge_server(tmp_path, **settings):
    """Start the server; yields its URL, a function that reads its log, and its port."""
    log = tmp_path / f"requests-{time.monotonic_ns()}.jsonl"
    log.touch()
    process = subprocess.Popen(
        [sys.executable, SERVER, json.dumps({"log": str(log), **settings})], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(process.stdout.readline())
        yield (
            f"http://127.0.0.1:{port}/v1",
            lambda: [json.loads(line) for line in log.read_text().splitlines()],
            port,
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def references(tmp_path):
    file = tmp_path / "references.json"
    file.write_text(json.dumps(REFERENCES))
    return file


@pytest.fixture
def command(base, references, tmp_path, capsys):
    """Run ``maskft evaluate --tasks alpaca_eval``; returns the status and both outputs."""

    def run(url, *words, out="out", model=base):
        options = {
            "tasks": "alpaca_eval",
            "model_name_or_path": model,
            "output_dir": tmp_path / out,
            "reference_outputs": references,
            "alpaca_max_new_tokens": 6,
        }
        if url:
            options |= {"judge_url": url, "judge_model": "longer", "judge_retries": 1}
        words = ["evaluate", *(word for key, value in options.items() for word in (f"--{key}", value)), *words]
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def record(tmp_path, out="out"):
    return read_result(tmp_path / out)["tasks"]["alpaca_eval"]


def ask(pairs, tmp_path, url):
    resources = Resources(journal=Journal(tmp_path / "journal.jsonl", {}))
    return preferences(pairs, Judge(url, "longer", num_retries=1), resources)


# The whole way


def test_outputs_verdicts_and_win_rates(command, references, tmp_path):
    with judge_server(tmp_path) as (url, requests, _):
        status, printed, err = command(url, "--name", "tiny")
    assert status == 0, err
    outputs = json.loads((tmp_path / "out" / ALPACA_OUTPUTS).read_text())
    assert [list(row) for row in outputs] == [["dataset", "instruction", "output", "generator"]] * NUM_PROMPTS
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in REFERENCES]
    assert {row["generator"] for row in outputs} == {"tiny"}
    assert record(tmp_path)["generation_kwargs"] == {"max_gen_toks": 6}
    asked = requests()
    assert len(asked) == NUM_PROMPTS
    assert {key: asked[0]["request"][key] for key in ("model", "max_tokens", "temperature", "top_logprobs")} == {
        "model": "longer",
        "max_tokens": 1,
        "temperature": 1,
        "top_logprobs": 5,
    }
    found = record(tmp_path)
    # The judge prefers the longer output, whichever of the two places it has.
    for item, row, reference in zip(found["items"], outputs, REFERENCES, strict=True):
        assert item["output"] == row["output"] and item["output_length"] == len(row["output"])
        lengths = len(row["output"]), len(reference["output"])
        assert (item["preference"] > 0.5) == (lengths[0] > lengths[1])
    annotations = pd.DataFrame(
        {
            "preference": [item["preference"] + 1 for item in found["items"]],
            "output_1": [row["output"] for row in REFERENCES],
            "output_2": [row["output"] for row in outputs],
            "generator_1": "gold",
            "generator_2": "tiny",
        }
    )
    package = get_winrate(annotations)
    for name in ("win_rate", "preference"):
        metric = found["metrics"][name]
        assert metric["value"] == pytest.approx(package["win_rate"] / 100)
        assert metric["stderr"] == pytest.approx(package["standard_error"] / 100)
    controlled = found["metrics"]["length_controlled_win_rate"]
    assert 0 < controlled["value"] < 1 and controlled["stderr"] > 0 and controlled["num_items"] == NUM_PROMPTS
    assert found["comparable_with_leaderboard"] is False and found["num_unjudged"] == 0
    assert "judge longer" in found["version"]
    assert "not comparable with the leaderboard: the judge is longer" in printed
    assert not (tmp_path / "out" / JOURNAL).exists()
    assert str(tmp_path) not in (tmp_path / "out" / RESULT).read_text()


def test_results_are_compared_item_by_item_and_only_under_one_judge(command, tmp_path, capsys):
    made = tmp_path / "made.json"
    made.write_text(json.dumps([{**row, "output": row["output"] + " and on"} for row in REFERENCES]))
    with judge_server(tmp_path) as (url, *_):
        assert command(url, "--name", "generated", out="a")[0] == 0
        assert command(url, "--name", "made", "--alpaca_outputs", made, out="b")[0] == 0
        assert command(url, "--name", "other", "--judge_model", "shorter", out="c")[0] == 0
    assert all(item["preference"] > 0.5 for item in record(tmp_path, "b")["items"])
    made, generated = read_result(tmp_path / "b"), read_result(tmp_path / "a")
    assert made["model"] == {**dict.fromkeys(generated["model"]), "name_or_path": "made"}, "no model made these here"
    assert generated["model"]["fingerprint"]
    for folder, is_from_file in (("a", False), ("b", True)):
        assert record(tmp_path, folder)["outputs_from_file"] is is_from_file
        assert bool(record(tmp_path, folder)["chat_template_hash"]) is not is_from_file
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "made vs generated, preference on alpaca_eval" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "judge longer" in capsys.readouterr().err


def test_without_a_judge_the_outputs_are_written(command, tmp_path):
    status, printed, err = command(None, "--limit", "3")
    assert status == 0, err
    assert len(json.loads((tmp_path / "out" / ALPACA_OUTPUTS).read_text())) == 3
    assert "not judged" in printed and record(tmp_path)["metrics"] == {}


# Verdicts


def test_published_verdicts(tmp_path):
    """Two annotations of the public leaderboard (NullModel, judged by gpt-4-1106-preview), from log-probabilities.

    https://github.com/tatsu-lab/alpaca_eval, results/NullModel/weighted_alpaca_eval_gpt4_turbo/annotations.json.
    They also fix which output is shown first, which is drawn from the instruction.
    """
    published = {
        "What are the names of some famous actors that started their careers on Broadway?": (
            {"m": -0.010449888, "M": -4.6069846, "The": -8.3615055},
            1.9900139974,
        ),
        "How did US states get their names?": ({"M": -0.6152821, "m": -0.7781773, "The": -8.544771}, 1.4593660117),
    }
    pairs = [{"instruction": text, "output_1": "one", "output_2": "two"} for text in published]
    logprobs = {text: values for text, (values, _) in published.items()}
    with judge_server(tmp_path, logprobs=logprobs) as (url, *_):
        values, _ = ask(pairs, tmp_path, url)
    assert values == pytest.approx([preference - 1 for _, preference in published.values()], abs=1e-9)


def test_equal_outputs_are_a_draw_and_not_asked_about(tmp_path):
    pairs = [
        {"instruction": "a", "output_1": "x", "output_2": "x"},
        {"instruction": "b", "output_1": "x", "output_2": "xx"},
    ]
    with judge_server(tmp_path) as (url, requests, _):
        values, reason = ask(pairs, tmp_path, url)
        assert [request["instruction"] for request in requests()] == ["b"]
    assert values[0] == 0.5 and values[1] > 0.5 and reason is None


def test_items_without_verdict_are_counted(command, tmp_path):
    unclear, refused = REFERENCES[3]["instruction"], REFERENCES[5]["instruction"]
    with judge_server(tmp_path, logprobs={unclear: {"Both": -0.1, "I": -3.0}}, refuse=[refused]) as (url, *_):
        status, printed, err = command(url)
    assert status == 0, err
    assert "2 of 12 items without verdict" in printed
    found = record(tmp_path)
    assert [item["id"] for item in found["items"] if not item["judged"]] == ["3", "5"]
    assert all(item["preference"] == 0.5 for item in found["items"] if not item["judged"])
    judged = [item["preference"] for item in found["items"] if item["judged"]]
    assert found["metrics"]["win_rate"]["value"] == pytest.approx(sum(judged) / len(judged))
    assert found["metrics"]["win_rate"]["num_items"] == 10 and found["num_unjudged"] == 2


def test_a_judge_without_log_probabilities_is_refused_early(command, tmp_path):
    with judge_server(tmp_path, without_logprobs=True) as (url, *_):
        status, _, err = command(url)
    assert status == 2 and "no usable answer to 8 requests (its answer has no log-probabilities)" in err
    assert not (tmp_path / "out" / RESULT).exists()


def test_a_judge_that_never_decides_is_refused(tmp_path, command):
    answers = {row["instruction"]: {"Both": -0.1} for row in REFERENCES}
    with judge_server(tmp_path, logprobs=answers) as (url, *_):
        status, _, err = command(url)
    assert status == 2 and "no verdict on any of 12 items (neither m nor M" in err


# A judge that fails


def test_a_busy_judge_is_asked_again(command, tmp_path):
    with judge_server(tmp_path, busy=2) as (url, requests, _):
        status, _, err = command(url)
    assert status == 0, err
    assert len(requests()) == NUM_PROMPTS


def test_a_judge_that_dies_costs_nothing(command, tmp_path):
    with judge_server(tmp_path) as (url, *_):
        assert command(url, out="whole")[0] == 0
    with judge_server(tmp_path, exit_after=5) as (url, _, port):
        status, _, err = command(url)
        message = err.strip().splitlines()[-1]
        assert status == 2 and message.startswith("maskft: error: the judge at")
        assert "stopped answering" in message and "run the same command again to resume" in message
    assert not (tmp_path / "out" / RESULT).exists()
    # An output that only the journal has shows whether the second run generates again.
    journal = tmp_path / "out" / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    kept = sum(isinstance(line.get("answer"), dict) for line in lines)
    assert 0 < kept <= 5 and f"{kept} of 12 verdicts are kept" in err
    assert sum(isinstance(line.get("answer"), str) for line in lines) == NUM_PROMPTS
    with journal.open("a") as file:
        file.write('{"key": "cut sho')
    with judge_server(tmp_path, port=port) as (url, requests, _):
        status, _, err = command(url)
        assert status == 0, err
        assert len(requests()) == NUM_PROMPTS - kept
    whole, resumed = record(tmp_path, "whole"), record(tmp_path)
    assert resumed == whole


def test_outputs_are_not_generated_twice(command, tmp_path):
    with judge_server(tmp_path, busy=10_000) as (url, *_):
        assert command(url, "--judge_retries", "0")[0] == 2
    journal = tmp_path / "out" / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1]["answer"] = "only the journal knows this"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with judge_server(tmp_path) as (url, *_):
        assert command(url)[0] == 0
    assert "only the journal knows this" in [item["output"] for item in record(tmp_path)["items"]]


def test_verdicts_are_of_one_server(tmp_path):
    pair = {"instruction": "Sing.", "output_1": "la", "output_2": "la la"}
    for _ in range(2):  # another port, the same model name and journal
        with judge_server(tmp_path) as (url, requests, _):
            ask([pair], tmp_path, url)
            ask([pair], tmp_path, url)
        assert len(requests()) == 1


@pytest.mark.parametrize(
    "speaks,message",
    [
        ("html", "does not speak the OpenAI protocol"),
        ("cut", "no usable answer to 8 requests (its answer is not JSON of the OpenAI protocol)"),
    ],
)
def test_a_server_of_another_protocol_is_one_line(speaks, message, command, tmp_path):
    with judge_server(tmp_path, speaks=speaks) as (url, *_):
        status, _, err = command(url)
    assert status == 2 and message in err.strip().splitlines()[-1]
    assert not (tmp_path / "out" / RESULT).exists()


def test_keys(command, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")  # is for OpenAI alone
    with judge_server(tmp_path, key="secret") as (url, *_):
        status, _, err = command(url)
        assert status == 2 and "refuses model 'longer'" in err and "JUDGE_API_KEY" in err
        monkeypatch.setenv("JUDGE_API_KEY", "secret")
        assert command(url)[0] == 0


def test_the_judge_is_told_no_names_and_no_message_holds_a_secret(command, tmp_path, monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "my-employer")
    monkeypatch.setenv("JUDGE_API_KEY", "my-key")
    with judge_server(tmp_path, key="another") as (url, *_):
        status, out, err = command(url.replace("http://", "http://me:my-password@"))
    assert status == 2 and "refuses model 'longer'" in err and "@" not in err
    assert "my-key" not in out + err and "my-password" not in out + err
    headers = next(tmp_path.glob("*.headers")).read_text()
    assert "python" in headers and "my-employer" not in headers


def test_the_judge_cannot_send_requests_elsewhere(command, tmp_path):
    (tmp_path / "other").mkdir()
    with judge_server(tmp_path / "other") as (other, *_):
        with judge_server(tmp_path, redirect=other.removesuffix("/v1")) as (url, *_):
            status, _, err = command(url)
        assert status == 2 and "sends its requests elsewhere (status 307)" in err
        assert not list((tmp_path / "other").glob("*.headers"))


# Length control


def test_length_control_is_the_packages(tmp_path, monkeypatch):
    num_prompts, words = 60, [f"{'word ' * (i % 7 + 1)}" for i in range(60)]
    shorter = [f"{'word ' * (i % 5 + 1)}" for i in range(60)]
    preference = [
        0.1 + 0.8 * (len(a) > len(b)) + 0.001 * i for i, (a, b) in enumerate(zip(words, shorter, strict=True))
    ]
    published = tmp_path / "df_gamed.csv"
    rows = [
        {
            "model": model,
            "index": i,
            "preference": (i * 7 % 10) / 10,
            "std_delta_len": (i % 11 - 5) / 3,
            "instruction_difficulty": (i % 13 - 6) / 4,
            "not_gamed_baseline": False,
        }
        for model in ("concise", "verbose")
        for i in range(num_prompts)
    ]
    pd.DataFrame(rows).to_csv(published, index=False)
    annotations = pd.DataFrame(
        {
            "preference": [value + 1 for value in preference],
            "output_1": shorter,
            "output_2": words,
            "generator_1": "a",
            "generator_2": "b",
            "index": range(num_prompts),
        }
    )
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(published))
    for formula, data in (("length_controlled_v1", published), ("length_controlled_minimal", None)):
        expected = glm_winrate.get_length_controlled_winrate(
            annotations.copy(), glm_name=formula, save_weights_dir=None
        )
        found = length_controlled_win_rate(
            preference,
            *([len(t) for t in texts] for texts in (shorter, words)),
            range(60),
            formula=formula,
            published_data=data,
        )
        assert found["value"] == pytest.approx(expected["length_controlled_winrate"] / 100)
        assert 0.005 < found["stderr"] < 0.2
    # Where the judge likes length and outputs are longer, controlling for it lowers the win rate.
    assert found["value"] < sum(preference) / num_prompts


@pytest.mark.parametrize("lengths", [[5] * 30, [5] * 9])
def test_no_length_control_without_lengths_or_items(lengths):
    metric = length_controlled_win_rate(
        [0.4] * len(lengths),
        [5] * len(lengths),
        lengths,
        range(len(lengths)),
        formula="length_controlled_minimal",
        published_data=None,
    )
    assert metric["value"] is None and metric["stderr"] is None


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_length_control_of_a_judge_that_always_says_the_same(verdict):
    metric = length_controlled_win_rate(
        [verdict] * 20,
        range(1, 21),
        range(21, 1, -1),
        range(20),
        formula="length_controlled_minimal",
        published_data=None,
    )
    assert abs(metric["value"] - verdict) < 0.1


@pytest.mark.parametrize("num_items,num_differing,is_known", [(12, 3, True), (10, 1, False)])
def test_resamples_in_which_no_length_differs_are_left_out(num_items, num_differing, is_known, monkeypatch):
    monkeypatch.setattr(judge, "NUM_RESAMPLES", 20)  # 19 and 13 of them have a difference
    metric = length_controlled_win_rate(
        [0.4, 0.6] * (num_items // 2),
        [5] * num_items,
        [6, 8, 12][:num_differing] + [5] * (num_items - num_differing),
        range(num_items),
        formula="length_controlled_minimal",
        published_data=None,
    )
    assert 0 < metric["value"] < 1 and (metric["stderr"] is not None) is is_known


# Bad input


@pytest.mark.parametrize(
    "rows,message",
    [
        ("nonsense", "not JSON"),
        ({"instruction": "a"}, "valid list; AlpacaEval's files are JSON lists of objects"),
        ([], "the list is empty"),
        ([{"instruction": "a", "output": "b"}, {"prompt": "a"}], "1.instruction is missing"),
        ([{"instruction": ["a"]}], "0.instruction is ['a']: input should be a valid string"),
        (
            [{"instruction": "Count to a million."}],
            "no reference for instruction 0, 'Count to a million.' (1 are missing)",
        ),
    ],
)
def test_bad_prompts(rows, message, command, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    status, _, err = command(None, "--alpaca_prompts", file)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        (["--judge_model", "x"], "judge_model is given without judge_url"),
        (["--judge_url", "http://127.0.0.1:9/v1"], "judge_url is given without judge_model"),
        (["--judge_url", "localhost", "--judge_model", "x"], "it must look like http"),
        (["--judge_url", "http://me:pw@1.2.3.4/v1", "--judge_model", "x"], "'http://1.2.3.4/v1' would send prompts"),
        (["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "x"], "cannot be reached"),
        (["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "x", "--judge_timeout", "0"], "must be above 0"),
        (["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "x", "--judge_retries", "-1"], "at least 0"),
        (["--alpaca_max_new_tokens", "0"], "alpaca_max_new_tokens is 0"),
        (["--alpaca_prompts", "none.json"], "none.json: no such file"),
        (
            ["--alpaca_prompts", "tatsu-lab/alpaca_eval"],
            "alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval cannot",
        ),
        (["--length_control", "REFERENCES"], "no column index, instruction_difficulty, model"),
        (["--alpaca_outputs", "REFERENCES", "--adapter", "none", "other"], "alpaca_outputs are of one model"),
        (["--alpaca_outputs", "REFERENCES", "--alpaca_prompts", "MORE"], "no output for instruction 1"),
    ],
)
def test_bad_options(words, message, command, references, tmp_path):
    more = tmp_path / "more.json"
    more.write_text(json.dumps([*REFERENCES[:1], {"instruction": "Sing."}]))
    names = {"REFERENCES": references, "MORE": more}
    status, _, err = command(None, *(names.get(word, word) for word in words))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_prompts_at_all(base, tmp_path, capsys):
    words = ["evaluate", "--tasks", "alpaca_eval", "--model_name_or_path", base, "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "has no prompts" in capsys.readouterr().err


def test_no_chat_template(base, command, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in base.iterdir():
        if file.name.startswith(("model", "config", "generation")):
            (folder / file.name).symlink_to(file)
    tiny_tokenizer(chat_template=False).save_pretrained(folder)
    status, _, err = command(None, model=folder)
    assert status == 2 and "this model's tokenizer has none" in err and not (tmp_path / "out").exists()


# A language model as judge


@pytest.mark.judge
@pytest.mark.slow
def test_llama_cpp_server_judges(tmp_path, capsys):
    """SmolLM2 judges itself, behind llama-cpp-python's server (MASKFT_JUDGE_PYTHON: the Python that has it)."""
    import socket

    from maskft.models import EMBEDDED_MODEL, _embedded_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    references = tmp_path / "references.json"
    references.write_text(json.dumps(REFERENCES))
    python = os.environ.get("MASKFT_JUDGE_PYTHON", sys.executable)
    words = [
        "-m",
        "llama_cpp.server",
        "--model",
        _embedded_file(),
        "--port",
        port,
        "--n_ctx",
        2048,
        "--logits_all",
        True,
    ]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [python, *map(str, words)], stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": ""}
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/models").close()
                break
            time.sleep(0.25)
        options = {
            "tasks": "alpaca_eval",
            "model_name_or_path": EMBEDDED_MODEL,
            "output_dir": tmp_path / "out",
            "reference_outputs": references,
            "judge_url": url,
            "judge_model": "SmolLM2-135M-Instruct",
            "alpaca_max_new_tokens": 24,
        }
        words = ["evaluate", *(word for key, value in options.items() for word in (f"--{key}", value))]
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    finally:
        server.kill()
        server.wait()
    found = record(tmp_path)
    assert sum(item["judged"] for item in found["items"]) >= NUM_PROMPTS // 2
    assert len({item["preference"] for item in found["items"]}) > 2  # probabilities, not 0 and 1
    assert 0 < found["metrics"]["win_rate"]["value"] < 1
