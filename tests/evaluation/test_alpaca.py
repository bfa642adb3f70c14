"""AlpacaEval: outputs in the published format, judged by the package with an annotator that needs no server."""

import json

import huggingface_hub
import pytest
import yaml

from maskft_common.layout import ALPACA_OUTPUTS, JOURNAL, RESULT
from maskft_lab.cli.main import main
from maskft_lab.evaluation import alpaca, evaluate, journal
from maskft_lab.results.schema import read_result

NUM_PROMPTS = 12
REFERENCES = [
    {"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n))), "generator": alpaca.PUBLISHED_REFERENCE}
    for n in range(NUM_PROMPTS)
]


@pytest.fixture
def command(base, tmp_path, capsys):
    """Run ``maskft evaluate --tasks alpaca_eval``; returns the status and both outputs."""
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))

    def run(*words, out="out"):
        options = {"tasks": "alpaca_eval", "model_name_or_path": base, "output_dir": tmp_path / out}
        options |= {"reference_outputs": tmp_path / "references.json", "alpaca_max_new_tokens": 6}
        words = ["evaluate", *(word for key, value in options.items() for word in (f"--{key}", value)), *words]
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def judge(tmp_path):
    """Write an annotator that always says ``answer``; the package draws which output is shown as m."""

    def write(answer):
        folder = tmp_path / "judges" / "constant"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompt.txt").write_text("<|im_start|>user\n{instruction}: m {output_1} or M {output_2}?<|im_end|>")
        config = {
            "prompt_template": "constant/prompt.txt",
            "fn_completions": "test_completions",
            "completions_kwargs": {"model_name": "constant", "value": answer},
            "fn_completion_parser": "regex_parser",
            "completion_parser_kwargs": {"outputs_to_match": {1: "^m$", 2: "^M$"}},
            "batch_size": 1,
        }
        file = folder / "configs.yaml"
        file.write_text(yaml.safe_dump({"constant": config}))
        return file

    return write


def record(folder):
    return read_result(folder)["tasks"]["alpaca_eval"]


def test_outputs_are_written_and_judged(command, judge, tmp_path, capsys):
    status, printed, err = command("--name", "tiny", "--alpaca_annotator", judge("m"))
    assert status == 0, err
    outputs = json.loads((tmp_path / "out" / ALPACA_OUTPUTS).read_text())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in REFERENCES]
    assert {row["generator"] for row in outputs} == {"tiny"}
    found = record(tmp_path / "out")
    assert [item["output"] for item in found["items"]] == [row["output"] for row in outputs]
    preferences = [item["preference"] for item in found["items"]]
    assert set(preferences) == {0.0, 1.0}, "each of the two is shown first at times"
    rate = found["metrics"]["win_rate"]
    assert rate["value"] == pytest.approx(sum(preferences) / 12) == found["metrics"]["preference"]["value"]
    assert rate["stderr"] == pytest.approx(found["metrics"]["preference"]["stderr"])
    assert "length_controlled_win_rate" not in found["metrics"] and "alpaca_eval win_rate" in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted([ALPACA_OUTPUTS, RESULT])
    assert str(tmp_path) not in (tmp_path / "out" / RESULT).read_text()
    # The other answer is the other verdict, and a result of another judge.
    assert command("--name", "other", "--alpaca_annotator", judge("M"), out="b")[0] == 0
    assert [1 - item["preference"] for item in record(tmp_path / "b")["items"]] == preferences
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "b")]) == 0
    assert "preference on alpaca_eval" in " ".join(capsys.readouterr().out.split())


def test_without_a_judge_the_outputs_are_written(command, tmp_path, capsys):
    status, printed, err = command("--limit", "3")
    assert status == 0, err
    assert len(json.loads((tmp_path / "out" / ALPACA_OUTPUTS).read_text())) == 3
    assert "not judged: name a judge with --alpaca_annotator" in printed and record(tmp_path / "out")["metrics"] == {}
    assert str(tmp_path) not in (tmp_path / "out" / RESULT).read_text(), "results are shared"
    assert (
        main(["compare", str(tmp_path / "out")]) == 2 and "has no metric: evaluate it with" in capsys.readouterr().err
    )


def test_length_is_controlled_for_on_the_published_prompts(command, judge, tmp_path, monkeypatch):
    """With the table of the regression in the hub's cache, as the package reads it."""
    monkeypatch.setattr(alpaca, "PUBLISHED_NUM_PROMPTS", NUM_PROMPTS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    rows = [f"gamed,{n},{n % 2},{(n % 5) - 2},{n / 10},False" for n in range(NUM_PROMPTS)]
    header = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    (repository / "snapshots" / "abc" / "df_gamed.csv").write_text("\n".join([header, *rows]))
    assert command("--alpaca_annotator", judge("m"))[0] == 0
    metrics = record(tmp_path / "out")["metrics"]
    assert next(iter(metrics)) == "length_controlled_win_rate"
    assert 0 < metrics["length_controlled_win_rate"]["value"] < 1
    assert command("--alpaca_annotator", judge("m"), "--limit", "11", out="part")[0] == 0
    assert "length_controlled_win_rate" not in record(tmp_path / "part")["metrics"]


def test_answers_are_kept_where_judging_fails_and_another_judge_judges_all(command, judge, tmp_path, monkeypatch):
    status, _, err = command("--alpaca_annotator", judge("neither"))
    assert status == 2 and "could not judge the outputs (" in err
    assert (tmp_path / "out" / JOURNAL).exists() and not (tmp_path / "out" / RESULT).exists()
    monkeypatch.setattr(journal, "greedy_generate", None)  # nothing is left to answer
    assert command("--alpaca_annotator", judge("m"))[0] == 0 and "note" not in record(tmp_path / "out")
    assert not list((tmp_path / "out").glob("alpaca_verdicts*"))


def test_verdicts_are_kept_until_the_result_is_written(command, judge, tmp_path, monkeypatch):
    def killed(path, result):
        raise KeyboardInterrupt

    words = ["--alpaca_annotator", judge("m")]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_result", killed)
        assert command(*words)[0] == 130
    out = tmp_path / "out"
    assert list(out.glob("alpaca_verdicts*")) and not (out / RESULT).exists()
    assert command(*words)[0] == 0
    assert sorted(file.name for file in out.iterdir()) == sorted([ALPACA_OUTPUTS, RESULT])


@pytest.mark.parametrize(
    "words,content,message",
    [
        (["--alpaca_annotator", "weighted_alpaca_eval"], None, "is neither a file nor an annotator of alpaca_eval"),
        (["--reference_outputs", "nowhere.json"], None, "data file nowhere.json does not exist"),
        ([], "[]", "AlpacaEval's files are JSON lists of objects with instruction and output"),
        ([], '[{"instruction": "a"}]', "AlpacaEval's files are JSON lists of objects"),
        ([], r'[{"instruction": "\ud83d", "output": "b"}]', "references.json: row 1: '\\ud83d' is half a surrogate"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words, content, message, command, tmp_path):
    if content is not None:
        (tmp_path / "references.json").write_text(content)
    status, _, err = command(*words)
    assert status == 2 and message in err.strip().splitlines()[-1] and not (tmp_path / "out").exists()
