"""Judging in one call: a prompt, a text or the base alone, on any rows, with figures and their errors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.base.from_settings import settings_of
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.processes import Processes, joined
from softprompt.base.workers import HERE, Workers
from softprompt.data.default_template import CHAT
from softprompt.data.example import Example, Splits
from softprompt.data.label_notes import sorted_note
from softprompt.data.layout import to_learn
from softprompt.data.source import OWN
from softprompt.data.template import Template
from softprompt.errors import DataError, RecipeError
from softprompt.evaluation.answers_elsewhere import AnswersElsewhere, compiled_in
from softprompt.evaluation.evaluate import Evaluation, Predict, default_metrics, judge_rows
from softprompt.evaluation.metric import metrics_named
from softprompt.evaluation.predictor import as_learned, demand_answers, predictor, settled
from softprompt.evaluation.settings import JudgedData, JudgeSettings
from softprompt.inference.compiled import CompiledPrompt, TextPrompt
from softprompt.progress.bar import Advance, progress_bar
from softprompt.prompt.soft_prompt import Prompt
from softprompt.settings.base_settings import BaseSettings
from softprompt.store.artifact import load_prompt
from softprompt.store.ownership import folder_named
from softprompt.tuning.recipe import Data, Recipe
from softprompt.tuning.settle import load_base
from softprompt.tuning.task import Task, read_splits, task_of

Rows: TypeAlias = Task | Splits | str | Path | Iterable[Any]
"""What can be judged on: a task, splits, a source (file, folder, id), or rows in memory."""

IN_MEMORY = "rows in memory"
DEMANDED = ("max_length", "on_overflow", "end", "special_tokens")  # of any row that a prompt reads
SPLITS = ("test", "validation", "train")  # the most independent one first


def evaluate(
    prompt: Prompt | TextPrompt | str | Path | None = None,
    data: Rows | None = None,
    *,
    base: str | Path | FrozenLM | None = None,
    template: str | None = None,
    target: str | None = None,
    column: str | None = None,
    settings: JudgeSettings | None = None,
    reading: JudgedData | None = None,
    extra_metrics: Sequence[str] = (),
    out: str | Path | None = None,
    workers: Workers = HERE,
    progress: bool | Advance | None = None,
) -> Evaluation:
    """Judges a learned prompt (or its folder), an engineered text (TextPrompt), or the base alone (None).

    A prompt brings its base, template, target, length, row limit and ending; without `data` it is judged on the held-out
    rows of what it was learned on. `reading` is a recipe's data section: what it sets overrides the prompt's own;
    `template`, `target` and `column` are short for it. `extra_metrics` are measured beside those of `settings`.
    Where `torchrun` started several processes, each judges a share of the rows, the first one keeps them, and all get the
    figures.
    With `out`, rows are kept there, and the same call continues after an interruption. The `workers` of a cluster load the
    base by its name, and each answers some rows at a time. Progress is shown in terminals and
    notebooks, unless `progress` is False; a function is called instead with the number of rows judged and of all rows.

    Raises RecipeError, DataError, PromptError, BaseError; NotFinite where numbers overflow the base.
    """
    settings = settings or JudgeSettings()
    folder = str(prompt) if isinstance(prompt, str | Path) else None
    text = prompt.text if isinstance(prompt, TextPrompt) else None
    learned = load_prompt(prompt) if isinstance(prompt, str | Path) else prompt
    learned = None if isinstance(learned, TextPrompt) else learned
    given = {
        **({} if reading is None else reading.given),
        **_set(template=template, target=target, column=column),
    }
    task, lm = _settled_task(learned, data, base, given, settings.split)
    examples, split = judged_examples(task.splits, settings.split)
    notes = list(task.splits.notes) if isinstance(data, str | Path) or "source" in given else []
    examples, of_order = first_rows(examples, settings.judge_rows, task.template.target)
    notes += of_order
    layout = task.template
    compiled = compiled_for(lm, learned, text, task)
    examples, left_out = task.check_judged(
        examples, split, lambda example: _positions(task, lm, compiled, example)
    )
    labelled = chain(task.splits.train, examples)
    names = list(dict.fromkeys([*(settings.metrics or default_metrics(layout, labelled)), *extra_metrics]))
    metrics = metrics_named(names)
    answering = settled(settings, lm, layout, examples, task.splits.train)
    about = {
        "name": "base" if compiled.name is None else compiled.name,
        "arm": compiled.kind,
        "base": described(lm),
        "prompt": identity(learned, text),
        "prompt_folder": folder,
        "template": str(layout),
        "target": layout.target,
        "data": {"source": task.splits.source, "revision": task.splits.revision, "split": split},
        "answers": answering.answers,
        "settings": answering.model_dump(exclude={"batch_rows"})
        | {"end": task.end}
        | ({"special_tokens": True} if task.special_tokens else {}),
        "left_out": left_out,
        "metrics": names,
    }
    predict: Predict
    if workers.are_here:
        predict = predictor(lm, compiled, layout, metrics, answering, end=task.end)
    else:
        demand_answers(metrics, layout)
        front = None if text is None else task.behind(text)
        predict = AnswersElsewhere(
            settings_of(lm),
            lm.fingerprint,
            learned,
            front,
            layout,
            tuple(names),
            answering,
            task.end,
            task.special_tokens,
        )
    processes = joined(shares_rows=not lm.is_split) if workers.are_here else Processes()
    answers = predict if processes.count == 1 else partial(processes.share_out, predict)
    with progress_bar(progress if processes.first else False, "judging") as advance:
        return judge_rows(
            answers,
            examples,
            metrics,
            layout,
            out=None if out is None or not processes.first else folder_named(out),
            about=about,
            notes=notes,
            on_progress=advance,
            as_learned=as_learned(lm, special_tokens=task.special_tokens),
            workers=workers,
            same=processes.same if processes.count > 1 else None,
        )


def _set(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _settled_task(
    prompt: Prompt | None,
    data: Rows | None,
    base: str | Path | FrozenLM | None,
    given: Mapping[str, Any],
    split: str | None,
) -> tuple[Task, FrozenLM]:
    """The task to judge on, and the base it was made for."""
    in_memory = data is not None and not isinstance(data, str | Path)
    named = {} if data is None else {"source": IN_MEMORY if in_memory else str(data)}
    recipe = recipe_for(prompt, {**given, **named}, None if isinstance(base, FrozenLM) else base)
    lm = base if isinstance(base, FrozenLM) else load_base(recipe)
    if isinstance(data, Task):
        if prompt is None:
            return data, lm
        special_tokens = data.special_tokens or prompt.special_tokens
        return replace(data, template=_laid_out(prompt, given, data), special_tokens=special_tokens), lm
    splits = data if isinstance(data, Splits) else read_splits(recipe, data if in_memory else None)
    if split is not None and not in_memory and not getattr(splits, split, ()):
        # No rows were held out under this name: take the source's own split.
        sets = [f"data.split={split}", "data.validation=0", "data.test=0", "data.limit=null"]
        rows = read_splits(recipe.changed(sets)).train
        splits = replace(splits, validation=rows) if split == "validation" else replace(splits, test=rows)
    return task_of(recipe, lm, splits), lm


def _laid_out(prompt: Prompt, given: Mapping[str, Any], task: Task) -> Template:
    """The template of a task under a prompt: the prompt's own, unless one is given."""
    template = given.get("template")
    source = (str(task.template) if template == CHAT else template) or prompt.template or str(task.template)
    target = given.get("target") or prompt.target or task.template.target
    return Template.parse(source, target=target, length=prompt.length)


