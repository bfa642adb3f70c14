"""recipes/smollm2/skills_that_add_up.py on a tiny model: every combination is measured, nothing is trained twice."""

import gzip
import json
import sys

import pytest

from maskft import MaskConfig
from maskft_common.errors import UserError
from recipe_scripts import script_of

PROBES = ("instructions", "wikipedia")


@pytest.fixture
def script(monkeypatch):
    return script_of("skills_that_add_up", monkeypatch)


@pytest.fixture
def sequence(script, monkeypatch):
    return script_of("skills_in_sequence", monkeypatch)


@pytest.fixture
def second_mask(script, monkeypatch):
    return script_of("skills_second_mask", monkeypatch)


def write(file, rows):
    with gzip.open(file, "wt") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    signs = {"sums": "+", "products": "*", "powers": "-"}
    for task, sign in signs.items():
        rows = [{"prompt": f"{a}{sign}{b}=", "completion": f"{a}"} for a in range(6) for b in range(6)]
        write(folder / f"{task}_train.jsonl.gz", rows)
        write(folder / f"{task}_test.jsonl.gz", rows[::5])
    for probe in PROBES:
        write(folder / f"{probe}_report.jsonl.gz", [{"text": "one two"}, {"text": "three four five"}])
    return folder


def test_skills_that_add_up(script, data, base, tmp_path, monkeypatch, capsys):
    tasks = ["sums", "products", "powers"]
    sizes = ["--steps", "3", "--num_heldout", "4", "--num_test", "6", "--num_probe", "2"]
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), "--tasks", *tasks, *sizes]
    monkeypatch.setattr(sys, "argv", words)
    script.main()

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    combined = {"sums+products", "sums+powers", "products+powers", "sums+products+powers"}
    assert result["base"]["hits"].keys() == set(tasks)
    for method in ("mask", "lora", "full"):
        assert result["methods"][method].keys() == {*tasks, *combined}
    for method, ways in script.WAYS.items():
        pair = result["methods"][method]["sums+powers"]
        assert {task: len(hits) for task, hits in pair["hits"].items()} == {"sums": 6, "powers": 6}
        assert len(pair["heldout_accuracy_of_ways"]) == len(ways)
        assert pair["way"] in ways
    picture = (tmp_path / "out" / "retained.svg").read_text()
    assert "sums + products + powers" in picture
    assert (tmp_path / "out" / "retained.dark.svg").is_file()
    # Each task has six labels, so the second table has every row too.
    for printed in capsys.readouterr().out.split("Right as written"):
        assert printed.count("| union of masks |") == len(combined)
        assert printed.count("| LoRA r 16 |") == printed.count("| full fine-tuning |") == len(combined) + len(tasks)
    hits = result["methods"]["mask"]["sums+powers"]["label_hits"]
    assert {task: len(found) for task, found in hits.items()} == {"sums": 6, "powers": 6}

    files = sorted((tmp_path / "out" / "adapters").rglob("*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    script.main()
    assert [file.stat().st_mtime_ns for file in files] == written
    assert json.loads((tmp_path / "out" / "result.json").read_text())["methods"] == result["methods"]


def test_adapters_of_other_settings_are_not_combined(script, second_mask, data, base, tmp_path, monkeypatch):
    """Also after a call that was killed in a training, when nothing was measured yet."""
    out = tmp_path / "out"
    words = ["skills", str(data), str(out), "--model", str(base), "--tasks", "sums", "products", "--num_heldout", "4"]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "2"])

    class Killed(Exception):
        pass

    def killed(*args):
        raise Killed

    monkeypatch.setattr(script, "measure_combinations", killed)
    trained = script.train
    monkeypatch.setattr(script, "train", killed)
    with pytest.raises(Killed):
        script.main()
    monkeypatch.setattr(script, "train", trained)
    with pytest.raises(Killed):
        script.main()

    monkeypatch.setattr(sys, "argv", [*words, "--steps", "3"])
    with pytest.raises(UserError, match="has other settings"):
        script.main()
    of_two = ["--first", "sums", "--second", "products"]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "3", *of_two])
    with pytest.raises(UserError, match="were trained with --steps 2, not 3"):
        second_mask.main()
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "2", "--first", "sums", "--second", "powers"])
    with pytest.raises(UserError, match=r"mask-powers-s0 is missing: run skills_that_add_up\.py first"):
        second_mask.main()


