"""From judged arms to what a reader compares: quality with intervals, paired against the best, and costs.

An arm is anything that was judged on the same rows, over one or several seeds. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from softprompt.errors import SoftPromptError
from softprompt.evaluation.metric import METRICS, Metric
from softprompt.evaluation.rows import Row

COSTS = ("trained_parameters", "stored_bytes", "added_tokens", "decode_tokens_per_second")


def summarise(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Mapping[str, Sequence[Sequence[Row]]],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """`records` and judged `rows` of every arm, a list over its seeds, to plain data.

    The first metric judges. Every arm is set against the best one and, where it was run, against the base, row by
    row. Raises SoftPromptError where arms were judged on different rows.
    """
    judge = METRICS[metrics[0]]
    arms: dict[str, dict[str, Any]] = {}
    try:
        for arm in records:
            arms[arm] = {"metrics": {name: _figure(METRICS[name], rows[arm]) for name in metrics}}
            arms[arm] |= _costs(records[arm])
        best = _best(judge, {arm: one["metrics"][judge.name]["value"] for arm, one in arms.items()})
        for arm, one in arms.items():
            one["against_best"] = asdict(judge.difference(rows[arm], rows[best]))
            if "base" in rows:
                one["against_base"] = asdict(judge.difference(rows[arm], rows["base"]))
    except ValueError as error:
        raise SoftPromptError(
            f"The arms cannot be compared: {error} Start afresh in another folder."
        ) from error
    return {"judged_by": judge.name, "better": judge.better, "unit": judge.unit, "best": best, "arms": arms}


def _figure(metric: Metric, seeds: Sequence[Sequence[Row]]) -> dict[str, Any]:
    return {
        **asdict(metric.over_seeds(seeds)),
        "by_seed": [metric.estimate(rows).value for rows in seeds],
        "unit": metric.unit,
        "better": metric.better,
    }


def _best(judge: Metric, values: Mapping[str, float]) -> str:
    """The arm of the best figure; the first of equals."""
    known = {arm: value for arm, value in values.items() if not math.isnan(value)} or dict(values)
    sign = 1 if judge.better == "higher" else -1
    return max(known, key=lambda arm: sign * known[arm])


def _costs(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; the highest memory; unchanged only if it was so every time."""

    def mean(*path: str) -> float:
        values = [_at(record, path) for record in records]
        return math.fsum(values) / len(values)

    return {
        "seeds": len(records),
        **{name: mean(name) for name in COSTS},
        "steps": mean("learning", "steps"),
        "best_step": mean("learning", "best_step"),
        "rate": mean("learning", "rate"),
        "learning_seconds": mean("learning", "seconds"),
        "learning_cpu_seconds": mean("learning", "cpu_seconds"),
        "judging_seconds": mean("judging", "seconds"),
        "loaded_bytes": max(_at(record, ("memory", "loaded")) for record in records),
        "peak_learning_bytes": max(_at(record, ("memory", "peak_learning")) for record in records),
        "peak_judging_bytes": max(_at(record, ("memory", "peak_judging")) for record in records),
        "base_unchanged": all(record.get("base_unchanged") for record in records),
        "general_before": mean("general", "before"),
        "general_on": mean("general", "on"),
        "general_off": mean("general", "off"),
        "dtype": records[0].get("dtype"),
    }


def _at(record: Mapping[str, Any], path: Sequence[str]) -> float:
    """A figure in a record; nan where it was not measured."""
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return math.nan if value is None else float(value)
