"""A comparison: every arm and seed in turn, each in its own process; what is done is not done again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from softprompt.base.hardware import machine
from softprompt.base.processes import demand_alone
from softprompt.base.workers import HERE, Workers
from softprompt.comparison.arm import ARMS
from softprompt.comparison.forgetting import passages
from softprompt.comparison.health import health
from softprompt.comparison.records import ArmResult, BaseFacts, Comparison, DataFacts
from softprompt.comparison.run_arm import RESULT, TellJob, judged_rows, run_job
from softprompt.comparison.settings import CompareSettings, Job, job_name
from softprompt.comparison.summary import summarise
from softprompt.errors import DataError, MissingExtra, SoftPromptError
from softprompt.evaluation.evaluate import default_metrics
from softprompt.evaluation.judge import described
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.record import write_json
from softprompt.evaluation.rows import ROWS, read_rows
from softprompt.progress.shown import shown_jobs
from softprompt.store.atomic import replace_file
from softprompt.store.ownership import claim, folder_named, remove_ours, writing
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.records import versions
from softprompt.tuning.settle import load_base
from softprompt.tuning.task import task_of

RECORD = "comparison.json"

Tell = Callable[[Job, str, int, int], None]
"""Called with the arm at work, what it is doing, and how much of how much."""


def compare(
    recipe: Recipe,
    settings: CompareSettings | None = None,
    out: str | Path | None = None,
    *,
    own_process: bool = True,
    workers: Workers = HERE,
    tell: Tell = lambda job, what, done, of: None,
    progress: bool | None = None,
    command: str = "",
) -> Comparison:
    """Runs what is not done yet, and leaves `out`/comparison.json (the recipe's folder without `out`).

    Arms of an earlier run with the same settings are reused, so a comparison that was killed continues with the arm
    that was running, and arms or seeds can be added later. An arm that fails is recorded with its reason, and is
    tried again next time; SoftPromptError is raised where none succeeds. On the `workers` of a cluster, arms and seeds run
    at the same time, each in a fresh process. Progress is shown in terminals and notebooks,
    unless `progress` is False.
    """
    demand_alone("compare")
    settings = (settings or CompareSettings()).settled_text()
    out = folder_named(recipe.out if out is None else out)
    _need_extras(settings)
    if settings.general is not None:
        passages(Path(settings.general))  # refused before anything is loaded
    with (
        writing(out, (RECORD,), "a comparison", kind="comparison"),
        shown_jobs(settings.job_names, progress=progress) as show,
    ):

        def report(job: Job, what: str, done: int, of: int) -> None:
            show(job.folder.name, what, done, of)
            tell(job, what, done, of)

        return _compare(recipe, settings, out, own_process, workers, report, command)


def _compare(
    recipe: Recipe,
    settings: CompareSettings,
    out: Path,
    own_process: bool,
    workers: Workers,
    tell: Tell,
    command: str,
) -> Comparison:
    lm = load_base(recipe)
    task = task_of(recipe, lm)
    splits, layout = task.splits, task.template
    judged, split, notes = judged_rows(task, settings)  # what cannot be is refused before anything is learned
    metrics = settings.metrics or default_metrics(layout, chain(splits.train, judged))
    metrics_named(metrics)
    base, base_digest, width, device = described(lm), lm.fingerprint.digest, lm.width, lm.device
    del lm  # each arm loads its own, and this process would only take its memory
    claim(out, "comparison", (RECORD,))
    jobs = [
        Job(recipe, settings, arm, seed, out / "arms" / job_name(arm, seed))
        for arm in settings.arms
        for seed in settings.seeds_of(arm)
    ]
    done: dict[str, ArmResult] = {}
    failed: dict[str, str] = {}
    asked: list[Job] = []

    def to_do() -> Iterator[Job]:
        for job in jobs:
            former = _done(job, splits.revision, base_digest, width)
            if former is not None:
                done[job.folder.name] = former
            elif job.arm not in failed:  # an arm needs all of its seeds
                _prepare(job)
                asked.append(job)
                yield job

    # A worker of a cluster is a process already; here one is started for each job.
    run = run_job if not own_process or not workers.are_here else _in_own_process
    outcomes = workers.map(
        partial(_attempted, run),
        to_do(),
        lambda number, event: tell(asked[number], *event),
        folder=out,
        own_process=own_process,
    )
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, SoftPromptError):
            failed.setdefault(asked[number].arm, str(outcome))
        else:
            done[asked[number].folder.name] = outcome
    results: dict[str, list[ArmResult]] = {
        arm: [done[job_name(arm, seed)] for seed in settings.seeds_of(arm)]
        for arm in settings.arms
        if arm not in failed
    }
    if not results:
        reasons = " ".join(f"{arm}: {reason}" for arm, reason in failed.items())
        raise SoftPromptError(f"No arm came to an end. {reasons}")
    rows = {
        arm: [read_rows(out / "arms" / job_name(arm, seed) / ROWS) for seed in settings.seeds_of(arm)]
        for arm in results
    }
    for judged_arm in rows.values():
        if {len(seed) for seed in judged_arm} != {len(judged)}:
            raise DataError(f"{out}: rows are missing from it. Delete the folder and compare again.")
    comparison = Comparison(
        summary=summarise(results, rows, metrics),
        runs={arm: tuple(runs) for arm, runs in results.items()},
        metrics=tuple(metrics),
        base=BaseFacts(**base),
        data=DataFacts(
            splits.source,
            splits.revision,
            split,
            {"train": len(splits.train), "validation": len(splits.validation), "judged": len(judged)},
        ),
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command,
        settings=settings,
        recipe=recipe.model_dump(),
        template=str(layout),
        target=layout.target,
        virtual_tokens=layout.soft_length,
        versions=versions() | _peft_version(settings),
        machine=machine(device),
        own_process=own_process,
        arm_names={arm: ARMS[arm].words for arm in settings.arms},
        health=health(task, judged, notes),
        failed=failed,
    )
    write_json(out / RECORD, comparison.to_record())
    return comparison


def _attempted(
    run: Callable[[Job, TellJob], ArmResult], job: Job, tell: Callable[[Any], None]
) -> ArmResult | SoftPromptError:
    """The result of a job, or why there is none: one arm that fails does not end the others."""
    try:
        return run(job, lambda what, done, of: tell((what, done, of)))
    except SoftPromptError as error:
        return error


def _done(job: Job, data_revision: str | None, base_digest: str, width: int) -> ArmResult | None:
    """The result of an earlier run of the same job, on the same data and base, at the rate that it would have now."""
    try:
        result = ArmResult.read(job.folder / RESULT)
    except DataError:
        return None
    same = (
        _former_digest(job.folder) == job.digest
        and result.data_revision == data_revision
        and result.base_fingerprint == base_digest
        and _at_this_rate(job, result, width)
        and (job.folder / ROWS).exists()
    )
    return result if same else None


def _at_this_rate(job: Job, result: ArmResult, width: int) -> bool:
    """Whether an arm's own rate is what it was: another version may have another default."""
    own = ARMS[job.arm].rate_at(width)
    return job.arm in job.settings.rates or math.isnan(own) or math.isclose(result.learning.rate, own)


def _former_digest(folder: Path) -> str | None:
    """The digest of the job whose folder this is, with the defaults of settings that are newer than it; None without one."""
    try:
        return Job.load(folder).digest if (folder / "job.json").exists() else None
    except (SoftPromptError, ValueError, KeyError, TypeError):
        return None


def _prepare(job: Job) -> None:
    """A folder that holds this job, and nothing of another one."""
    if job.folder.exists() and _former_digest(job.folder) != job.digest:
        remove_ours(job.folder, "arm", "job.json")
    claim(job.folder, "arm", ("job.json", "log.txt", RESULT))
    replace_file(job.folder / "job.json", job.to_json())


def _in_own_process(job: Job, tell: TellJob) -> ArmResult:
    """Runs the job in a fresh process, so that its memory is its own."""
    failure = ""
    command = [sys.executable, "-m", "softprompt.comparison.run_arm", str(job.folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        (job.folder / "log.txt").open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # some library's own words
                if isinstance(event, list):
                    tell(*event)
                elif isinstance(event, Mapping):
                    failure = str(event.get("failed", ""))
            code = child.wait()
        except BaseException:
            child.terminate()
            raise
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise SoftPromptError(failure or _last_words(job.folder / "log.txt", code))
    return ArmResult.read(job.folder / RESULT)


def _last_words(log: Path, code: int) -> str:
    """The reason why a process ended without reporting it."""
    if code < 0:
        return f"its process was ended by signal {-code} (out of memory, if nobody did it). See {log}."
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else f'it ended with code {code}'} (see {log})"


def _need_extras(settings: CompareSettings) -> None:
    """Refuses before anything is run, not hours later."""
    if "lora" in settings.arms:
        import importlib.util

        if importlib.util.find_spec("peft") is None:
            raise MissingExtra(
                "The arm lora needs PEFT, which is not installed. Run: pip install 'softprompt[lora]'"
            )


def _peft_version(settings: CompareSettings) -> dict[str, str]:
    if "lora" not in settings.arms:
        return {}
    from importlib.metadata import version

    return {"peft": version("peft")}