def test_no_rows_are_left_to_train_on(script, data, base, tmp_path, monkeypatch, capsys):
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), "--tasks", "sums"]
    monkeypatch.setattr(sys, "argv", [*words, "--num_heldout", "36"])
    with pytest.raises(UserError, match="no rows of sums to train, of 36 in its training file, 36 held out"):
        script.main()
    # With none held out, the slice of the last none would be all rows.
    monkeypatch.setattr(sys, "argv", [*words, "--num_heldout", "0"])
    with pytest.raises(SystemExit):
        script.main()
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def result_of(alone, combined):
    found = {task: {"hits": {task: hits}} for task, hits in alone.items()}
    return {"methods": {"mask": {**found, "a+b": {"hits": combined}}}}


def test_the_retained_share_by_hand(script):
    alone = {"a": [1, 1, 1, 1], "b": [1, 1, 0, 0]}
    one = result_of(alone, {"a": [1, 1, 0, 0], "b": [1, 1, 0, 0]})
    values = script.retained([one], "mask", "a+b")
    assert values.shape == (1, 8)
    assert values.mean() == pytest.approx(75)  # half of one task and all of the other
    share, low, high = script.shown(values, 0.95)
    assert share == pytest.approx(75)
    assert low < share < high

    other = result_of(alone, {"a": [1, 1, 1, 1], "b": [0, 0, 0, 0]})
    values = script.retained([one, other, one], "mask", "a+b")
    # Of the first task 8 of 12 answers are left, of the second 4 of 6.
    assert values.shape == (3, 8)
    assert values.mean() == pytest.approx(100 * (8 / 12 + 4 / 6) / 2)


def test_full_fine_tunings_are_combined_by_their_changes(script, data, base, tmp_path, monkeypatch):
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), "--tasks", "sums", "products"]
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "full", "--steps", "2", "--num_heldout", "4"])
    script.main()
    parser = script.argparse.ArgumentParser()
    script.add_options(parser)
    args = parser.parse_args(["--model", str(base), "--tasks", "sums", "products"])
    args.out = tmp_path / "out"
    tasks = [script.Task(name, [], [], [], ()) for name in args.tasks]
    fulls = script.Fulls(tasks, args)
    name = next(name for name in fulls.base if "gate_proj" in name)
    before = fulls.base[name]

    def weight():
        return dict(fulls.model.named_parameters())[name]

    fulls.select(["sums"], None)
    of_sums = weight().detach().clone()
    fulls.select(["products"], None)
    of_products = weight().detach().clone()
    fulls.select(["sums", "products"], {"combination_type": "arithmetic", "weight": 0.5})
    script.torch.testing.assert_close(weight().detach(), (of_sums + of_products) / 2)
    fulls.select(["sums", "products"], {"combination_type": "ties", "weight": 1.0, "density": 0.2})
    num_changed = int((weight().detach() != before).sum())
    assert 0.2 * before.numel() <= num_changed <= 0.4 * before.numel()


def test_left_padding_does_not_change_the_loss(script, base, capsys):
    from maskft.data.tokenizing import tokenize_example
    from maskft.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(base))
    rows = [tokenize_example({"prompt": "1+" * n + "1=", "completion": "23"}, tokenizer) for n in range(1, 5)]
    model = load_model(str(base))
    model.requires_grad_(True)
    script.learn(model, rows, 1e-9, 8, tokenizer, 0, "all rows")
    printed = float(capsys.readouterr().out.split("loss ")[1].split(",")[0])
    ids, attention = script.pad([row["input_ids"] for row in rows], 0, model.device)
    labels, _ = script.pad([row["labels"] for row in rows], script.IGNORED, model.device)
    with script.torch.autocast("cpu", script.torch.bfloat16):
        loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
    assert printed == pytest.approx(loss.item(), abs=0.01)


