"""The page's figures, as SVG text that stands inside HTML."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from imgcls.catalogue.published import Published
from imgcls.records import RunResult
from imgcls.results.statistics import Estimate, calibration
from imgcls.search import Search

INK, FIRST, SECOND, GROUND = "#24292f", "#1f6feb", "#d9730d", "#d0d7de"
styled = rc_context(fname=Path(__file__).with_name("figures.mplstyle"))
"""Decorates what draws figures: all of a page are alike."""


def accuracies(estimated: Sequence[tuple[list[RunResult], Estimate]], published: Mapping[str, Published]) -> str:
    """Test accuracy of each recipe with its interval and its seeds, beside the published figure.

    estimated: by `compare.estimates`.
    """
    recipes, intervals = [runs[0].recipe.name for runs, _ in estimated], [estimate for _, estimate in estimated]
    names = [runs[0].name if recipes.count(runs[0].recipe.name) > 1 else runs[0].recipe.name for runs, _ in estimated]
    places = range(len(estimated))
    figure, axes = _one(7.2, 0.6 + 0.42 * len(estimated), xlabel="test accuracy")
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
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=3)
    return _svg(figure, "test accuracy of each recipe with its interval; the table below has the figures")


def labels(estimated: Sequence[tuple[list[RunResult], Estimate]], pairs: Mapping[str, str]) -> str:
    """Test accuracy against the number of labels, from scratch and transferred; empty where there are not several of each.

    estimated: by `compare.estimates`. pairs: of recipes, by `compare.transfers`.
    """
    measured = {runs[0].recipe.name: (runs[0].num_train, one) for runs, one in estimated}
    there = sorted((pair for pair in pairs.items() if measured.keys() >= {*pair}), key=lambda pair: measured[pair[0]][0])
    arms = {arm: [measured[pair[side]] for pair in there] for side, arm in enumerate(("transferred", "from scratch"))}
    ticks = sorted({count for points in arms.values() for count, _ in points})
    if len(ticks) < 2:
        return ""
    figure, axes = _one(5.2, 2.8, xlabel="labelled training images", ylabel="test accuracy")
    for (arm, points), color in zip(arms.items(), (FIRST, SECOND), strict=True):
        counts, intervals = zip(*points, strict=True)
        axes.semilogx(counts, [one.center for one in intervals], "o-", color=color, markersize=4, label=arm)
        lows, highs = [one.low for one in intervals], [one.high for one in intervals]
        axes.fill_between(counts, lows, highs, color=color, alpha=0.2, linewidth=0)
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.legend()
    return _svg(figure, "test accuracy against the number of labels, from scratch and transferred, with 95% intervals")


def trials(trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The metric of each trial of a search over epochs. trials: as `page.render_search` makes them."""
    figure, axes = _one(6.4, 2.8, xlabel="epoch", ylabel=metric)
    for trial, style in _styled(trials):
        axes.plot([row["epoch"] for row in trial["rows"]], [row[metric] for row in trial["rows"]], "o-", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, f"{metric} of each trial by epoch; the table below has the figures")


