"""The finished study of tiny models with every analysis, made once, and its page."""

import contextlib
import io
import shutil

import pytest

from finished_study import Page, make_study
from maskft_lab.cli.main import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The study with its analyses, read only."""
    folder = tmp_path_factory.mktemp("finished") / "tiny-study"
    make_study(folder)
    words = "--what bound,masks,landscape,curvature --grid 3 --num_rows 4 --num_probes 2"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["analyze", str(folder), *words.split()]) == 0
    return folder


@pytest.fixture
def study(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "study")


@pytest.fixture(scope="session")
def page(finished):
    """The report's text."""
    file = finished.parent / "report.html"
    assert main(["report", str(finished), "-o", str(file)]) == 0
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def parsed(page):
    return Page(page)