def recipe_for(prompt: Prompt | None, given: Mapping[str, Any], base: str | Path | None = None) -> Recipe:
    """A recipe that describes the data and the base to judge with.

    A prompt brings its kind, length, template, target, row limit, ending and base; settings in `given` (of the data
    section) override these. Without a source the data is what the prompt was learned on.
    """
    if "source" in given:  # all of these rows are for judging, unless the source parts them itself
        given = {"validation": OWN, **given}
    if prompt is None:
        alone: dict[str, Any] = {"data": dict(given), **_set(base=None if base is None else str(base))}
        return Recipe(**alone)
    recorded: Any = prompt.notes.get("recipe")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    metrics: Any = prompt.notes.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    data: Any = recorded.get("data")
    data = {
        name: value
        for name, value in (data if isinstance(data, Mapping) else {}).items()
        if name in Data.model_fields
    }
    if "source" in given:  # other rows: only what the prompt demands of any row
        data = {name: data[name] for name in DEMANDED if name in data}
    elif not data.get("source"):
        raise RecipeError(f"{prompt.name} does not say what data it was learned on. Name some with --data.")
    elif data.get("validation") is None and metrics.get("judged_on") == "training":
        data["validation"] = OWN  # it was learned from all rows: none of them can count as held out
    data |= {"template": prompt.template or None, "target": prompt.target, **given}
    tree: dict[str, Any] = {"data": data, "prompt": {"kind": prompt.kind, "length": prompt.length}}
    tree |= {name: recorded[name] for name in ("dtype", "device") if name in recorded}
    if base is not None:
        tree["base"] = str(base)
    else:
        tree |= {"base": prompt.base.name or "builtin", "base_revision": prompt.base.revision}
    return Recipe(**tree)


