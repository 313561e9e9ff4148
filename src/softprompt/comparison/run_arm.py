"""One arm with one seed, from loading to figures; `python -m softprompt.comparison.run_arm FOLDER` gives it a process.

Events go to standard output, a JSON object a line; the result is FOLDER/result.json, written last.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from softprompt.base import hardware
from softprompt.comparison import forgetting, measure
from softprompt.comparison.anatomy import anatomy
from softprompt.comparison.arms import MAKERS
from softprompt.comparison.assignment import Assignment, PreparedArm
from softprompt.comparison.records import (
    ArmResult,
    Clocked,
    Continued,
    General,
    Learning,
    Memory,
    MetricFigure,
    Point,
)
from softprompt.comparison.settings import CompareSettings, Job
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import SoftPromptError
from softprompt.evaluation.evaluate import default_metrics, judge_rows
from softprompt.evaluation.judge import first_rows, judged_examples
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import as_learned, predictor, settled
from softprompt.evaluation.record import write_json
from softprompt.evaluation.rows import ROWS, SUMMARY
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.progress.events import Event, Stepped
from softprompt.tuning.settle import load_base
from softprompt.tuning.task import Task, task_of

RESULT = "result.json"
REPORT_EVERY_SECONDS = 1.0
SAMPLES, SAMPLE_WORDS, SAMPLE_TOKENS = 8, 6, 40

TellJob = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much."""


