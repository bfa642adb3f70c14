"""What README.md and the recipes say is run."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from maskft_lab.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def users_folder(base, tmp_path, monkeypatch):
    """A folder with the files README talks about."""
    (tmp_path / "my-model").symlink_to(base)
    for name in ("train.jsonl", "test.jsonl"):
        rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(8) for b in range(8)]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    options = yaml.safe_load(re.search(r"```yaml\n(# train.yaml.*?)```", README, re.DOTALL).group(1))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(options | {"bf16": False}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_example(users_folder):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    size = os.path.getsize("runs/mask/adapter/adapter_model.safetensors")
    assert size < 14 * 1024 * 2 and (users_folder / "merged" / "config.json").is_file()


def test_command_lines(users_folder, capsys):
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "maskft train" in b)
    for line in block.strip().replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] == "maskft" and main(words[1:]) == 0, (line, capsys.readouterr().err)


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)|src(?:set)?=\"([^\"]+)\"", page.read_text()):
            assert (page.parent / "".join(target)).exists(), f"{page.name} links to {''.join(target)}"


def test_files_and_names_in_the_docs_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        if page.name == "LOG.md":
            continue  # it is about files as they were
        for folder, name, member in re.findall(r"`((?:\w+/)*)(\w+\.py)(?:: (\w+)[^`]*)?`", page.read_text()):
            found = [p for p in ROOT.rglob(name) if str(p).endswith(f"/{folder}{name}") and ".venv" not in p.parts]
            assert found, f"{page.name} names {folder}{name}"
            assert not member or any(re.search(rf"(class|def) {member}\b", p.read_text()) for p in found), member


def test_what_the_architecture_page_points_at_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    pairs = re.findall(r"`([\w/]+\.py)`\s\(`(\w+)`\)", page)
    assert len(pairs) >= 8
    for file, name in pairs:
        source = (ROOT / "src" / "maskft" / file).read_text()
        assert re.search(rf"(def|class) {name}\b", source), f"docs/architecture.md: {file} has no {name}"


def test_the_architecture_page_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "maskft").rglob("*.py"):
        assert path.name.startswith("_") or f"`{path.name}`" in page, f"docs/architecture.md has no {path.name}"
    for room in (ROOT / "src" / "maskft").glob("*/__init__.py"):
        assert f"`{room.parent.name}/`" in page, f"docs/architecture.md has no {room.parent.name}/"


def test_every_page_and_every_room_stands_in_the_navigation_of_the_site():
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.MULTILINE)
    docs = ROOT / "docs"
    pages = [str(page.relative_to(docs)) for page in docs.rglob("*.md")]
    rooms = [f"reference/{path.parent.name}.md" for path in (ROOT / "src" / "maskft").rglob("__init__.py")]
    assert sorted(listed) == sorted([*pages, *rooms]), "add the page to nav in mkdocs.yml"


def test_prose_is_wrapped_at_100_columns():
    pages = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    lines = [(p.name, n, line) for p in pages for n, line in enumerate(p.read_text().splitlines(), 1)]
    assert not [f"{p}:{n}: {len(line)} columns" for p, n, line in lines if len(line) > 100 and line[0] != "|"]


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets) and all(f"\n{t}:" in makefile for t in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_public_names_are_documented_and_importable():
    import maskft

    for name in maskft.__all__:
        assert getattr(maskft, name) is not None
    assert set(COMMANDS) >= {"demo", "train", "evaluate", "compare", "merge", "inspect", "verify", "env"}


def test_no_path_of_a_machine_in_the_repository():
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("results/**/*.json"),
        *ROOT.glob("src/**/*.py"),
    ]:
        text = path.read_text()
        assert not re.search(r"/(home|root|work|Users)/\w", text), path
