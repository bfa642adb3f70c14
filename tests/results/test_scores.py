"""``maskft compare`` of one method: its scores."""

from maskft_lab.cli.main import main
from maskft_lab.results.schema import build_result, build_task, metric_from_items, write_result


def test_seeds_of_different_tasks_have_nothing_to_show(tmp_path, capsys):
    items = [{"id": "a", "accuracy": 1}, {"id": "b", "accuracy": 0}]
    task = build_task(
        items, {"accuracy": metric_from_items(items, "accuracy")}, version=1, num_fewshot=0, fingerprint="f"
    )
    for seed, name in enumerate(("sums", "products")):
        result = build_result("mask", {"name_or_path": "m", "seed": seed}, {}, {name: task})
        write_result(tmp_path / str(seed) / "result.json", result)
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "1")]) == 2
    assert "the 2 results of mask have no metric in common: give those of one task" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "0")]) == 0
    assert "50.0" in capsys.readouterr().out