def run_job(job: Job, tell: TellJob = lambda what, done, of: None) -> ArmResult:
    """Makes the arm prepared, judge it, measures what it costs; the result is also left in the job's folder."""
    settings = job.settings
    job.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    tell("loading", 0, 1)
    lm = load_base(job.recipe)
    task = task_of(job.recipe, lm)
    layout = task.template
    judged, split, _ = judged_rows(task, settings)
    before = lm.weights_sha256()
    path = None if settings.general is None else Path(settings.general)
    general = forgetting.fitted(lm, forgetting.passages(path))
    general_before = forgetting.general_loss(lm, forgetting.before_general_text(lm, None), general)
    loaded_bytes = hardware.memory_bytes(lm.device)

    hardware.forget_peak(lm.device)
    clock = measure.Clock(lm.device)
    prepared = MAKERS[job.arm](Assignment(lm, task, job, _learning(tell)))
    learning = clock.read()
    peak_learning = hardware.peak_memory_bytes(lm.device)

    labelled = chain(task.splits.train, judged)
    metrics = metrics_named(settings.metrics or default_metrics(layout, labelled))
    asked = settled(settings, lm, layout, judged, task.splits.train)
    if prepared.trained_parameters:  # answers of earlier weights are not those of the present ones
        discard_rows(job.folder)
    hardware.forget_peak(lm.device)
    clock = measure.Clock(lm.device)
    evaluation = judge_rows(
        predictor(prepared.lm, prepared.prompt, layout, metrics, asked, end=task.end),
        judged,
        metrics,
        layout,
        out=job.folder,
        about={"arm": job.arm, "seed": job.seed, "digest": job.digest},
        on_progress=lambda done, rows: tell("judging", done, rows),
        as_learned=as_learned(lm, special_tokens=task.special_tokens),
    )
    judging = clock.read()
    peak_judging = hardware.peak_memory_bytes(lm.device)

    tell("measuring", 0, 1)
    alone = compile_prompt(lm, None, template=layout, special_tokens=task.special_tokens)
    unchanged, digests, after = _base_after(prepared, before, general, general_before.value)
    result = ArmResult(
        arm=job.arm,
        seed=job.seed,
        digest=job.digest,
        judged_on=split,
        data_revision=task.splits.revision,
        base_fingerprint=lm.fingerprint.digest,
        rows=len(evaluation.rows),
        metrics={
            metric.name: MetricFigure(
                **vars(evaluation.estimates[metric.name]), unit=metric.unit, better=metric.better
            )
            for metric in metrics
        },
        confusion=evaluation.confusion,
        trained_parameters=prepared.trained_parameters,
        stored_bytes=prepared.stored_bytes,
        added_tokens=measure.added_tokens(lm, prepared.prompt, alone, judged),
        decode_tokens_per_second=measure.decoding_speed(prepared.lm, prepared.prompt, judged),
        decode_clock=measure.decoding_clock(lm.device),
        learning=Learning(
            **learning, steps=prepared.steps, best_step=prepared.best_step, rate=prepared.learning_rate
        ),
        judging=Clocked(**judging),
        memory=Memory(loaded_bytes, peak_learning, peak_judging),
        general=after,
        base_unchanged=unchanged,
        base_sha256=digests,
        dtype=str(prepared.lm.dtype).removeprefix("torch."),
        samples=samples(prepared, layout, judged),
        curve=tuple(Point(**point) for point in prepared.curve),
        validation=tuple(Point(**point) for point in prepared.validation),
        about={key: value for key, value in prepared.about.items() if key != "learned"},
        anatomy=anatomy(lm, prepared.about["learned"]) if "learned" in prepared.about else None,
        machine=hardware.machine(lm.device),
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    write_json(job.folder / RESULT, result.to_record())
    return ArmResult.read(job.folder / RESULT)


def discard_rows(folder: Path) -> None:
    """Forgets what was judged in a folder."""
    for name in (ROWS, SUMMARY, RESULT):
        (folder / name).unlink(missing_ok=True)


def judged_rows(task: Task, settings: CompareSettings) -> tuple[list[Example], str, list[str]]:
    """The rows that every arm is judged on, never those that were learned from, which split they are, and notes on them.

    A row that does not fit the base together with the virtual tokens raises TooLong here, before anything is learned."""
    rows, split = judged_examples(task.splits, settings.split, learned_from=False)
    first, notes = first_rows(rows, settings.judge_rows, task.template.target)
    fit, _ = task.check_judged(first, split)
    return list(fit), split, notes


def samples(prepared: PreparedArm, layout: Template, judged: list[Example]) -> tuple[Continued, ...]:
    """Running text continued from the first words of some rows, so that arms without a target can be read too."""
    if layout.target is not None or layout.chat or len(layout.inputs) != 1:
        return ()
    (name,) = layout.inputs
    starts = [" ".join(example.fields[name].split()[:SAMPLE_WORDS]) for example in judged[:SAMPLES]]
    settings = DecodeSettings(max_new_tokens=SAMPLE_TOKENS)
    continuations = generate(
        prepared.lm, [Example({name: start}) for start in starts], prepared.prompt, settings, progress=False
    )
    return tuple(Continued(start, text.text) for start, text in zip(starts, continuations, strict=True))


def _base_after(
    prepared: PreparedArm, before: str, general: list[Example], general_before: float
) -> tuple[bool, dict[str, str], General]:
    """Whether the base is what it was, bit for bit; its digests; and general text with the task on and off."""
    in_front = forgetting.before_general_text(prepared.lm, prepared.in_front)
    on = forgetting.general_loss(prepared.lm, in_front, general).value
    base = prepared.restore() if prepared.restore else prepared.lm
    off = forgetting.general_loss(base, forgetting.before_general_text(base, None), general).value
    after = base.weights_sha256()
    losses = General(general_before, on, off, len(general))
    return after == before, {"before": before, "after": after}, losses


def _learning(tell: TellJob) -> Callable[[Event], None]:
    def report_step(event: Event) -> None:
        if isinstance(event, Stepped):
            tell("learning", event.step, event.steps)

    return report_step


def main(arguments: list[str]) -> int:
    """Runs the job of a folder, reporting its progress on standard output."""
    last = 0.0

    def tell(what: str, done: int, of: int) -> None:
        nonlocal last
        if done in (0, of) or time.monotonic() - last > REPORT_EVERY_SECONDS:
            last = time.monotonic()
            print(json.dumps([what, done, of]), flush=True)

    try:
        run_job(Job.load(Path(arguments[0])), tell)
    except KeyboardInterrupt:
        return 130
    except SoftPromptError as error:
        print(json.dumps({"failed": str(error)}), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