def _styled(trials: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    """The best one last, so that its line lies above the others."""
    styles = {False: {"color": INK, "linewidth": 0.7}, True: {"color": FIRST, "linewidth": 2}}
    ordered = sorted(trials, key=lambda trial: trial["best"])
    return [(trial, styles[trial["best"]] | {"markersize": 3}) for trial in ordered]


def best_so_far(trials: Sequence[Mapping[str, Any]], search: Search) -> str:
    """The best metric of any trial against the seconds since the search began, pauses left in."""
    pairs = [(time, row) for trial in trials for time, row in zip(trial["timing"], trial["rows"], strict=False)]
    if not pairs:
        return ""
    began = min(time["ended_at"] - time["train_s"] - time["validate_s"] for time, _ in pairs)
    points = sorted((time["ended_at"] - began, row[search.metric]) for time, row in pairs)
    best = (np.maximum if search.mode == "max" else np.minimum).accumulate([value for _, value in points])
    figure, axes = _one(6.4, 2.2, xlabel="seconds", ylabel=f"best {search.metric}")
    axes.step([seconds for seconds, _ in points], best, where="post", color=FIRST)
    return _svg(figure, f"best {search.metric} so far against seconds; it ends at {best[-1]:.4f}")


def parallel(trials: Sequence[Mapping[str, Any]], search: Search) -> str:
    """Each trial as a line through the places of its values in the search space, to its metric."""
    paths, values = sorted(search.space), [trial["value"] for trial in trials]
    figure, axes = _one(7.2, 3.2)
    for trial, style in _styled(trials):
        share = (trial["value"] - min(values)) / max(1e-9, max(values) - min(values))
        places = [search.space[path].place(value) for path, value in zip(paths, trial["fields"], strict=True)]
        axes.plot([*places, share], "o-", **style)
    axes.set_xticks(range(len(paths) + 1), [*paths, search.metric], rotation=30, ha="right")
    axes.set_yticks([0, 1], ["lowest", "highest"])
    return _svg(figure, "values and metric of each trial; the table below has the figures")


def curves(runs: Sequence[Sequence[Mapping[str, float]]], title: str) -> str:
    """Loss and accuracy over epochs, training and validation: the mean of the runs, and from the lowest to the highest.

    runs: the rows of each. A run that ended early counts as long as it ran.
    """
    figure = Figure(figsize=(6.4, 2.3))
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "loss"), (right, "accuracy")):
        epochs = range(1, max(map(len, runs)) + 1)
        for split, color in (("train", FIRST), ("val", SECOND)):
            there = [[rows[i][f"{split}/{name}"] for rows in runs if len(rows) > i] for i in range(len(epochs))]
            axes.plot(epochs, [np.mean(values) for values in there], "o-", color=color, markersize=3, label=split)
            if len(runs) > 1:
                axes.fill_between(epochs, [*map(min, there)], [*map(max, there)], color=color, alpha=0.2, linewidth=0)
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend()
    return _svg(figure, f"{title}: loss and accuracy by epoch, training and validation")


def reliability(table: NDArray[np.void], title: str) -> str:
    """Accuracy in each bin of probability, and the calibration error. table: one of `compare.Predictions`."""
    rows, error = calibration(table["label"] == table["prediction"], table["probability"])
    figure, axes = _one(3.6, 2.6, xlabel="probability of the prediction", ylabel="accuracy")
    axes.plot([0, 1], [0, 1], color=GROUND, linewidth=1)
    axes.plot(rows[:, 1], rows[:, 2], color=FIRST, linewidth=1)
    axes.scatter(rows[:, 1], rows[:, 2], s=4 + 80 * rows[:, 0] / len(table), color=FIRST)
    axes.set_title(f"calibration error {error:.3f}", fontsize=9)
    return _svg(figure, f"{title}: accuracy in each bin of the predictions' probability; calibration error {error:.3f}")


NAMED = 20
"""With up to so many classes the figure shows names and counts. With more it does not grow; it shows where mistakes lie."""


def confusion(matrix: NDArray[np.int_], class_names: Sequence[str], title: str) -> str:
    """Rows are labels, columns predictions; a cell is the share of its row."""
    names = [*map(_short, class_names)]
    side = 0.33 * min(max(6, len(names)), NAMED) + 1.4
    figure, axes = _one(side + 0.4, side, xlabel="prediction", ylabel="label")
    axes.grid(visible=False)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= NAMED:
        for (i, j), count in np.ndenumerate(matrix):
            color = "white" if shares[i, j] > 0.5 else INK
            axes.text(j, i, str(count), ha="center", va="center", fontsize=6, color=color)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    return _svg(figure, f"{title}: how often each label was taken for each class")


def _short(name: str) -> str:
    """The name in at most 40 characters: a longer one leaves no room for the figure."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def _one(width: float, height: float, **settings: Any) -> tuple[Figure, Axes]:
    """A figure of one part. Inches."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set(**settings)
    return figure, axes


def _svg(figure: Figure, alternative: str) -> str:
    """alternative: text for screen readers."""
    text = io.StringIO()
    with warnings.catch_warnings():  # letters stay text; the reader's browser draws them with its own fonts
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    # HTML needs no XML head, and the page decides the width.
    svg = svg[svg.index("<svg") :]
    about = f'class="figure" role="img" aria-label="{escape(alternative)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: about, svg, count=1)
