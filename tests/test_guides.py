"""Every code block of the guides, and those of other pages that name a language, run beside a tiny model; the site."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from maskft.tuner.selection import LEARNERS
from maskft_common.yaml_file import read_yaml
from maskft_lab.cli.main import main
from maskft_lab.study.load_recipe import parse_recipe

from .forking import forked, run_script
from .tiny import tiny_llama
from .tiny_gguf import write_gguf

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
# Of other pages what has a language is run; blocks without one show commands, whose options test_readme.py looks up.
OTHERS = [page for page in sorted((ROOT / "docs").glob("*.md")) if re.search("```(bash|python)", page.read_text())]
LOADED = re.compile(r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+stylesheet"[^>]+href="([^"]+)"')
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SLOW = {"compatibility"}  # its commands start processes, which import everything


@pytest.fixture
def users_folder(base, tmp_path, monkeypatch):
    (tmp_path / "my-model").symlink_to(base)
    (tmp_path / "my-gguf").mkdir()
    gguf_model = tiny_llama(2, 288, hidden_size=64, intermediate_size=96, head_dim=16)
    write_gguf(tmp_path / "my-gguf" / "base.gguf", gguf_model)
    for name, sums in (("train.jsonl", range(8)), ("test.jsonl", range(8, 12))):
        rows = [(a, b, a + b) for a in sums for b in range(8)]
        rows = [
            {"prompt": f"{a}+{b}=", "completion": f"{c}", "answer": f"{c}", "answer_type": "number"} for a, b, c in rows
        ]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(LEARNERS):  # a page that adds a learner adds it for itself
        yield tmp_path


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
    "page", [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else [], id=p.stem) for p in (*GUIDES, *OTHERS)]
)
def test_every_block_runs(page, users_folder, capsys):
    blocks = BLOCK.findall(page.read_text())
    names: dict = {}
    for language, text in blocks:
        if page in GUIDES or language in ("bash", "python"):
            run_block(language, text, names, capsys)
    assert any(language in ("bash", "python") for language, _ in blocks)


def test_the_recipes_of_a_page_are_recipes(tmp_path):
    """Parts of one are read as parts of the first; a path is of methods that start from the base model."""
    text = (ROOT / "docs" / "studies.md").read_text()
    contents = []
    for _, block in BLOCK.findall(text):
        if re.match(r"[a-z_]+:\s", block):
            (tmp_path / "block.yaml").write_text(block)
            contents.append(read_yaml(tmp_path / "block.yaml"))
    first, *parts = contents
    assert parse_recipe(first).name == "my-study" and len(parts) >= 3
    del first["grid"]
    for part in parts:
        content = first | part | {"methods": first["methods"] | part.get("methods", {})}
        if "path" in part:
            chosen = {name: each for name, each in content["methods"].items() if "from" not in each}
            content["methods"] = {name: each | {"last": None} for name, each in chosen.items()}
        assert parse_recipe(content).name == "my-study"


def test_the_script_of_the_evidence_prints_what_the_page_says(tmp_path):
    words = [ROOT / "recipes" / "evidence.py", ROOT / "results" / "small-products-adapters", "--controls", "full"]
    out = tmp_path / "out.txt"
    assert forked(lambda: run_script(*words), out) == 0, out.read_text()[-2000:]
    (row,) = [line for line in out.read_text().splitlines() if line.startswith("| mask, 30 % |")]
    assert "Differences have unadjusted 95 % intervals; bold: distinguishable after Holm's" in out.read_text()
    assert "| **+6.3 [3.9, 8.8]** |" in row and "| **+6.3 [3.9, 8.8]** |" in (ROOT / "docs" / "evidence.md").read_text()


def test_the_demo_of_the_first_guide_is_a_page():
    (shown,) = re.findall(r"```text\nquestion .*?```", (ROOT / "docs/guides/quickstart.md").read_text(), re.DOTALL)
    lines = shown.splitlines()[1:-1]
    # Eight lines of the ready mask, and a page.
    assert len(lines) <= 8 + 26 and max(map(len, lines)) <= 80


def test_the_first_page_leads_to_every_guide():
    index = (ROOT / "docs" / "index.md").read_text()
    assert len(GUIDES) >= 4 and all(f"](guides/{guide.name})" in index for guide in GUIDES)


def test_every_column_of_a_table_has_a_name():
    # A screen reader says a column's name before a cell; the browser's test of the whole site is slower.
    pages = sorted((ROOT / "docs").rglob("*.md"))
    # A table's header is the line above its line of dashes.
    headers = re.compile(r"^(\|.*\|) *\n\|[ :|-]+\|$", re.MULTILINE)
    found = [(page.name, header) for page in pages for header in headers.findall(page.read_text())]
    assert len(found) > 20
    nameless = [each for each in found if "" in [cell.strip() for cell in each[1].split("|")[1:-1]]]
    assert nameless == []


def test_no_row_of_a_table_is_cut_off_from_its_header():
    """An empty line ends a table: the rows below it are shown as text with bars."""
    # The first row of a block of rows is a header, so a line of dashes follows it.
    blocks = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for block in blocks.findall(text):
            first, second, *_ = [*block.splitlines(), ""]
            assert re.fullmatch(r"\|[ :|-]+\|", second), (page.name, first)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with --strict: a broken link is an error."""
    pytest.importorskip("mkdocs", reason="needs maskft[docs]")
    folder = tmp_path_factory.mktemp("site")
    words = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    ran = subprocess.run([sys.executable, "-m", "mkdocs", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    page = (site / "reference" / "tuner.html").read_text()
    assert "Fields of MaskConfig" in page and "Fraction of the target weights to REMOVE" in page
    assert ":class:" not in page
    assert "results/small-products-tuned/table.md" in (site / "evidence.html").read_text()
    loaded = {url for file in site.rglob("*.html") for pair in LOADED.findall(file.read_text()) for url in pair if url}
    assert loaded and not [url for url in loaded if url.startswith(("http:", "https:", "//"))]


@pytest.mark.browser
def test_from_disk_the_site_searches_and_switches_its_colours(site, browser):
    page, problems = browser.new_page(color_scheme="dark"), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
    page.goto((site / "index.html").as_uri())
    # Keys, as the page listens to them: text put in at once after the index is ready starts no search.
    page.locator("input.md-search__input").press_sequentially("sparsity")
    page.wait_for_selector(".md-search-result__item")
    page.keyboard.press("Escape")
    assert page.get_attribute("body", "data-md-color-scheme") == "slate"
    page.locator("label.md-header__button[title]:visible").first.click()
    page.wait_for_selector("body[data-md-color-scheme=default]")
    page.close()
    assert problems == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_as_wide_as_a_phone(site, browser, scheme):
    from axe_playwright_python.sync_playwright import Axe

    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    assert len(pages) > 30
    page, found = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800}), {}
    for each in pages:
        page.goto(each.as_uri())
        wrong = [(v["id"], v["nodes"][0]["html"][:200]) for v in Axe().run(page).response["violations"]]
        if page.evaluate("document.documentElement.scrollWidth") > 390:
            wrong.append(("wider than the screen", ""))
        found |= {each.relative_to(site).as_posix(): wrong} if wrong else {}
    page.close()
    assert found == {}
