"""One arm with one seed, from loading to figures; `python -m softprompt.comparison.run_arm FOLDER` gives it a process.

Events go to standard output, a JSON object a line; the result is FOLDER/result.json, written last.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from softprompt.base import hardware
from softprompt.comparison import forgetting, measure
from softprompt.comparison.anatomy import anatomy
from softprompt.comparison.arms import ARMS, Ready, Task
from softprompt.comparison.settings import Job
from softprompt.data.example import Example, Splits
from softprompt.data.template import Template
from softprompt.errors import SoftPromptError
from softprompt.evaluation.evaluate import as_record, default_metrics, evaluate
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import Asking, labels_of, predictor
from softprompt.evaluation.rows import ROWS, SUMMARY, write_json
from softprompt.inference.compiled import compile_prompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.tuning.events import Event, Stepped
from softprompt.tuning.settle import load_base
from softprompt.tuning.task import read_splits, settle_template

RESULT = "result.json"
TOLD_EVERY_SECONDS = 1.0
SAMPLES, SAMPLE_WORDS, SAMPLE_TOKENS = 8, 6, 40

Tell = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much."""


def run_job(job: Job, tell: Tell = lambda what, done, of: None) -> dict[str, Any]:
    """Make the arm ready, judge it, measure what it costs; the record is also left in the job's folder."""
    settings = job.settings
    job.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    tell("loading", 0, 1)
    lm = load_base(settings.recipe)
    splits = read_splits(settings.recipe)
    layout = settle_template(settings.recipe, lm, splits)
    judged, split = judged_rows(splits, settings.limit)
    before = lm.weights_sha256()
    path = None if settings.general_text is None else Path(settings.general_text)
    general = forgetting.fitted(lm, forgetting.passages(path))
    general_before = forgetting.general_loss(lm, forgetting.before_general_text(lm, None), general)
    loaded_bytes = hardware.memory_bytes(lm.device)

    hardware.forget_peak(lm.device)
    clock = measure.Clock(lm.device)
    ready = ARMS[job.arm](Task(lm, splits, layout, job, _learning(tell)))
    learning = clock.read()
    peak_learning = hardware.peak_memory_bytes(lm.device)

    names = settings.metrics or tuple(default_metrics(layout, [*splits.train, *judged]))
    metrics = metrics_named(names)
    asking = Asking(
        labels=labels_of(layout, [*splits.train, *judged]) if settings.answers == "rank" else None,
        calibrated=settings.calibrated,
        end=settings.recipe.data.end,
    ).settled(lm, layout, judged)
    if ready.trained_parameters:  # what was learned anew is judged anew
        discard_rows(job.folder)
    hardware.forget_peak(lm.device)
    clock = measure.Clock(lm.device)
    found = evaluate(
        predictor(ready.lm, ready.prompt, layout, metrics, asking, batch_rows=settings.batch_rows),
        judged,
        metrics,
        layout,
        out=job.folder,
        about={"arm": job.arm, "seed": job.seed, "digest": job.digest},
        on_progress=lambda done, rows: tell("judging", done, rows),
    )
    judging = clock.read()
    peak_judging = hardware.peak_memory_bytes(lm.device)

    tell("measuring", 0, 1)
    alone = compile_prompt(lm, None, template=layout)
    record: dict[str, Any] = {
        "arm": job.arm,
        "seed": job.seed,
        "digest": job.digest,
        "judged_on": split,
        "data_revision": splits.revision,
        "base_fingerprint": lm.fingerprint.sha256,
        **as_record(found),
        "trained_parameters": ready.trained_parameters,
        "stored_bytes": ready.stored_bytes,
        "added_tokens": measure.added_tokens(lm, ready.prompt, alone, judged),
        "decode_tokens_per_second": measure.decoding_speed(ready.lm, ready.prompt, judged),
        "learning": {
            **learning,
            "steps": ready.steps,
            "best_step": ready.best_step,
            "rate": ready.learning_rate,
        },
        "judging": judging,
        "memory": {"loaded": loaded_bytes, "peak_learning": peak_learning, "peak_judging": peak_judging},
        "dtype": str(ready.lm.dtype).removeprefix("torch."),
        "samples": samples(ready, layout, judged),
        "curve": ready.curve,
        "validation": ready.validation,
        "about": {key: value for key, value in ready.about.items() if key != "learned"},
        "anatomy": anatomy(lm, ready.about["learned"]) if "learned" in ready.about else None,
        "machine": hardware.machine(lm.device),
    }
    record |= _base_after(ready, before, general, general_before.value)
    record["made"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(job.folder / RESULT, record)
    written: dict[str, Any] = json.loads((job.folder / RESULT).read_text("utf-8"))
    return written


def discard_rows(folder: Path) -> None:
    """Forget what was judged in a folder."""
    for name in (ROWS, SUMMARY, RESULT):
        (folder / name).unlink(missing_ok=True)


def judged_rows(splits: Splits, limit: int | None) -> tuple[list[Example], str]:
    """The test rows, or the validation rows where there are none: never those that were learned from."""
    for name, rows in (("test", splits.test), ("validation", splits.validation)):
        if rows:
            return list(rows[:limit]), name
    raise SoftPromptError(
        "The data has neither test nor validation rows, and judging on what was learned would say nothing. "
        "Set data.test, such as data.test=0.2."
    )


def samples(ready: Ready, layout: Template, judged: list[Example]) -> list[dict[str, str]]:
    """Running text goes on from the first words of some rows, so that arms without a target can be read too."""
    if layout.target is not None or layout.chat or len(layout.inputs) != 1:
        return []
    (name,) = layout.inputs
    starts = [" ".join(one.fields[name].split()[:SAMPLE_WORDS]) for one in judged[:SAMPLES]]
    settings = DecodeSettings(max_new_tokens=SAMPLE_TOKENS)
    said = generate(ready.lm, [Example({name: start}) for start in starts], ready.prompt, settings)
    return [{"input": start, "said": one.text} for start, one in zip(starts, said, strict=True)]


def _base_after(ready: Ready, before: str, general: list[Example], general_before: float) -> dict[str, Any]:
    """General text with the task on and off, and whether the base is what it was, bit for bit."""
    in_front = forgetting.before_general_text(ready.lm, ready.in_front)
    on = forgetting.general_loss(ready.lm, in_front, general).value
    base = ready.restore() if ready.restore else ready.lm
    off = forgetting.general_loss(base, forgetting.before_general_text(base, None), general).value
    after = base.weights_sha256()
    return {
        "general": {"before": general_before, "on": on, "off": off, "passages": len(general)},
        "base_unchanged": after == before,
        "base_sha256": {"before": before, "after": after},
    }


def _learning(tell: Tell) -> Callable[[Event], None]:
    def told(event: Event) -> None:
        if isinstance(event, Stepped):
            tell("learning", event.step, event.steps)

    return told


def main(arguments: list[str]) -> int:
    """Run the job of a folder, telling its progress on standard output."""
    last = 0.0

    def tell(what: str, done: int, of: int) -> None:
        nonlocal last
        if done in (0, of) or time.monotonic() - last > TOLD_EVERY_SECONDS:
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
