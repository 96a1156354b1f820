"""The page's figures, as SVG text that stands inside HTML."""

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from imgcls.catalogue.published import Published
from imgcls.records import RunResult
from imgcls.results.statistics import Estimate, calibration

INK, FIRST, SECOND, GROUND = "#24292f", "#1f6feb", "#d9730d", "#d0d7de"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "imgcls",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GROUND,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracies(estimated: Sequence[tuple[list[RunResult], Estimate]], published: Mapping[str, Published]) -> str:
    """Test accuracy of each recipe with its interval and its seeds, beside the published figure.

    estimated: by `compare.estimates`.
    """
    with rc_context(STYLE):
        recipes, intervals = [runs[0].recipe.name for runs, _ in estimated], [estimate for _, estimate in estimated]
        names = [
            runs[0].name if recipes.count(recipe) > 1 else recipe
            for recipe, (runs, _) in zip(recipes, estimated, strict=True)
        ]
        places = range(len(estimated))
        figure = Figure(figsize=(7.2, 0.6 + 0.42 * len(estimated)), layout="constrained")
        axes = figure.subplots()
        ends = [interval.low for interval in intervals], [interval.high for interval in intervals]
        axes.plot(ends, [places, places], color=FIRST, linewidth=2)
        axes.plot([interval.center for interval in intervals], places, "o", color=FIRST, label="ours, 95% interval")
        seeds = [(place, run.test.accuracy) for place in places for run in estimated[place][0] if run.test]
        if len(seeds) > len(places):
            axes.plot([value for _, value in seeds], [place + 0.22 for place, _ in seeds], ".", color=INK, label="each seed")
        beside = {place: published[recipe].accuracy for place, recipe in enumerate(recipes) if recipe in published}
        if beside:
            axes.plot([*beside.values()], [*beside], "D", color=SECOND, markersize=5, label="published")
        axes.set_yticks(places, [*map(_short, names)])
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy")
        axes.grid(axis="x", color=GROUND, linewidth=0.5)
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
        return _svg(figure, "test accuracy of each recipe with its interval; the table below has the figures")


def curves(rows: Sequence[Mapping[str, float]], run: str) -> str:
    """Loss and accuracy over epochs, training and validation."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, name in ((left, "loss"), (right, "accuracy")):
            epochs = [row["epoch"] for row in rows]
            for split, color in (("train", FIRST), ("val", SECOND)):
                axes.plot(epochs, [row[f"{split}/{name}"] for row in rows], "o-", color=color, markersize=3, label=split)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(0.5, max(epochs) + 0.5)
            axes.grid(color=GROUND, linewidth=0.5)
        right.legend(frameon=False)
        return _svg(figure, f"{run}: loss and accuracy by epoch, training and validation")


def reliability(table: NDArray[np.void], run: str) -> str:
    """Accuracy in each bin of probability, and the calibration error. table: one of `compare.Predictions`."""
    rows, error = calibration(table["label"] == table["prediction"], table["probability"])
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GROUND, linewidth=1)
        axes.plot(rows[:, 1], rows[:, 2], color=FIRST, linewidth=1)
        axes.scatter(rows[:, 1], rows[:, 2], s=4 + 80 * rows[:, 0] / len(table), color=FIRST)
        axes.set_xlabel("probability of the prediction")
        axes.set_ylabel("accuracy")
        axes.set_title(f"calibration error {error:.3f}", fontsize=9)
        return _svg(figure, f"{run}: accuracy of the predictions in each bin of probability; calibration error {error:.3f}")


NAMED = 20
"""With up to so many classes the figure shows names and counts. With more it does not grow; it shows where mistakes lie."""


def confusion(result: RunResult) -> str:
    """Rows are labels, columns predictions; a cell is the share of its row."""
    assert result.test is not None
    matrix, names = np.array(result.test.confusion), [*map(_short, result.class_names)]
    with rc_context(STYLE):
        side = 0.33 * min(max(6, len(names)), NAMED) + 1.4
        figure = Figure(figsize=(side + 0.4, side), layout="constrained")
        axes = figure.subplots()
        shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= NAMED:
            for (i, j), count in np.ndenumerate(matrix):
                color = "white" if shares[i, j] > 0.5 else INK
                axes.text(j, i, str(count), ha="center", va="center", fontsize=6, color=color)
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        return _svg(figure, f"{result.name}: how often each label was taken for each class")


def _short(name: str) -> str:
    """The name in at most 40 characters: a longer one leaves no room for the figure."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def _svg(figure: Figure, alternative: str) -> str:
    """alternative: text for screen readers."""
    text = io.StringIO()
    with warnings.catch_warnings():  # letters stay text; the reader's browser draws them with its own fonts
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    # HTML needs no XML head, and the page decides the width.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    about = f'class="figure" role="img" aria-label="{escape(alternative)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: about, svg, count=1)
