"""A comparison's summary from its judged arms: quality with intervals, paired against the best, and costs.

An arm is anything that was judged on the same rows, over one or several seeds. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from softprompt.comparison.arm import ARMS
from softprompt.comparison.records import ArmResult, ArmSummary, Figure, Summary
from softprompt.errors import SoftPromptError
from softprompt.evaluation.metric import METRICS, Metric
from softprompt.evaluation.rows import Row


def summarise(
    results: Mapping[str, Sequence[ArmResult]],
    rows: Mapping[str, Sequence[Sequence[Row]]],
    metrics: Sequence[str],
) -> Summary:
    """The `results` and judged `rows` of every arm, a list over its seeds, side by side.

    The first metric judges. Every arm is set against the best one and, where it was run, against the base, row by
    row. Raises SoftPromptError where arms were judged on different rows.
    """
    judge = METRICS[metrics[0]]
    try:
        arms = {
            arm: _with_costs({name: _figure(METRICS[name], rows[arm]) for name in metrics}, results[arm])
            for arm in results
        }
        best = _best(judge, {arm: summary.metrics[judge.name].value for arm, summary in arms.items()})
        for arm, summary in arms.items():
            if arm in ARMS and ARMS[arm].decodes_as_base and "base" in arms:
                summary = replace(summary, decode_tokens_per_second=arms["base"].decode_tokens_per_second)
            arms[arm] = replace(
                summary,
                against_best=judge.difference(rows[arm], rows[best]),
                against_base=judge.difference(rows[arm], rows["base"]) if "base" in rows else None,
            )
    except ValueError as error:
        raise SoftPromptError(
            f"The arms cannot be compared: {error} Start again in another folder."
        ) from error
    return Summary(judge.name, judge.better, judge.unit, best, arms)


def _figure(metric: Metric, seeds: Sequence[Sequence[Row]]) -> Figure:
    mean = metric.over_seeds(seeds)
    by_seed = tuple(metric.estimate(rows).value for rows in seeds)
    low, high = metric.interval(seeds)
    return Figure(mean.value, mean.stderr, mean.n, by_seed, metric.unit, metric.better, low, high)


def _best(judge: Metric, values: Mapping[str, float]) -> str:
    """The arm of the best figure; the first of equals."""
    known_values = {arm: value for arm, value in values.items() if not math.isnan(value)} or dict(values)
    sign = 1 if judge.better == "higher" else -1
    return max(known_values, key=lambda arm: sign * known_values[arm])


def _with_costs(figures: dict[str, Figure], seeds: Sequence[ArmResult]) -> ArmSummary:
    """Means over the seeds; the highest memory; unchanged only if it was so every time."""

    def mean(cost: Callable[[ArmResult], float]) -> float:
        return math.fsum(map(cost, seeds)) / len(seeds)

    return ArmSummary(
        metrics=figures,
        seeds=len(seeds),
        trained_parameters=mean(lambda run: run.trained_parameters),
        stored_bytes=mean(lambda run: run.stored_bytes),
        added_tokens=mean(lambda run: run.added_tokens),
        decode_tokens_per_second=mean(lambda run: run.decode_tokens_per_second),
        decode_clock=seeds[0].decode_clock,
        steps=mean(lambda run: run.learning.steps),
        best_step=mean(lambda run: run.learning.best_step),
        rate=mean(lambda run: run.learning.rate),
        learning_seconds=mean(lambda run: run.learning.seconds),
        learning_cpu_seconds=mean(lambda run: run.learning.cpu_seconds),
        judging_seconds=mean(lambda run: run.judging.seconds),
        loaded_bytes=max(run.memory.loaded for run in seeds),
        peak_learning_bytes=max(run.memory.peak_learning for run in seeds),
        peak_judging_bytes=max(run.memory.peak_judging for run in seeds),
        base_unchanged=all(run.base_unchanged for run in seeds),
        general_before=mean(lambda run: run.general.before),
        general_on=mean(lambda run: run.general.on),
        general_off=mean(lambda run: run.general.off),
        dtype=seeds[0].dtype,
    )
