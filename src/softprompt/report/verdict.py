"""The verdict: one sentence that follows from the numbers, and says no more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softprompt.comparison.arm import spoken
from softprompt.comparison.records import ArmSummary, Comparison
from softprompt.report.figures import count, estimate, known, size, sure


def verdict(comparison: Comparison) -> str:
    """Which arm to take, by the judged figure and then by what it costs."""
    summary = comparison.summary
    arms = summary.arms
    best, judge = summary.best, summary.judged_by
    figure = arms[best].metrics[judge]
    if not known(figure.value):
        return f"No arm could be judged by {judge}: the figure is not known for any of them."
    found = f"{_named(judge)}, {estimate(figure, rows=True)},"
    if len(arms) == 1:
        return f"The {found} is that of {spoken(best)}; there is nothing to compare it with."
    if len({arm.metrics[judge].value for arm in arms.values()}) == 1:
        same = f"By {_named(judge)} no arm can be told from another: all of them have {estimate(figure, rows=True)}."
        return same + _by_loss(arms, judge)
    equals = [arm for arm in arms if arm != best and not sure(arms[arm].against_best)]
    worse = [arm for arm in arms if arm != best and arm not in equals]
    said = f"The best {found} comes from {spoken(best)}"
    if not equals:
        return f"{said}, surely better than {_listed(worse)}.{_cost(arms, best, judge, summary.better == 'higher')}"
    cheapest = min([best, *equals], key=lambda arm: (arms[arm].stored_bytes, arms[arm].added_tokens))
    if worse:
        told = (
            f", surely better than {_listed(worse)}, but not told apart from {_listed(equals)} on these rows"
        )
    else:
        told = ", but no arm can be told apart from it on these rows"
    kept = f" ({_kept(arms[cheapest])})"
    if cheapest == best:
        return f"{said}{told}; it also costs the least to keep of those{kept}."
    return f"{said}{told}; of those, {spoken(cheapest)} costs the least to keep{kept}."


def against_base(comparison: Comparison, arm: str) -> str:
    """Whether an arm gained anything over the base alone, in words."""
    difference = comparison.summary.arms[arm].against_base
    if difference is None or arm == "base":
        return ""
    if not sure(difference):
        return "no significant difference"
    return "better" if (difference.value > 0) == (comparison.summary.better == "higher") else "worse"


def _cost(arms: Mapping[str, ArmSummary], best: str, judge: str, higher: bool) -> str:
    """What the best costs beside the dearest to keep."""
    largest = max(arms, key=lambda arm: arms[arm].stored_bytes)
    mine, theirs = arms[best].stored_bytes, arms[largest].stored_bytes
    smaller = [arm for arm in arms if arms[arm].trained_parameters and arms[arm].stored_bytes < mine]
    if largest == best and smaller:
        sign = 1 if higher else -1
        next_best = max(smaller, key=lambda arm: sign * arms[arm].metrics[judge].value)
        figure = estimate(arms[next_best].metrics[judge])
        return f" It takes {_kept(arms[best])}; the best of the smaller, {spoken(next_best)}, {figure}, takes {_kept(arms[next_best])}."
    if largest == best or not mine:
        return f" It takes {_kept(arms[best])}."
    times = theirs / mine
    return (
        f" It takes {_kept(arms[best])}, {times:,.0f} times less than {spoken(largest)}."
        if times >= 2
        else ""
    )


def _by_loss(arms: Mapping[str, ArmSummary], judge: str) -> str:
    """Where answers tell nothing, the loss of the wanted ones may."""
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
        f" Of the wanted answers, {spoken(lowest)} has the lowest loss ({losses[lowest]:.3f} nats per token) "
        f"and {spoken(dearest)} the highest ({losses[dearest]:.3f})."
    )


def _kept(arm: ArmSummary) -> str:
    added = arm.added_tokens
    tokens = f" and {count(added)} more tokens a request" if added else ""
    return f"{size(arm.stored_bytes)} a task{tokens}"


def _named(judge: str) -> str:
    return {"nll": "loss (nats per token)"}.get(judge, judge.replace("_", " "))


def _listed(arms: Sequence[str]) -> str:
    said = [spoken(arm) for arm in arms]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
