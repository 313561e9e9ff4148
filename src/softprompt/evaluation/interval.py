"""Uncertainty of a figure: standard errors by the jackknife, and paired differences with their intervals."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from softprompt.evaluation.row_counts import Counts, RowCounts

Total = Callable[[Counts], float]
TOTALS_KEPT = 50_000  # of different counts; more would take more memory than the counts of a million rows
NORMAL_975 = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error, and the number of rows it was measured on. Unknown is nan."""

    value: float
    stderr: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"unknown (n={self.n})"
        spread = "unknown" if math.isnan(self.stderr) else f"{self.stderr:.3f}"
        return f"{self.value:.3f} ± {spread} (n={self.n})"


@dataclass(frozen=True)
class Difference:
    """A difference between two sides on the same rows, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def sure(self) -> bool:
        """Whether the difference is significant: its 95 % interval excludes 0."""
        return self.low > 0 or self.high < 0


def jackknife(counts: RowCounts, total: Total) -> Estimate:
    """`total` of the summed counts, with its standard error by leaving out one row at a time (Efron and Stein 1981).

    For a mean this equals the usual standard error; for ratios and F1 it is their linear approximation.
    """
    n = len(counts)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    summed = counts.summed()
    return Estimate(total(summed), _spread(_left_out(counts, summed, total)), n)


def mean_over_seeds(seeds: Sequence[RowCounts], total: Total) -> Estimate:
    """The mean over runs that differ only in their seed, all on the same rows.

    The standard error combines the spread over rows with the spread over seeds.
    """
    _need_pairs(seeds)
    values, left_out = _by_seed(seeds, total)
    rows = _spread(left_out)
    return Estimate(_mean(values), _joined(rows, _seed_error(values)), len(seeds[0]))


def paired_difference(
    ours: Sequence[RowCounts], theirs: Sequence[RowCounts], total: Total, most: float = math.inf
) -> Difference:
    """The difference, ours minus theirs, on the same rows and the same seeds in the same order; a single run is used for
    all seeds.

    The interval is Student's, from the spread of the difference over rows and over seeds (degrees of freedom after
    Satterthwaite 1946). Where all rows agree they have no spread, and still few of them say little: `most` is how far two
    figures can be apart, and what `_unseen` makes of it is the spread then. Raises ValueError where rows or seeds do not pair.
    """
    pairs = max(len(ours), len(theirs))
    if len(ours) not in (1, pairs) or len(theirs) not in (1, pairs):
        raise ValueError(f"{len(ours)} runs cannot be paired with {len(theirs)}: wanted the same seeds.")
    _need_pairs([*ours, *theirs])
    n = len(ours[0])
    our_values, our_left_out = _by_seed(ours, total)
    their_values, their_left_out = _by_seed(theirs, total)
    differences = [
        our_values[min(k, len(ours) - 1)] - their_values[min(k, len(theirs) - 1)] for k in range(pairs)
    ]
    value = _mean(differences)
    rows = _spread(array("d", (a - b for a, b in zip(our_left_out, their_left_out, strict=True))))
    seeds = _seed_error(differences)
    middle, row_freedom = value, n - 1
    if rows < most * 1e-12 and math.isfinite(most):
        middle, rows, row_freedom = _unseen(value, n, most)
    error = _joined(rows, seeds)
    if not math.isfinite(error):
        return Difference(value, math.nan, math.nan, n)
    if error == 0:
        return Difference(value, value, value, n)
    freedom = error**4 / (rows**4 / row_freedom + (seeds**4 / (pairs - 1) if pairs > 1 else 0.0))
    reach = student_quantile(0.975, freedom) * error
    return Difference(value, min(value, middle - reach), max(value, middle + reach), n)


def _unseen(value: float, n: int, most: float) -> tuple[float, float, int]:
    """The middle of the interval, the error and its degrees of freedom for `n` rows that all differ by `value`.

    As if two more rows had been seen: half of one where ours is better by `most`, half of one where theirs is, and one where
    neither is. For right and wrong answers that is half a row in each cell of the table of both (Agresti and Min 2005,
    "Simple improved confidence intervals for comparing matched proportions")."""
    seen = n + 2
    middle = n * value / seen
    squares = n * (value - middle) ** 2 + middle**2 + ((most - middle) ** 2 + (most + middle) ** 2) / 2
    return middle, math.sqrt(squares) / seen, seen - 1


def bounded_interval(estimate: Estimate, low: float, high: float, runs: int = 1) -> tuple[float, float]:
    """The 95 % interval of a figure between `low` and `high` (Wilson 1927): it stays within them, and has a width even
    where all rows agree.

    One run's rows are counted as they are. Several runs count as the rows that would give a share this standard error.
    """
    if not math.isfinite(estimate.value) or estimate.n == 0 or not high > low:
        return math.nan, math.nan
    share = min(1.0, max(0.0, (estimate.value - low) / (high - low)))
    error = estimate.stderr / (high - low)
    rows = float(estimate.n)
    if runs > 1 and error > 0 and 0 < share < 1:
        rows = share * (1 - share) / error**2
    z = NORMAL_975
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    reach = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    lowest, highest = max(0.0, middle - reach), min(1.0, middle + reach)
    return low + lowest * (high - low), low + highest * (high - low)


def rows_to_settle(difference: Difference, margin: float) -> float:
    """The factor by which rows (and seeds) must grow until a difference this large is significant or, if it is smaller
    than the margin, known to lie within it. At most 1: already settled; inf where no number suffices."""
    reach = max(difference.high - difference.value, difference.value - difference.low)
    gap = abs(difference.value)
    aim = max(gap, margin - gap)
    return (reach / aim) ** 2 if aim > 0 else math.inf


def student_quantile(share: float, freedom: float) -> float:
    """The value that Student's t stays below with probability `share` (0.5 to 1), for 1 or more degrees of freedom."""
    if freedom > 1e6:
        freedom = 1e6
    # With t = sqrt(f) * tan(a) the density becomes cos(a)^(f-1), smooth on a bounded range: Simpson, then bisection.
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if 0.5 + scale * _simpson(lambda a: math.cos(a) ** (freedom - 1), angle, freedom) < share:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _simpson(density: Callable[[float], float], end: float, freedom: float) -> float:
    # The density is about 1/sqrt(freedom) wide; beyond 12 of these it adds nothing in float64.
    end = min(end, 12 / math.sqrt(freedom))
    steps = 200
    width = end / steps
    inner = sum((4 if i % 2 else 2) * density(i * width) for i in range(1, steps))
    return (density(0.0) + inner + density(end)) * width / 3


