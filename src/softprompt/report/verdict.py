"""The verdict: one sentence that follows from the numbers, and says no more than they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt.comparison.arm import in_words
from softprompt.comparison.records import ArmSummary, Comparison
from softprompt.evaluation.interval import Difference, rows_to_settle
from softprompt.evaluation.metric import METRICS
from softprompt.report.figures import count, estimate, known, size, sure

MOST_TIMES = 1000  # nobody judges on a thousand times the rows


def verdict(comparison: Comparison) -> str:
    """The arm to choose, by the judging metric and then by its costs."""
    summary = comparison.summary
    arms = summary.arms
    best, judge = summary.best, summary.judged_by
    figure = arms[best].metrics[judge]
    if not known(figure.value):
        return f"No arm could be judged by {judge}: the figure is not known for any of them."
    figure_text = f"{_named(judge)}, {estimate(figure, rows=True)},"
    if len(arms) == 1:
        return f"The {figure_text} is that of {in_words(best)}; there is nothing to compare it with."
    if len({arm.metrics[judge].value for arm in arms.values()}) == 1:
        same = (
            f"By {_named(judge)} no arm differs from another: all of them have {estimate(figure, rows=True)}."
        )
        return same + _by_loss(arms, judge)
    others = [arm for arm in arms if arm != best]
    margin = margin_of(comparison)
    standing = {arm: _standing(arms[arm].against_best, summary.better == "higher", margin) for arm in others}
    worse, level, unsettled = (
        [arm for arm in others if standing[arm] == kind] for kind in ("worse", "level", "unsettled")
    )
    lead = f"The best {figure_text} comes from {in_words(best)}"
    sentences = [f"{lead}, significantly better than {_listed(worse)}." if worse else f"{lead}."]
    if level:
        cheapest = min([best, *level], key=lambda arm: (arms[arm].stored_bytes, arms[arm].added_tokens))
        if cheapest == best:
            verb = "is" if len(level) == 1 else "are"
            sentences.append(
                f"{_listed(level)} {verb} within {margin:g} of it, and {in_words(best)} costs the least to keep of those "
                f"({cost_of(arms[best])})."
            )
        else:
            sentences.append(
                f"Within {margin:g} of it, {in_words(cheapest)} costs the least to keep ({cost_of(arms[cheapest])})."
            )
    elif cost := _cost(arms, best, judge, summary.better == "higher"):
        sentences.append(cost.strip())
    if unsettled:
        sentences.append(
            f"No significant difference from {_listed(unsettled)}, which may still be more than {margin:g} worse: "
            f"{_more(comparison, unsettled, margin)}."
        )
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


@dataclass(frozen=True)
class Picks:
    """The arms a reader may want: of the best figure, the cheapest whose figure is within the margin, and the one that the
    verdict recommends: the cheapest that has the best figure too, or is as good as it as far as the intervals show."""

    best: str
    cheapest: str
    recommended: str


def picks(comparison: Comparison) -> Picks | None:
    """The three arms; None where the best figure is not known or nothing is compared."""
    summary = comparison.summary
    arms, best, judge, higher = summary.arms, summary.best, summary.judged_by, summary.better == "higher"
    if len(arms) < 2 or not known(arms[best].metrics[judge].value):
        return None
    margin = margin_of(comparison)
    top = arms[best].metrics[judge].value
    near = [arm for arm in arms if abs(top - arms[arm].metrics[judge].value) <= margin + 1e-9]
    level = [
        arm
        for arm in arms
        if arms[arm].metrics[judge].value == top
        or _standing(arms[arm].against_best, higher, margin) == "level"
    ]

    def price(arm: str) -> tuple[float, float]:
        return arms[arm].stored_bytes, arms[arm].added_tokens

    return Picks(best, min(near, key=price), min(level, key=price))


def margin_of(comparison: Comparison) -> float:
    """The margin by which an arm may be worse than the best and still count as level, in units of the judging metric."""
    within = 0.02 if comparison.settings is None else comparison.settings.within
    return within * METRICS[comparison.summary.judged_by].scale


def _standing(against_best: Difference | None, higher: bool, margin: float) -> str:
    """worse, level (at most the margin worse, as far as the interval goes), or unsettled."""
    if against_best is None or not known(against_best.low) or not known(against_best.high):
        return "unsettled"
    most_behind = -against_best.low if higher else against_best.high
    if most_behind <= margin:
        return "level"
    return "worse" if sure(against_best) else "unsettled"


def _more(comparison: Comparison, arms: Sequence[str], margin: float) -> str:
    """The number of rows and seeds that would settle the differences of these arms from the best."""
    differences = [comparison.summary.arms[arm].against_best for arm in arms]
    times = max(
        (
            rows_to_settle(difference, margin)
            for difference in differences
            if difference is not None and known(difference.low)
        ),
        default=math.inf,
    )
    rows = comparison.summary.arms[comparison.summary.best].metrics[comparison.summary.judged_by].n
    if not times <= MOST_TIMES:
        return "no reasonable number of rows would settle it"
    more = rows * (times - 1)
    rounded = round(more, 1 - math.floor(math.log10(more))) if more >= 1 else 1.0
    seeds = max(arm.seeds for arm in comparison.summary.arms.values())
    also = "" if seeds == 1 else f", and {times:.1f} times the seeds,"
    return f"about {rounded:,.0f} more rows{also} would settle it"


def against_base(comparison: Comparison, arm: str) -> str:
    """Whether an arm gained anything over the base alone, in words."""
    difference = comparison.summary.arms[arm].against_base
    if difference is None or arm == "base":
        return ""
    if not sure(difference):
        return "no significant difference"
    return "better" if (difference.value > 0) == (comparison.summary.better == "higher") else "worse"


def _cost(arms: Mapping[str, ArmSummary], best: str, judge: str, higher: bool) -> str:
    """The cost of the best arm beside the one that is most expensive to store."""
    largest = max(arms, key=lambda arm: arms[arm].stored_bytes)
    mine, theirs = arms[best].stored_bytes, arms[largest].stored_bytes
    smaller = [arm for arm in arms if arms[arm].trained_parameters and arms[arm].stored_bytes < mine]
    if largest == best and smaller:
        sign = 1 if higher else -1
        next_best = max(smaller, key=lambda arm: sign * arms[arm].metrics[judge].value)
        figure = estimate(arms[next_best].metrics[judge])
        return f" It takes {cost_of(arms[best])}; the best of the smaller, {in_words(next_best)}, {figure}, takes {cost_of(arms[next_best])}."
    if largest == best or not mine:
        return f" It takes {cost_of(arms[best])}."
    times = theirs / mine
    return (
        f" It takes {cost_of(arms[best])}, {times:,.0f} times less than {in_words(largest)}."
        if times >= 2
        else ""
    )


def _by_loss(arms: Mapping[str, ArmSummary], judge: str) -> str:
    """A verdict by the loss of the wanted texts, where the answers do not separate the arms."""
    losses = {name: arm.metrics["nll"].value for name, arm in arms.items() if "nll" in arm.metrics}
    if (
        judge == "nll"
        or not losses
        or not all(known(loss) for loss in losses.values())
        or len(set(losses.values())) == 1
    ):
        return ""
    lowest = min(losses, key=lambda arm: losses[arm])
    dearest = max(losses, key=lambda arm: losses[arm])
    return (
        f" Of the wanted answers, {in_words(lowest)} has the lowest loss ({losses[lowest]:.3f} nats per token) "
        f"and {in_words(dearest)} the highest ({losses[dearest]:.3f})."
    )


def cost_of(arm: ArmSummary) -> str:
    added = arm.added_tokens
    tokens = f" and {count(added)} more tokens a request" if added else ""
    return f"{size(arm.stored_bytes)} a task{tokens}"


def _named(judge: str) -> str:
    return {"nll": "loss (nats per token)"}.get(judge, judge.replace("_", " "))


def _listed(arms: Sequence[str]) -> str:
    names = [in_words(arm) for arm in arms]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
