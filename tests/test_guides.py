"""Every code block of docs/guides is run, in order, beside a tiny model and files; the site."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from maskft_lab.cli.main import main

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SLOW = {"many_gpus"}  # its commands start processes, which import everything


@pytest.fixture
def users_folder(base, tmp_path, monkeypatch):
    (tmp_path / "my-model").symlink_to(base)
    for name, sums in (("train.jsonl", range(8)), ("test.jsonl", range(8, 12))):
        rows = [(a, b, a + b) for a in sums for b in range(8)]
        rows = [
            {"prompt": f"{a}+{b}=", "completion": f"{c}", "answer": f"{c}", "answer_type": "number"} for a, b, c in rows
        ]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_block(language: str, text: str, names: dict, capsys) -> None:
    if language == "python":
        exec(compile(text, "guide.py", "exec"), names)
    elif language == "bash":
        for line in text.strip().replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "maskft" and main(words[1:]) == 0, (line, capsys.readouterr().err[-2000:])
    elif language == "yaml":
        name = re.match(r"# ([\w.]+)\n", text)
        assert name, "the first line of a file is a comment with its name"
        Path(name[1]).write_text(text)
    elif language == "json":
        assert json.loads(text) in [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    else:
        assert language == "text", f"a block of {language!r} is not run by this test"


@pytest.mark.parametrize(
    "guide", [pytest.param(g, marks=pytest.mark.slow if g.stem in SLOW else [], id=g.stem) for g in GUIDES]
)
def test_every_block_runs(guide, users_folder, capsys):
    blocks = BLOCK.findall(guide.read_text())
    names: dict = {}
    for language, text in blocks:
        run_block(language, text, names, capsys)
    assert any(language in ("bash", "python") for language, _ in blocks)


def test_there_are_five_guides_and_the_first_page_leads_to_each():
    assert len(GUIDES) == 5
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"](guides/{guide.name})" in index for guide in GUIDES)


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="needs maskft[docs]")
    words = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run([sys.executable, "-m", "mkdocs", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    page = (tmp_path / "site" / "reference" / "tuner.html").read_text()
    assert "Fields of MaskConfig" in page and "Fraction of the target weights to REMOVE" in page
    assert ":class:" not in page
    assert "results/small-products/table.md" in (tmp_path / "site" / "results_so_far.html").read_text()