def with_recorded_hardware(settings: BaseSettings, *prompts: Prompt) -> BaseSettings:
    """`settings` with the dtype and device that a prompt was learned with, where they are not set."""
    recipe: Any = prompts[0].notes.get("recipe") if prompts else None
    if not isinstance(recipe, Mapping):
        return settings
    recorded = {name: recipe[name] for name in ("dtype", "device") if name in recipe}
    return BaseSettings(
        **{**recorded, **{name: getattr(settings, name) for name in settings.model_fields_set}}
    )


def judged_examples(
    splits: Splits, split: str | None = None, *, learned_from: bool = True
) -> tuple[Sequence[Example], str]:
    """The rows to judge on, and the name of their split: `split`, else test, validation or train, the first that has rows.

    Without `learned_from`, training rows are refused: they would not measure generalisation.
    """
    if split is not None:
        rows = getattr(splits, split, ()) if split in SPLITS else splits.test
        if not rows:
            raise DataError(
                f"split: the data has no {split} rows. Choose another split, or hold some out with data.{split}."
            )
        return rows, split
    for name in SPLITS if learned_from else SPLITS[:-1]:
        rows = getattr(splits, name)
        if rows:
            return rows, name
    raise DataError(
        "The data has neither test nor validation rows, and training rows would not measure generalisation. "
        "Hold some out with data.test (--test), such as 0.2."
    )


def first_rows(
    rows: Sequence[Example], count: int | None, target: str | None
) -> tuple[Sequence[Example], list[str]]:
    """The first `count` rows, and a note where these are not all and come sorted by label."""
    if count is None or count >= len(rows):
        return rows, []
    note = sorted_note(rows[:count], target, "judge_rows")
    return rows[:count], [] if note is None else [note]


def _positions(task: Task, lm: FrozenLM, prompt: CompiledPrompt, example: Example) -> int:
    """The positions of a row: the prompt, its input and its wanted answer."""
    row = prompt.example(example)
    return len(prompt.laid_out(to_learn(prompt.layout(lm, end=task.end), row)))


def compiled_for(lm: FrozenLM, prompt: Prompt | None, text: str | None, task: Task) -> CompiledPrompt:
    """The judged prompt, text or base in the form that generation and scoring take."""
    front = None if text is None else task.behind(text)
    return compiled_in(lm, prompt, front, task.template, special_tokens=task.special_tokens)


def described(lm: FrozenLM) -> dict[str, Any]:
    """The base as facts for a record."""
    return {
        "name": lm.name,
        "revision": lm.revision,
        "sha256": lm.fingerprint.sha256,
        "parameters": lm.num_parameters,
        "layers": lm.num_layers,
        "width": lm.width,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def identity(prompt: Prompt | None, text: str | None) -> str | None:
    """A prompt's identity: the digest of its tensors, or the text."""
    if prompt is None:
        return text
    digest = hashlib.sha256()
    for name, tensor in sorted(prompt.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
