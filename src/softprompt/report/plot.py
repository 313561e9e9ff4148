"""A run's curves from its metrics.jsonl: characters for a terminal, PNG or SVG for a page. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from softprompt.errors import DataError, MissingExtra, SaveError
from softprompt.progress.events import loss_name
from softprompt.report.curves import (
    DRAWN_AS_LINE,
    EVENTS,
    Curves,
    Points,
    is_logarithmic,
    read_curves,
    smoothed,
)
from softprompt.store.ownership import check_file

TRIALS = "trials"
_MADE_BY = {
    ".png": {"Software": "softprompt"},
    ".svg": {"Creator": "softprompt"},
    ".pdf": {"Creator": "softprompt"},
}
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, row by row


def read_plotted(folders: Sequence[str | Path]) -> list[Curves]:
    """Reads the runs in `folders`; a sweep's folder means all its trials. Raises DataError if there is none."""
    runs: list[Path] = []
    for folder in map(Path, folders):
        trials = sorted(path.parent for path in folder.glob(f"{TRIALS}/*/{EVENTS}"))
        runs += trials or [folder]
    plotted = [read_curves(folder) for folder in runs]
    for folder, curves in zip(runs, plotted, strict=True):
        if not curves.training and not curves.held_out:
            raise DataError(
                f"{folder / EVENTS}: no step is recorded there yet. Plot the run when it has made one."
            )
    return plotted


def for_terminal(curves: Sequence[Curves], width: int = 72, height: int = 16) -> str:
    """Held-out loss by step in braille dots, a line for each run's figures below."""
    lines = [
        run.held_out if len(run.held_out) >= DRAWN_AS_LINE or not run.training else smoothed(run.training)
        for run in curves
    ]
    steps = [step for line in lines for step, _ in line]
    losses = [loss for line in lines for _, loss in line]
    low, high, last = min(losses), max(losses), max(steps)
    height_of = math.log10 if is_logarithmic(losses) else float
    bottom, top = height_of(low), height_of(high)
    span = (top - bottom) or 1.0
    columns = width - 10
    cells = [[0] * columns for _ in range(height)]

    def dot(x: float, y: float) -> None:
        across = min(2 * columns - 1, round(x / (last or 1) * (2 * columns - 1)))
        down = min(4 * height - 1, round((top - height_of(y)) / span * (4 * height - 1)))
        cells[down // 4][across // 2] |= DOTS[down % 4][across % 2]

    for line in lines:
        for (x0, y0), (x1, y1) in itertools.pairwise(line if len(line) >= DRAWN_AS_LINE else ()):
            pieces = 1 + round(
                abs(x1 - x0) / (last or 1) * 2 * columns
                + abs(height_of(y1) - height_of(y0)) / span * 4 * height
            )
            for n in range(pieces + 1):
                dot(x0 + (x1 - x0) * n / pieces, y0 + (y1 - y0) * n / pieces)
        if len(line) < DRAWN_AS_LINE:
            for x, y in line:
                dot(x, y)
    labels = {0: f"{high:.3f}", height - 1: f"{low:.3f}"}
    drawn = [
        f"{labels.get(row, ''):>8} ┤{''.join(chr(0x2800 + cell) for cell in cells[row])}".rstrip("\u2800")
        for row in range(height)
    ]
    drawn.append(" " * 9 + "└" + "─" * columns)
    drawn.append(" " * 10 + "0" + f"{last:g} steps".rjust(columns - 1))
    return "\n".join([*drawn, "", *map(_figures, curves)])


def _figures(curve: Curves) -> str:
    if not curve.held_out:
        return f"{curve.name}: training loss {curve.training[-1][1]:.4f} at step {curve.training[-1][0]:g}"
    # Without held-out rows none is known to be the best, and the latest is kept.
    step, kept = min(curve.held_out, key=lambda point: point[1]) if curve.has_held_out else curve.held_out[-1]
    base = f", base alone {curve.base:.4f}" if math.isfinite(curve.base) else ""
    loss = f"{loss_name(curve.has_held_out)} {curve.held_out[0][1]:.4f} at the start, {kept:.4f} at step {step:g}"
    return f"{curve.name}: {loss}{base}"


def draw(curves: Sequence[Curves], path: str | Path) -> None:
    """Writes the picture: held-out loss in full, training loss behind it, the base alone as a broken line.

    The file's ending says the format (png, svg, pdf). Raises MissingExtra without matplotlib, SaveError if it cannot
    be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("Pictures need matplotlib: pip install 'softprompt[plot]'.") from error
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        joined = "-" if len(curve.held_out) >= DRAWN_AS_LINE else "none"
        (line,) = axes.plot(*_columns(curve.held_out), marker=".", linestyle=joined, label=curve.name)
        if curve.training:
            axes.plot(*_columns(smoothed(curve.training)), color=line.get_color(), alpha=0.35, linewidth=1)
    bases = {round(curve.base, 6) for curve in curves if math.isfinite(curve.base)}
    for base in bases:
        axes.axhline(base, color="gray", linestyle="--", linewidth=1, label="base alone")
    losses = [loss for run in curves for _, loss in (*run.held_out, *run.training)]
    axes.set_yscale("log" if is_logarithmic(losses) else "linear")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per trained token (faint: training)")
    axes.legend(frameon=False, fontsize="small")
    path = picture_path(path)
    try:
        figure.savefig(path, metadata=_MADE_BY[path.suffix.lower()])
    except (OSError, ValueError) as error:
        raise SaveError(
            f"{path}: could not be written ({error}). Give a file ending in .png, .svg or .pdf in a folder that exists."
        ) from error


def picture_path(out: str | Path) -> Path:
    """The path of a picture that may be written. Raises SaveError for another ending and for files that are not ours."""
    path = check_file(out, _is_our_picture)
    if path.suffix.lower() not in _MADE_BY:
        raise SaveError(f"{path}: found no ending of a picture, wanted .png, .svg or .pdf. Change --out.")
    return path


def _is_our_picture(path: Path) -> bool:
    """Whether a picture says that softprompt made it."""
    return path.suffix.lower() in _MADE_BY and b"softprompt" in path.read_bytes()


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
