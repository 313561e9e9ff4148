"""The metrics. Each one counts something in every row and computes a figure from the sums; errors follow from the counts.

No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from softprompt.errors import MissingExtra, RecipeError, did_you_mean
from softprompt.evaluation import overlap
from softprompt.evaluation.interval import (
    NORMAL_975,
    Difference,
    bounded_interval,
    jackknife,
    mean_over_seeds,
    paired_difference,
)
from softprompt.evaluation.interval import Estimate as Estimate
from softprompt.evaluation.row_counts import Counts, RowCounts
from softprompt.evaluation.rows import Row

Needs = Literal["loss", "answer"]
MOST_LABELS = 1_000  # of a confusion table, which has the square of it in cells


@dataclass(frozen=True)
class Metric:
    """A metric: `total` computes the figure from the summed `counts` of all rows.

    `needs` says whether a row must have been scored or answered; `better` which direction is better; `unit` is shown
    behind the figure; `bounds` are the lowest and the highest possible figure.
    """

    name: str
    counts: Callable[[Row], Counts]
    total: Callable[[Counts], float]
    help: str
    needs: Needs = "answer"
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def scale(self) -> float:
        """The figure that corresponds to a share of 1: 100 for BLEU and chrF, 1 for all others."""
        low, high = self.bounds
        return high - low if math.isfinite(high) else 1.0

    def interval(self, seeds: Sequence[Sequence[Row]]) -> tuple[float, float]:
        """The figure's 95 % interval over rows and seeds, within the metric's bounds."""
        return self.interval_of(self.over_seeds(seeds), len(seeds))

    def interval_of(self, estimate: Estimate, runs: int = 1) -> tuple[float, float]:
        """The 95 % interval of a figure of so many runs, within the metric's bounds."""
        low, high = self.bounds
        if math.isfinite(high):
            return bounded_interval(estimate, low, high, runs)
        reach = NORMAL_975 * estimate.stderr
        return max(low, estimate.value - reach), estimate.value + reach

    def estimate(self, rows: Iterable[Row]) -> Estimate:
        """The figure on these rows; nan, never 0, where rows were not measured."""
        return self.estimate_of(RowCounts(map(self.counted, rows)))

    def estimate_of(self, counts: RowCounts) -> Estimate:
        """The figure of what was `counted` of every row."""
        return jackknife(counts, self._total_or_nan)

    def over_seeds(self, seeds: Sequence[Sequence[Row]]) -> Estimate:
        """The mean figure of several runs on the same rows."""
        return mean_over_seeds([RowCounts(map(self.counted, rows)) for rows in seeds], self._total_or_nan)

    def difference(self, ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]]) -> Difference:
        """The difference, ours minus theirs, each a list of runs. Raises ValueError unless all were judged on the same rows."""
        if len({rows_digest(rows) for rows in (*ours, *theirs)}) != 1:
            raise ValueError("the runs were judged on different rows, so their difference has no meaning.")
        most = self.bounds[1] - self.bounds[0]  # no two figures are further apart
        difference = paired_difference(
            [RowCounts(map(self.counted, rows)) for rows in ours],
            [RowCounts(map(self.counted, rows)) for rows in theirs],
            self._total_or_nan,
            most,
        )
        return replace(difference, low=_clipped(difference.low, most), high=_clipped(difference.high, most))

    def counted(self, row: Row) -> Counts:
        """The counts of a row that the figure is made of; `unknown` where it was not measured."""
        if (math.isnan(row.nll) or not row.tokens) if self.needs == "loss" else row.answer is None:
            return {"unknown": 1.0}
        return self.counts(row)

    def _total_or_nan(self, counts: Counts) -> float:
        return math.nan if counts.get("unknown") else self.total(counts)


@dataclass(frozen=True)
class Confusion:
    """How often each wanted label (rows of the table) got each label as its answer (columns).

    `other` counts answers that are none of `labels`, by wanted label."""

    labels: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    other: tuple[int, ...]


def confusion(rows: Sequence[Row]) -> Confusion | None:
    """The confusion table over the labels that occur among the wanted ones; None where they are too many for a table."""
    wanted = sorted({row.wanted.strip() for row in rows})
    return None if len(wanted) > MOST_LABELS else count_confusions(wanted, rows)


def count_confusions(labels: Sequence[str], rows: Iterable[Row]) -> Confusion:
    """The table over `labels`, which are all that is wanted of the rows."""
    column_of = {label: i for i, label in enumerate(labels)}
    table = [[0] * len(labels) for _ in labels]
    other = [0] * len(labels)
    for row in rows:
        wanted, answered = column_of[row.wanted.strip()], column_of.get((row.answer or "").strip())
        if answered is None:
            other[wanted] += 1
        else:
            table[wanted][answered] += 1
    return Confusion(tuple(labels), tuple(map(tuple, table)), tuple(other))


def rows_digest(rows: Iterable[Row]) -> bytes:
    """The digest of the inputs and wanted texts: equal for runs that were judged on the same rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.index, row.input, row.wanted]).encode())
    return digest.digest()


def metrics_named(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, each once. Raises RecipeError for an unknown name, MissingExtra for bleu alone."""
    for name in names:
        if name not in METRICS:
            raise RecipeError(
                f"metric: found {name!r}, wanted one of {', '.join(METRICS)}.{did_you_mean(name, list(METRICS))}"
            )
        if name == "bleu":
            sacrebleu_metric()
    return [METRICS[name] for name in dict.fromkeys(names)]


def _clipped(value: float, most: float) -> float:
    return value if math.isnan(value) else min(most, max(-most, value))


def _mean(counts: Counts) -> float:
    return counts["sum"] / counts["n"] if counts.get("n") else math.nan


