"""Draw the pictures of README and docs beside this file, light and dark: ``python docs/images/draw.py``.

``weights_times_mask`` is drawn here; the figures are those of ``maskft report --figures`` on published results.
"""

import json
import random
from pathlib import Path

from maskft_lab.report.charts import files_of
from maskft_lab.report.fig_gain import chart_of, curve_of_record

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"

# Name of a picture -> study, probe, and the methods that are drawn (none named: all).
FIGURES = {
    "gain_forgetting": ("smollm2-curve-banking77-kl-seeds", "instructions", ()),
    "gain_forgetting_text": (
        "smollm2-curve-sums",
        "wikipedia",
        ("deletion mask", "full", "LoRA r 16", "DoRA r 16", "OFT", "SHiRA"),
    ),
}

ROWS, COLUMNS, CELL = 5, 8, 26
REMOVED = 4  # 10 % of 40
THEMES = {
    "light": {
        "text": "#1f2328",
        "quiet": "#59636e",
        "line": "#d1d9e0",
        "plus": "#0969da",
        "minus": "#bc4c00",
        "keep": "#d1d9e0",
    },
    "dark": {
        "text": "#f0f6fc",
        "quiet": "#9198a1",
        "line": "#3d444d",
        "plus": "#4493f8",
        "minus": "#db6d28",
        "keep": "#3d444d",
    },
}


def draw(theme: dict[str, str]) -> str:
    """The drawing as SVG text."""
    draws = random.Random(7)
    weights = [[draws.gauss(0, 1) for _ in range(COLUMNS)] for _ in range(ROWS)]
    cells = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    removed = set(draws.sample(cells, REMOVED))
    parts = []

    def text(x: float, y: float, words: str, size: int = 14, colour: str = "text", weight: str = "normal") -> None:
        parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{theme[colour]}"'
            f' text-anchor="middle">{words}</text>'
        )

    def square(left: int, row: int, column: int, fill: str, opacity: float = 1.0, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="3 2"' if dashed else ""
        parts.append(
            f'<rect x="{left + column * CELL}" y="{44 + row * CELL}" width="{CELL - 3}" height="{CELL - 3}" rx="3"'
            f' fill="{fill}" fill-opacity="{opacity:.2f}" stroke="{theme["line"]}"{dash}/>'
        )

    left_w, left_m, left_product = 16, 276, 536
    for row, column in cells:
        weight = weights[row][column]
        colour, opacity = theme["plus" if weight > 0 else "minus"], min(1.0, 0.15 + abs(weight) / 2)
        square(left_w, row, column, colour, opacity)
        gone = (row, column) in removed
        square(left_m, row, column, "none" if gone else theme["keep"], dashed=gone)
        text(
            left_m + column * CELL + 11.5, 44 + row * CELL + 16.5, "0" if gone else "1", 12, "text" if gone else "quiet"
        )
        square(left_product, row, column, "none" if gone else colour, opacity, dashed=gone)
    width, bottom = COLUMNS * CELL - 3, 44 + ROWS * CELL
    for left, title, first, second in (
        (left_w, "W", "fine-tuned weights,", "frozen"),
        (left_m, "m", "keeps 90 % by |score|;", "only the scores are trained"),
        (left_product, "W * m", "10 % removed,", "an ordinary checkpoint"),
    ):
        text(left + width / 2, 28, title, 18, weight="bold")
        text(left + width / 2, bottom + 22, first, colour="quiet")
        text(left + width / 2, bottom + 41, second, colour="quiet")
    middle = 44 + ROWS * CELL / 2 + 6
    text((left_w + width + left_m) / 2, middle, "*", 24)
    text((left_m + width + left_product) / 2, middle, "=", 24)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left_product + width + 16} {bottom + 56}" role="img"'
        ' font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        "<title>Frozen weights times a learned binary mask</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def figure(study: str, probe: str, methods: tuple[str, ...]) -> dict[str, bytes]:
    """The picture of gain against forgetting of a published study, light and dark."""
    (file,) = (RESULTS / study).glob(f"curve-*-{probe}.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    points = [point for point in record["points"] if not methods or point["method"] in methods]
    found = files_of(chart_of([curve_of_record(record | {"points": points})]), "figure")
    return {"light": found["figure.svg"], "dark": found["figure.dark.svg"]}


if __name__ == "__main__":
    for name, theme in THEMES.items():
        (HERE / f"weights_times_mask_{name}.svg").write_text(draw(theme), encoding="utf-8")
    for name, about in FIGURES.items():
        for theme_name, content in figure(*about).items():
            (HERE / f"{name}_{theme_name}.svg").write_bytes(content)