def test_accuracy_counts_rows_that_are_right_in_all_tokens(script, base):
    from maskft.data.tokenizing import tokenize_example
    from maskft.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(base))
    model = load_model(str(base))
    measure = script.Measure(tokenizer, {})
    rows = [tokenize_example({"prompt": f"{a}+1=", "completion": "2"}, tokenizer) for a in range(4)]
    assert measure.hits(model, rows) == [0, 0, 0, 0]
    for row in rows:  # the model's own answer is right
        row["labels"] = [script.IGNORED] * len(row["labels"])
        ids, attention = script.pad([row["input_ids"]], 0, model.device)
        with script.torch.autocast("cpu", script.torch.bfloat16), script.torch.no_grad():
            answer = int(model(input_ids=ids, attention_mask=attention).logits[0, -2].argmax())
        row["input_ids"][-1] = answer
        row["labels"][-1] = answer
    assert measure.hits(model, rows) == [1, 1, 1, 1]


def test_accuracy_among_labels(script, base):
    """The most probable of the labels' first tokens, whatever the model would write."""
    from maskft.data.tokenizing import tokenize_example
    from maskft.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(base))
    model = load_model(str(base)).eval()
    measure = script.Measure(tokenizer, {})
    rows = [
        tokenize_example({"prompt": f"{a}+{b}=", "completion": f"{a % 3}"}, tokenizer)
        for a in range(9)
        for b in (1, 22)
    ]
    label_ids = script.label_ids_of(rows)
    assert len(label_ids) == 3
    expected = []
    for row in rows:
        start = next(place for place, label in enumerate(row["labels"]) if label != script.IGNORED)
        ids = script.torch.tensor([row["input_ids"][:start]])
        with script.torch.autocast("cpu", script.torch.bfloat16), script.torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        best = max(label_ids, key=lambda label: float(logits[label]))
        expected.append(int(best == row["labels"][start]))
    assert measure.hits(model, rows, label_ids) == expected
    assert 0 < sum(expected) < len(expected)

    task = script.Task("few", rows, [], rows, label_ids)
    assert measure.label_hits(model, [task, script.Task("many", rows, [], rows, ())]) == {"few": expected}


def test_labels_that_begin_alike_or_are_many_are_no_choice(script):
    def rows(*completions):
        return [{"labels": [script.IGNORED, *completion]} for completion in completions]

    assert script.label_ids_of(rows([5, 1], [7, 1], [5, 1])) == (5, 7)
    assert script.label_ids_of(rows([5, 1], [5, 2])) == ()
    assert script.label_ids_of(rows(*([place] for place in range(9)))) == ()


@pytest.mark.slow
def test_skills_in_sequence(script, sequence, data, base, tmp_path, monkeypatch, capsys):
    tasks = ["sums", "products", "powers"]
    sizes = ["--steps", "3", "--num_heldout", "4", "--num_test", "6", "--num_probe", "2"]
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), "--tasks", *tasks, *sizes]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    sequence.main()

    result = json.loads((tmp_path / "out" / "sequence.json").read_text())
    names = {"mask a task", "lora a task", "union of masks", *sequence.SEQUENTIAL}
    assert result.keys() == {"settings", "base", *names}
    for name in names:
        after = result[name]["after"]
        assert [list(hits) for hits in after] == [tasks[:1], tasks[:2], tasks]
    # A task that has an adapter to itself loses nothing.
    for name in ("mask a task", "lora a task"):
        assert result[name]["after"][0]["sums"] == result[name]["after"][2]["sums"]
    # The union is the mask alone after the first task.
    assert result["union of masks"]["after"][0] == result["mask a task"]["after"][0]
    text = (tmp_path / "out" / "sequence.md").read_text()
    assert all(f"| {name} |" in text for name in names)