def _mean_of(judge: Callable[[str, str], float]) -> Callable[[Row], Counts]:
    return lambda row: {"sum": float(judge(row.answer or "", row.wanted)), "n": 1.0}


def _same(answer: str, wanted: str) -> float:
    return float(answer.strip() == wanted.strip())


def _same_number(answer: str, wanted: str) -> float:
    number = overlap.final_number(wanted)
    return float(number is not None and overlap.final_number(answer) == number)


def _label_counts(row: Row) -> Counts:
    wanted, answered = row.wanted.strip(), (row.answer or "").strip()
    return (
        {f"hit:{wanted}": 1.0} if wanted == answered else {f"missed:{wanted}": 1.0, f"wrong:{answered}": 1.0}
    )


def _macro_f1(counts: Counts) -> float:
    """F1 of every label that is wanted at least once, averaged without weights."""
    scores = []
    for label in {
        name.partition(":")[2] for name, count in counts.items() if not name.startswith("wrong:") and count
    }:
        hit, missed, wrong = (counts.get(f"{kind}:{label}", 0.0) for kind in ("hit", "missed", "wrong"))
        scores.append(2 * hit / (2 * hit + missed + wrong))
    return math.fsum(scores) / len(scores) if scores else math.nan


def _loss_counts(row: Row) -> Counts:
    return {"nats": row.nll, "tokens": float(row.tokens), "bytes": float(row.text_bytes)}


def _per(unit: str, figure: Callable[[float], float] = lambda nats: nats) -> Callable[[Counts], float]:
    def total(counts: Counts) -> float:
        if not counts.get(unit):
            return math.nan
        try:
            return figure(counts["nats"] / counts[unit])
        except OverflowError:
            return math.inf

    return total


@cache
def sacrebleu_metric() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtra(
            "metric bleu: needs sacrebleu, which is not installed. Run: pip install 'softprompt[eval]'"
        ) from None
    return BLEU(effective_order=True)


def _bleu_counts(row: Row) -> Counts:
    if row.repeated:
        return {}
    score = sacrebleu_metric().sentence_score(row.answer or "", list(row.references or (row.wanted,)))
    return {
        **{f"hit{order}": float(count) for order, count in enumerate(score.counts)},
        **{f"all{order}": float(count) for order, count in enumerate(score.totals)},
        "answered": float(score.sys_len),
        "wanted": float(score.ref_len),
    }


def _bleu(counts: Counts) -> float:
    if "hit0" not in counts:
        return math.nan
    score = type(sacrebleu_metric()).compute_bleu(
        [int(counts[f"hit{order}"]) for order in range(4)],
        [int(counts[f"all{order}"]) for order in range(4)],
        int(counts["answered"]),
        int(counts["wanted"]),
        smooth_method="exp",  # sacrebleu's own choice for a corpus
    )
    return float(score.score)


def _chrf_counts(row: Row) -> Counts:
    if row.repeated:
        return {}
    # As sacrebleu does: each row is compared with the reference that it resembles most.
    each = [overlap.character_counts(row.answer or "", text) for text in row.references or (row.wanted,)]
    counted = max(each, key=overlap.chrf)
    kinds = ("answered", "wanted", "both")
    return {
        f"{kind}{order}": float(counts_of_order[position])
        for order, counts_of_order in enumerate(counted)
        for position, kind in enumerate(kinds)
    }


def _chrf(counts: Counts) -> float:
    if "answered0" not in counts:
        return math.nan
    orders = range(overlap.CHARACTER_ORDERS)
    return overlap.chrf([(counts[f"answered{o}"], counts[f"wanted{o}"], counts[f"both{o}"]) for o in orders])


PERCENT, LOSS = (0.0, 100.0), (0.0, math.inf)

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _mean_of(_same), _mean, "Share of rows whose label is right."),
        Metric("macro_f1", _label_counts, _macro_f1, "F1 of every label, averaged over labels."),
        Metric(
            "exact_match",
            _mean_of(_same),
            _mean,
            "Share of rows answered exactly, white space at the ends aside.",
        ),
        Metric(
            "numeric_match",
            _mean_of(_same_number),
            _mean,
            "Share of rows whose final number is right (gsm8k's ####).",
        ),
        Metric(
            "token_f1", _mean_of(overlap.word_f1), _mean, "Words shared with the wanted answer (SQuAD's F1)."
        ),
        Metric(
            "rouge_l", _mean_of(overlap.rouge_l), _mean, "Longest common subsequence of words, F-measure."
        ),
        Metric(
            "bleu",
            _bleu_counts,
            _bleu,
            "Corpus BLEU as sacrebleu computes it, 0 to 100.",
            bounds=PERCENT,
        ),
        Metric("chrf", _chrf_counts, _chrf, "Corpus chrF2, 0 to 100.", bounds=PERCENT),
        Metric(
            "nll",
            _loss_counts,
            _per("tokens"),
            "Loss of the wanted text.",
            "loss",
            "lower",
            "nats per token",
            LOSS,
        ),
        Metric(
            "perplexity",
            _loss_counts,
            _per("tokens", math.exp),
            "exp of the loss per token.",
            "loss",
            "lower",
            "per token",
            LOSS,
        ),
        Metric(
            "bits_per_byte",
            _loss_counts,
            _per("bytes", lambda nats: nats / math.log(2)),
            "Loss of the wanted text in bits, comparable between tokenizers.",
            "loss",
            "lower",
            "bits per byte",
            LOSS,
        ),
        Metric(
            "byte_perplexity",
            _loss_counts,
            _per("bytes", math.exp),
            "exp of the loss per byte.",
            "loss",
            "lower",
            "per byte",
            LOSS,
        ),
    )
}
