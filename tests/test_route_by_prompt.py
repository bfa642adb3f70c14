"""examples/route_by_prompt.py on a tiny model: prompts of three kinds of exercise go to their tasks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "route_by_prompt.py"
SIGNS = {"sums": "+", "products": "*", "differences": "-"}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("route_by_prompt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    """Task -> training file and test file, of prompts that differ."""
    found = {}
    for task, sign in SIGNS.items():
        rows = [{"prompt": sign.join([str(a), str(b), str(a), "="])} for a in range(7) for b in range(7)]
        for part, some in (("train", rows[::2]), ("test", rows[1::2])):
            file = tmp_path / f"{task}_{part}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in some))
            found[task, part] = file
    return found


def test_prompts_go_to_their_tasks(script, base, files, monkeypatch, capsys):
    train = [f"{task}={files[task, 'train']}" for task in SIGNS]
    test = [f"{task}={files[task, 'test']}" for task in SIGNS]
    monkeypatch.setattr(sys, "argv", ["route", str(base), *train, "--test", *test])
    script.main()
    printed = capsys.readouterr().out.splitlines()
    num_right, num_routed = map(int, printed[-1].removeprefix("all: ").split(" of "))
    assert num_routed == 3 * 24
    # A third would be chance.
    assert num_right > 0.9 * num_routed


def test_a_batch_changes_no_route(script, base, files):
    from maskft.models import load_model, load_tokenizer

    prompts = {task: script.read_prompts(str(files[task, "train"]), 8) for task in SIGNS}
    router = script.Router(load_model(str(base)).eval(), load_tokenizer(str(base)), prompts)
    mixed = ["1+2+1=", "1*2*1=1*2*1=1*2*1=", "3-3-3="]
    assert router.route(mixed) == [router.route([prompt])[0] for prompt in mixed]


def test_a_file_without_a_name_is_an_error_of_the_command_line(script, base, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["route", str(base), "sums_train.jsonl"])
    with pytest.raises(SystemExit):
        script.main()
    assert "'sums_train.jsonl' is not NAME=FILE" in capsys.readouterr().err