def test_a_second_mask_trained_for_a_union(script, second_mask, data, base, tmp_path, monkeypatch, capsys):
    for module in (script, second_mask):
        # At the price of the preset, a tiny random model removes nothing.
        monkeypatch.setattr(module, "MaskConfig", lambda **options: MaskConfig(**options | {"price": 0.0}))
    monkeypatch.setitem(script.DEFAULT_RATE, "mask", 0.05)
    monkeypatch.setitem(script.RATES["mask"], "sums", 0.05)
    sizes = ["--steps", "16", "--num_heldout", "4", "--num_test", "6", "--num_probe", "2"]
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), *sizes, "--tasks", "sums", "products"]
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "mask"])
    script.main()
    monkeypatch.setattr(sys, "argv", [*words, "--first", "sums", "--second", "products"])
    second_mask.main()

    found = json.loads((tmp_path / "out" / "second_mask-sums-products.json").read_text())
    ways = found["ways"]
    assert ways.keys() == {"by itself", *second_mask.WAYS}
    assert all(row["union"]["hits"].keys() == {"sums", "products"} for row in ways.values())
    assert ways["by itself"]["num_common"] > 0 == ways["apart"]["num_common"]
    # The union of the masks as they were trained alone is that of the other recipe.
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    union = result["methods"]["mask"]["sums+products"]
    assert ways["by itself"]["union"]["hits"] == union["hits"]
    assert ways["by itself"]["union"]["probes"] == pytest.approx(union["probes"], abs=1e-3)
    printed = capsys.readouterr().out
    assert all(f"| {way} |" in printed for way in ways)


def test_random_removal_starts_from_the_values_each_time(script, second_mask):
    torch = script.torch
    weight = torch.ones(50, 40)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(3):
        second_mask.remove_at_random({"a": weight}, {"a": torch.ones(50, 40)}, {"a": 0.25}, generator)
        counts.append(int((weight == 0).sum()))
    assert all(400 < count < 600 for count in counts)
    assert len(set(counts)) > 1


def test_replay_replaces_six_percent_of_the_rows(script, sequence):
    first = script.Task("first", [{"input_ids": [1, place]} for place in range(100)], [], [], ())
    second = script.Task("second", [{"input_ids": [2, place]} for place in range(100)], [], [], ())
    rows = sequence.with_replay(second, [first], seed=0)
    assert [row["input_ids"][0] for row in rows] == [2] * 94 + [1] * 6
    assert sequence.with_replay(first, [], seed=0) == first.train


def test_overlap_of_loras_by_hand(script, sequence, base):
    """The penalty of O-LoRA; its gradient reaches the new adapter alone."""
    torch = script.torch
    model = script.get_peft_model(script.load(str(base)), script.lora_config(), adapter_name="a")
    for name in ("b", "new"):
        model.add_adapter(name, script.lora_config())
    layers = [module for module in model.modules() if isinstance(module, sequence.LoraLayer)]
    for layer in layers:
        for name in ("a", "b"):
            layer.lora_A[name].weight.requires_grad_(False)
        layer.lora_A["new"].weight.requires_grad_(True)
    assert sequence.overlap(model, "new", []) == 0

    expected = 0.0
    for layer in layers:
        for name in ("a", "b"):
            for row in layer.lora_A[name].weight:
                for new_row in layer.lora_A["new"].weight:
                    expected += abs((row * new_row).sum().item())
    found = sequence.overlap(model, "new", ["a", "b"])
    assert float(found) == pytest.approx(0.5 * expected, rel=1e-4)
    found.backward()
    assert layers[0].lora_A["new"].weight.grad.any() and layers[0].lora_A["a"].weight.grad is None

    # Orthogonal to both: nothing to punish.
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["new"].weight.zero_()
    assert sequence.overlap(model, "new", ["a", "b"]) == 0
