"""Limits of a comparison: sentences that follow from how it was made."""

from __future__ import annotations

from softprompt.comparison.records import Comparison
from softprompt.report import figures

SMALL_BASE = 100_000_000
FEW_ROWS = 300


def limits(comparison: Comparison) -> list[str]:
    """One sentence for each reason to believe the figures less, or elsewhere."""
    summary = comparison.summary
    judge = summary.judged_by
    best = summary.arms[summary.best].metrics[judge]
    sentences = []
    if best.n < FEW_ROWS:
        sentences.append(
            f"{best.n} rows were judged on, so small differences cannot be detected; more test rows would help."
        )
    settings = comparison.settings
    if settings is not None and settings.seeds == 1:
        sentences.append(
            "One seed: what another start or another order of rows would change is not in the intervals."
        )
    if len(summary.arms) > 1:
        sentences.append(
            "The best arm was picked on the rows it is judged on, which flatters it a little; differences to it are "
            "not corrected for having several arms."
        )
    if any(arm.metrics[judge].stderr == 0 for arm in summary.arms.values()):
        sentences.append(
            "A figure that is the same on every row (all right, or all wrong) has a standard error of 0; "
            "other rows could still differ."
        )
    if comparison.kind == "comparison":
        sentences += _of_comparison(comparison)
    parameters = comparison.base.parameters
    if figures.known(parameters) and parameters < SMALL_BASE:
        sentences.append(
            f"The base has {figures.count(parameters)} weights and knows little of the world: this shows how the methods "
            "compare on it, not how well a larger base would do."
        )
    if {"bleu", "chrf", "rouge_l"} & set(comparison.metrics):
        sentences.append(
            "Overlap with a reference is a weak judge of text: a good answer in other words scores low."
        )
    return sentences


def _of_comparison(comparison: Comparison) -> list[str]:
    sentences = []
    arms, settings = comparison.summary.arms, comparison.settings
    rates = [f"{name} {arm.rate:.2g}" for name, arm in arms.items() if figures.known(arm.rate)]
    if rates:
        sentences.append(
            f"Every arm ran at one learning rate ({', '.join(rates)}); none was searched for, and another might suit it "
            "better."
        )
    seconds = settings.seconds if settings is not None else None
    sentences.append(
        f"Each learned arm had about {seconds:g} s of learning steps, whatever number that is."
        if seconds
        else "The learned arms took the same number of steps on the same rows; a step of one costs more than of another."
    )
    still = [
        name
        for name, arm in arms.items()
        if arm.steps and arm.best_step == arm.steps and figures.known(arm.steps)
    ]
    if still:
        sentences.append(
            f"Still improving at the last step: {', '.join(still)}. A longer run would change their figures."
        )
    machine = comparison.machine
    if machine.get("load", 0) > (machine.get("cores") or 1):
        sentences.append(
            f"The machine was busy (load {machine['load']} on {machine['cores']} cores): wall times and speeds are worth "
            "little beyond their order, CPU times more."
        )
    if not comparison.own_process:
        sentences.append("All arms ran in one process, so later ones inherit memory of earlier ones.")
    if "base" in arms and "wording" not in arms:
        sentences.append(
            "The base was asked in one wording; it may know the task by another (the arm wording tries several)."
        )
    if "prompt" in arms or "few-shot" in arms:
        sentences.append("Engineered prompts were tried once as given; a better text may exist.")
    if "full" in arms:
        sentences.append("Full fine-tuning learned in float32 and was judged in the base's own dtype.")
    return sentences
