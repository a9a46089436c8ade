"""curves.png: losses and the task's metrics over the epochs of a run."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from .task import Curves

_LOSSES = {"train_loss": "training, as augmented", "loss": "held out"}


def plot_curves(metrics: Path, out: Path, *, title: str, curves: Curves) -> None:
    """Draw the columns of metrics.csv that are there: losses on the left, the task's metrics on the right.

    Args:
        metrics: the csv file of a run.
        out: the image to write, replaced as a whole.
        title: above the plots.
        curves: what the right-hand side shows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    for axes, shown in ((left, Curves("loss", _LOSSES, 3)), (right, curves)):
        for key, name in shown.columns.items():
            points = [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key)]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=f"{name}: {points[-1][1]:.{shown.digits}f} at the end",
                    marker="o" if len(points) < 40 else None,
                    markersize=3,
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(shown.label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(frameon=False)
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    figure.savefig(part)
    os.replace(part, out)