def _by_seed(seeds: Sequence[RowCounts], total: Total) -> tuple[list[float], Sequence[float]]:
    """Each seed's value; and for every row, the seeds' mean value without it."""
    sums = [counts.summed() for counts in seeds]
    values = [total(summed) for summed in sums]
    each = [_left_out(counts, summed, total) for counts, summed in zip(seeds, sums, strict=True)]
    return values, array("d", (_mean(row) for row in zip(*each, strict=True)))


def _left_out(counts: RowCounts, summed: Counts, total: Total) -> Sequence[float]:
    """The figure without each row in turn."""
    # Rows of equal counts leave the same rest, so a metric of few different counts (accuracy) computes it a few times.
    totals: dict[tuple[tuple[str, float], ...], float] = {}
    values = array("d")
    for row_counts in counts:
        key = tuple(sorted(row_counts.items()))
        value = totals.get(key)
        if value is None:
            rest = dict(summed)
            for name, count in row_counts.items():
                rest[name] -= count
            value = total(rest)
            if len(totals) < TOTALS_KEPT:
                totals[key] = value
        values.append(value)
    return values


def _spread(left_out: Sequence[float]) -> float:
    n = len(left_out)
    if n < 2:
        return math.nan
    mean = _mean(left_out)
    return math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in left_out))


def _seed_error(values: Sequence[float]) -> float:
    k = len(values)
    if k < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (k - 1) / k)


def _joined(rows: float, seeds: float) -> float:
    return math.hypot(rows, seeds)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _need_pairs(runs: Sequence[RowCounts]) -> None:
    sizes = {len(run) for run in runs}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"runs of {sorted(sizes)} rows cannot be paired: wanted the same rows, at least one."
        )
