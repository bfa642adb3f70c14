"""Time of a mask step against tokens, masked layers and accumulation: measured points and a fitted line."""

from __future__ import annotations

import statistics

import numpy as np

from .common import SMOLLM2, TINY, Step, build, prepare, seconds


def run(report) -> None:
    """Add the rows and draw the plot."""
    shape, unit = (TINY, 8) if report.quick else (SMOLLM2, 64)
    last = 3 if report.quick else 23
    rounds = min(2, report.rounds)

    def time(layers: int, tokens: int, accumulation: int) -> float:
        chosen = list(range(last + 1 - layers, last + 1))
        step = Step(
            prepare("mask", build(shape, report.device), chosen),
            shape["vocab_size"],
            tokens,
            accumulation,
            report.device,
        )
        step()
        return statistics.median(seconds(step, report.device) for _ in range(rounds))

    axes = {
        "tokens": ([unit, 2 * unit, 4 * unit], lambda x: time(2, x, 2)),
        "masked layers": ([1, 2] if report.quick else [1, 2, 4, 8, 16], lambda x: time(x, unit, 2)),
        "accumulation": ([1, 4, 16], lambda x: time(2, unit, x)),
    }
    curves = {}
    for name, (points, measure) in axes.items():
        times = [measure(x) for x in points]
        slope, intercept = np.polyfit(points, times, 1)
        curves[name] = (points, times, slope, intercept)
        report.add(
            "scaling",
            f"seconds of a step per unit of {name}",
            float(slope),
            "s",
            intercept_s=float(intercept),
            points=points,
            times_s=times,
            doubling=times[-1] / times[-2] / (points[-1] / points[-2]),
        )
    _plot(curves, report)


def _plot(curves: dict, report) -> None:
    try:
        import matplotlib
    except ImportError:
        report.console.print("scaling.png is not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(11, 3.4), layout="constrained")
    for panel, (name, (points, times, slope, intercept)) in zip(panels, curves.items(), strict=True):
        panel.plot(points, [slope * x + intercept for x in points], color="0.6", label=f"{slope:.3g} s per unit")
        panel.plot(points, times, "o")
        panel.set(xlabel=name, ylabel="time of a step (s)", ylim=(0, None))
        panel.legend(frameon=False)
    report.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(report.folder / "scaling.png", dpi=120)
