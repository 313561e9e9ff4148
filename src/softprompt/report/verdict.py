"""The verdict: one sentence that follows from the numbers, and says no more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.report.figures import count, estimate, known, size, sure

SPOKEN = {
    "base": "the base as it is",
    "prompt": "your own text",
    "few-shot": "few-shot examples",
    "soft": "the soft prompt",
    "deep": "the deep prompt",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


def verdict(record: Mapping[str, Any]) -> str:
    """Which arm to take, by the judged figure and then by what it costs."""
    summary = record["summary"]
    arms: Mapping[str, Any] = summary["arms"]
    best, judge = summary["best"], summary["judged_by"]
    figure = arms[best]["metrics"][judge]
    if not known(figure["value"]):
        return f"No arm could be judged by {judge}: the figure is not known for any of them."
    found = f"{_named(judge)} {estimate(figure, rows=True)}"
    found = f"{_named(judge)}, {estimate(figure, rows=True)},"
    if len(arms) == 1:
        return f"The {found} is that of {_said(best)}; there is nothing to compare it with."
    if len({one["metrics"][judge]["value"] for one in arms.values()}) == 1:
        same = f"By {_named(judge)} no arm can be told from another: all of them have {estimate(figure, rows=True)}."
        return same + _by_loss(arms, judge)
    equals = [arm for arm in arms if arm != best and not sure(arms[arm]["against_best"])]
    worse = [arm for arm in arms if arm != best and arm not in equals]
    said = f"The best {found} comes from {_said(best)}"
    if not equals:
        return f"{said}, surely better than {_listed(worse)}.{_cost(arms, best, judge, summary['better'] == 'higher')}"
    cheapest = min([best, *equals], key=lambda arm: (arms[arm]["stored_bytes"], arms[arm]["added_tokens"]))
    if worse:
        told = (
            f", surely better than {_listed(worse)}, but not told apart from {_listed(equals)} on these rows"
        )
    else:
        told = ", but no arm can be told apart from it on these rows"
    kept = f" ({_kept(arms[cheapest])})"
    if cheapest == best:
        return f"{said}{told}; it also costs the least to keep of those{kept}."
    return f"{said}{told}; of those, {_said(cheapest)} costs the least to keep{kept}."


def against_base(record: Mapping[str, Any], arm: str) -> str:
    """Whether an arm gained anything over the base alone, in words."""
    one = record["summary"]["arms"][arm].get("against_base")
    if one is None or arm == "base":
        return ""
    higher = record["summary"]["better"] == "higher"
    if not sure(one):
        return "not told from the base"
    return "better than the base" if (one["value"] > 0) == higher else "worse than the base"


def _cost(arms: Mapping[str, Any], best: str, judge: str, higher: bool) -> str:
    """What the best costs beside the dearest to keep."""
    largest = max(arms, key=lambda arm: arms[arm]["stored_bytes"])
    mine, theirs = arms[best]["stored_bytes"], arms[largest]["stored_bytes"]
    smaller = [arm for arm in arms if arms[arm]["trained_parameters"] and arms[arm]["stored_bytes"] < mine]
    if largest == best and smaller:
        sign = 1 if higher else -1
        next_best = max(smaller, key=lambda arm: sign * arms[arm]["metrics"][judge]["value"])
        figure = estimate(arms[next_best]["metrics"][judge])
        return f" It takes {_kept(arms[best])}; the best of the smaller, {_said(next_best)}, {figure}, takes {_kept(arms[next_best])}."
    if largest == best or not mine:
        return f" It takes {_kept(arms[best])}."
    times = theirs / mine
    return (
        f" It takes {_kept(arms[best])}, {times:,.0f} times less than {_said(largest)}." if times >= 2 else ""
    )


def _by_loss(arms: Mapping[str, Any], judge: str) -> str:
    """Where answers tell nothing, the loss of the wanted ones may."""
    losses = {arm: one["metrics"].get("nll", {}).get("value") for arm, one in arms.items()}
    if judge == "nll" or not all(known(loss) for loss in losses.values()) or len(set(losses.values())) == 1:
        return ""
    lowest = min(losses, key=lambda arm: losses[arm])
    dearest = max(losses, key=lambda arm: losses[arm])
    return (
        f" Of the wanted answers, {_said(lowest)} has the lowest loss ({losses[lowest]:.3f} nats per token) "
        f"and {_said(dearest)} the highest ({losses[dearest]:.3f})."
    )


def _kept(arm: Mapping[str, Any]) -> str:
    added = arm["added_tokens"]
    tokens = f" and {count(added)} more tokens a request" if added else ""
    return f"{size(arm['stored_bytes'])} a task{tokens}"


def _said(arm: str) -> str:
    return SPOKEN.get(arm, arm)


def _named(judge: str) -> str:
    return {"nll": "loss (nats per token)"}.get(judge, judge.replace("_", " "))


def _listed(arms: Sequence[str]) -> str:
    said = [_said(arm) for arm in arms]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
