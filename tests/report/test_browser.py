"""The page in a real browser: Debian's Chromium, driven by Playwright (``make test-browser``)."""

import io

import pytest
from PIL import Image

from maskft_lab.cli.main import main

pytestmark = pytest.mark.browser
SECTIONS = ("verdict", "table", "curves", "ablations", "masks", "landscape", "theory", "cost", "recipe")


@pytest.fixture(scope="module")
def report(finished):
    file = finished.parent / "study.html"
    assert main(["report", str(finished), "-o", str(file)]) == 0
    return file


@pytest.fixture
def open_page(browser, report):
    """Open a page from disk; at the end nothing was logged, nothing failed, and no request had left."""
    opened, problems = [], []

    def open_(**options):
        page = browser.new_page(**{"viewport": {"width": 1100, "height": 900}, **options})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        page.goto(report.as_uri())
        opened.append(page)
        return page

    yield open_
    for page in opened:
        page.close()
    assert problems == []


def test_light_and_dark(open_page):
    page = open_page(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != dark
    light = open_page(color_scheme="light")
    assert light.evaluate(background) == page.evaluate(background)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(scheme, open_page):
    page = open_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    widths = page.eval_on_selector_all(".picture svg", "each => each.map(svg => svg.getBoundingClientRect().right)")
    assert len(widths) > 10 and max(widths) <= 360  # no chart is cut
    # Tables may be, and exactly those that are say so.
    assert page.evaluate(
        """[...document.querySelectorAll(".scroll")].every((box) => {
            const isCut = box.scrollWidth > box.clientWidth + 1;
            const says = box.nextElementSibling?.textContent === "More columns: scroll to the right.";
            return isCut === says;
        })"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme, open_page):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(color_scheme=scheme)
    for details in page.query_selector_all("details"):
        details.evaluate("each => { each.open = true; }")
    found = Axe().run(page).response["violations"]
    serious = [
        (each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_section_is_blank(scheme, open_page):
    page = open_page(color_scheme=scheme)
    for section in SECTIONS:
        image = Image.open(io.BytesIO(page.locator(f"main > #{section}").screenshot())).convert("RGB")
        colours = image.getcolors(maxcolors=image.width * image.height)
        share = max(count for count, _ in colours) / (image.width * image.height)
        assert len(colours) > 20 and share < 0.99, section
    assert page.locator("figure svg path").count() > 100
