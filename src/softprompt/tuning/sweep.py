"""Many settings, several seeds each, learned side by side; after each stretch the worse half is stopped.

Successive halving (Jamieson and Talwalkar 2016): with 8 settings, all run for an eighth of their steps, 4 for a
quarter, 2 for half, one to its end. Without halving all run to the end. What is compared is the best held-out loss so
far, as the mean over a setting's seeds, so settings are judged on the same seeds and rows.

Trials that share a pass are a group. In this process all of them stay in memory; on a cluster each group is a part of a
stretch, which a worker continues from the trials' checkpoints.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import demand_alone
from softprompt.base.workers import HERE, Workers
from softprompt.data.example import Splits
from softprompt.errors import NotFinite, RecipeError, SaveError
from softprompt.loss.gradient import Loss
from softprompt.progress.events import Event, loss_name
from softprompt.progress.shown import shown_runs
from softprompt.prompt.soft_prompt import Prompt
from softprompt.settings.text import scalar
from softprompt.store.artifact import load_prompt, save_prompt
from softprompt.store.json_values import plain
from softprompt.store.ownership import PROMPT_FILES, claim, folder_named
from softprompt.store.plain_file import read_bytes
from softprompt.tuning.recipe import Recipe
from softprompt.tuning.records import SCHEMA
from softprompt.tuning.trials import InMemory, Spread, Trials

RECORDS, TRIALS = "sweep.jsonl", "trials"
PARALLEL = 8  # prompts in a pass, at most, unless asked otherwise

Setting = tuple[str, ...]
"""Overrides of the recipe, such as ("tune.learning_rate=0.03", "prompt.length=10")."""


@dataclass(frozen=True)
class Trial:
    """One setting with one seed, how far it is and how good (nats per trained token; `nll` is its best so far)."""

    name: str
    setting: Setting
    seed: int
    step: int = 0
    nll_start: float = math.nan
    nll: float = math.nan
    best_step: int = 0
    kept: bool = True


@dataclass(frozen=True)
class SweepResult:
    """The winner's prompt, saved in `path`, and all trials.

    `nll` is the mean of the best losses over the winner's seeds, in nats per trained token, `nll_error` its standard error
    (nan with one seed), and `judged_on` the rows of these losses: validation, or training where none are held out."""

    prompt: Prompt = field(repr=False)
    path: str
    setting: Setting
    trials: tuple[Trial, ...]
    nll: float
    nll_error: float
    judged_on: str = "validation"

    @property
    def loss_name(self) -> str:
        """The name of the rows that the losses are measured on, for a heading."""
        return loss_name(self.judged_on == "validation")

    def to_record(self) -> dict[str, Any]:
        """The outcome as plain data for JSON."""
        return {
            "schema": SCHEMA,
            "path": self.path,
            "setting": list(self.setting),
            "nll": self.nll,
            "nll_error": self.nll_error,
            "judged_on": self.judged_on,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def __repr__(self) -> str:
        return (
            f"SweepResult({self.path}: {' '.join(self.setting)}, {self.loss_name} {self.nll:.4f}, best of "
            f"{len({trial.setting for trial in self.trials})} settings)"
        )

    def _repr_html_(self) -> str:
        """A table of all trials for a notebook, best first."""
        ranked = sorted(self.trials, key=lambda trial: trial.nll if math.isfinite(trial.nll) else math.inf)
        rows = "".join(
            f"<tr><td>{html.escape(' '.join(trial.setting))}</td><td>{trial.seed}</td><td>{trial.step}</td>"
            f"<td>{trial.nll:.4f}</td></tr>"
            for trial in ranked
        )
        return f"<table><tr><th>setting</th><th>seed</th><th>steps</th><th>{self.loss_name}</th></tr>{rows}</table>"


def grid(choices: Mapping[str, Sequence[str]]) -> list[Setting]:
    """Every combination of the values of each key."""
    keyed = [[f"{key}={value}" for value in values] for key, values in choices.items()]
    return list(itertools.product(*keyed))


def drawn(ranges: Mapping[str, str], count: int, seed: int) -> list[Setting]:
    """`count` random settings. A range is `a,b,c` (one of them) or `low..high`, evenly in the logarithm where both are
    above 0. Whole numbers stay whole. Raises RecipeError for anything else."""
    rng = random.Random(seed)
    return [tuple(f"{key}={_draw(key, text, rng)}" for key, text in ranges.items()) for _ in range(count)]


def _draw(key: str, text: str, rng: random.Random) -> str:
    low_text, dots, high_text = text.partition("..")
    if not dots:
        return rng.choice(text.split(","))
    low, high = scalar(low_text), scalar(high_text)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high:  # type: ignore[operator]
        raise RecipeError(f"--random {key}: found {text!r}, wanted low..high such as 1e-3..0.3, or a,b,c.")
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if low > 0 else rng.uniform(low, high)
    return str(round(value)) if isinstance(low, int) and isinstance(high, int) else f"{value:.4g}"


def stretches(settings: int, halving: bool) -> list[float]:
    """The shares of all steps after which the worse half goes; the last is 1."""
    rounds = max(0, math.ceil(math.log2(settings))) if halving else 0
    return [0.5**left for left in range(rounds, -1, -1)]


def sweep(
    recipe: Recipe,
    settings: Sequence[Setting],
    *,
    seeds: int = 1,
    halving: bool = False,
    parallel: int | None = None,
    lm: FrozenLM | None = None,
    splits: Splits | None = None,
    loss: Loss | None = None,
    workers: Workers = HERE,
    on_event: Callable[[str, Event], None] = lambda trial, event: None,
    on_stretch: Callable[[Sequence[Trial]], None] = lambda trials: None,
    progress: bool | None = None,
    resume: bool = False,
) -> SweepResult:
    """Learns `recipe` under every setting and seed, `parallel` prompts in a pass, and saves the winner in `recipe.out`.

    Every trial has its own folder under `trials/`; `sweep.jsonl` holds a line for each trial and stretch. With
    `resume`, a killed sweep continues. Without `parallel`, 8 prompts share a pass, or as few as give each of the `workers`
    of a cluster a part; the same `parallel` gives the same bits here and there. Progress is shown in terminals and notebooks,
    unless `progress` is False. Raises RecipeError for settings that do not fit, or NotFinite when every setting broke."""
    demand_alone("sweep")
    if not workers.are_here and (lm is not None or loss is not None):
        raise RecipeError(
            "lm: found a base or a loss in memory, which cannot be sent to a cluster. Name the base in the recipe instead."
        )
    out = folder_named(recipe.out)
    trials = [
        Trial(f"{number:03}-seed{seed}", setting, seed)
        for number, setting in enumerate(settings)
        for seed in range(recipe.tune.seed, recipe.tune.seed + seeds)
    ]
    recipes = [
        recipe.changed([*trial.setting, f"tune.seed={trial.seed}", f"out={out / TRIALS / trial.name}"])
        for trial in trials
    ]
    shares = stretches(len(settings), halving)
    records = _Records(
        out, {"settings": settings, "seeds": seeds, "halving": halving, "recipe": recipe.model_dump()}
    )
    done = records.begin(resume)
    trials = [replace(trial, **done.get(trial.name, {})) for trial in trials]
    going = [n for n, trial in enumerate(trials) if trial.kept]

    parallel = parallel or min(PARALLEL, math.ceil(len(going) / workers.count)) or 1

    with shown_runs([trial.name for trial in trials], on_event, progress) as show:

        def tell(position: int, event: Event) -> None:
            show(trials[going[position]].name, event)

        learning: Trials
        if workers.are_here:
            learning = InMemory([recipes[n] for n in going], lm, splits, loss, tell, resume)
        else:
            learning = Spread([recipes[n] for n in going], splits, workers, tell, out, resume)
        try:
            for share in shares[records.stretches_done :]:
                left = [
                    position
                    for position, n in enumerate(going)
                    if trials[n].kept and position not in learning.failed
                ]
                groups = [left[first : first + parallel] for first in range(0, len(left), parallel)]
                for position, figures in learning.advance(share, groups).items():
                    trials[going[position]] = replace(trials[going[position]], **asdict(figures))
                for position in learning.failed:
                    trials[going[position]] = replace(trials[going[position]], nll=math.nan)
                kept = (
                    _better_half(trials) if share < 1 else {trial.setting for trial in trials if trial.kept}
                )
                former, trials = (
                    trials,
                    [replace(trial, kept=trial.kept and trial.setting in kept) for trial in trials],
                )
                records.stretch(share, trials)
                learning.drop(
                    [
                        position
                        for position, n in enumerate(going)
                        if former[n].kept and not trials[n].kept and position not in learning.failed
                    ]
                )
                on_stretch(trials)
            learning.save()
        finally:
            learning.close()
    winner = min(
        (trial.setting for trial in trials if trial.kept), key=lambda setting: _rank(trials, setting)
    )
    mine = [trial for trial in trials if trial.setting == winner]
    if not any(math.isfinite(trial.nll) for trial in mine):
        raise next(iter(learning.failed.values()), NotFinite("Every trial broke. Lower tune.learning_rate."))
    best = min(mine, key=lambda trial: trial.nll if math.isfinite(trial.nll) else math.inf)
    prompt = load_prompt(out / TRIALS / best.name)
    nlls = [trial.nll for trial in mine if math.isfinite(trial.nll)]
    error = statistics.stdev(nlls) / len(nlls) ** 0.5 if len(nlls) > 1 else math.nan
    notes = {**prompt.notes, "sweep": {"setting": list(winner), "trial": best.name, "of": len(settings)}}
    prompt = replace(prompt, name=out.resolve().name, notes=notes)
    save_prompt(prompt, out)
    judged_on = str(prompt.notes["metrics"]["judged_on"])
    result = SweepResult(prompt, str(out), winner, tuple(trials), statistics.fmean(nlls), error, judged_on)
    records.end(result.to_record())
    return result


def _rank(trials: Sequence[Trial], setting: Setting) -> float:
    """Mean over the seeds; infinite where any of them broke."""
    mean = statistics.fmean(trial.nll for trial in trials if trial.setting == setting)
    return mean if math.isfinite(mean) else math.inf


def _better_half(trials: Sequence[Trial]) -> set[Setting]:
    going = list(dict.fromkeys(trial.setting for trial in trials if trial.kept))
    return set(sorted(going, key=lambda setting: _rank(trials, setting))[: math.ceil(len(going) / 2)])


class _Records:
    """`sweep.jsonl`: what was asked for, a line a trial and stretch, and the outcome."""

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.path = out / RECORDS
        self.asked = json.loads(json.dumps({"event": "Asked", **asked}))
        self.stretches_done = 0

    def begin(self, resume: bool) -> dict[str, dict[str, Any]]:
        """Starts the file, or reads what a killed sweep left: each trial's figures after its last stretch."""
        claim(self.path.parent, "sweep", (RECORDS,), later=PROMPT_FILES)
        if not resume or not self.path.exists():
            self._write([self.asked], "w")
            return {}
        lines: list[dict[str, Any]] = []
        for line in self._former_text().split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break  # the kill cut it short
            if not isinstance(record, dict) or not isinstance(record.get("event"), str):
                break  # none of ours
            lines.append(record)
        if not lines or lines[0] != self.asked:
            raise RecipeError(
                f"{self.path}: holds a sweep of other settings. Give the same ones to continue, or leave out --resume."
            )
        whole = [number for number, line in enumerate(lines) if line["event"] == "Stretch"]
        lines = lines[: whole[-1] + 1] if whole else lines[:1]
        self._write(lines, "w")
        self.stretches_done = len(whole)
        figures = {"step", "nll_start", "nll", "best_step", "kept"}
        return {
            line["name"]: {
                key: math.nan if value is None else value for key, value in line.items() if key in figures
            }
            for line in lines
            if line["event"] == "Trial" and isinstance(line.get("name"), str)
        }

    def _former_text(self) -> str:
        try:
            return read_bytes(self.path).decode("utf-8", "replace")
        except OSError as error:
            raise RecipeError(
                f"{self.path}: cannot be read ({error.strerror}). Leave out --resume to start again."
            ) from None

    def stretch(self, share: float, trials: Sequence[Trial]) -> None:
        """Writes every trial's present figures, and then that the stretch is over."""
        lines = [{"event": "Trial", **asdict(trial)} for trial in trials]
        self._write([*lines, {"event": "Stretch", "share": share}], "a")

    def end(self, record: Mapping[str, Any]) -> None:
        """The outcome."""
        self._write(
            [{"event": "Winner", **{key: record[key] for key in ("path", "setting", "nll", "nll_error")}}],
            "a",
        )

    def _write(self, lines: Sequence[Mapping[str, Any]], mode: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                for line in lines:
                    file.write(json.dumps(plain(line), ensure_ascii=False) + "\n")
        except OSError as error:
            raise SaveError(
                f"{self.path}: cannot be written ({error.strerror}). Free some space or choose another folder."
            ) from error
