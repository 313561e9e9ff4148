"""`softprompt evaluate`: figures with their errors for the base, a text or a learned prompt; every row kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from softprompt.cli import asked
from softprompt.cli.screen import emit, fact, heading, screen
from softprompt.errors import RecipeError

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.data.example import Example, Splits
    from softprompt.data.template import Template
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.inference.compiled import CompiledPrompt
    from softprompt.prompt.soft_prompt import Prompt
    from softprompt.tuning.recipe import Recipe


EXAMPLE = "softprompt evaluate --prompt runs/mine --out runs/judged"


def command(
    recipe_file: Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option(help="The frozen model.", show_default="the prompt's own")
    ] = None,
    prompt_folder: Annotated[
        Path | None, typer.Option("--prompt", help="The learned prompt's folder.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="An engineered prompt instead: a text in front of every input.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="What to judge on, as in `tune`.", show_default="the prompt's own data")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The text column, where all text is scored.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="The split to judge on.", show_default="test, else validation, else train"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge on the first N rows alone.")] = None,
    template: Annotated[
        str | None, typer.Option(help="How a row becomes text.", show_default="the prompt's own")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The field that is wanted.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the recipe.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="accuracy, macro_f1, exact_match, numeric_match, token_f1, rouge_l, bleu, chrf, nll, perplexity, "
            "bits_per_byte, byte_perplexity; may be repeated.",
            show_default="what suits the data",
        ),
    ] = None,
    answers: Annotated[
        Literal["generate", "rank"],
        typer.Option(help="generate: over the whole vocabulary. rank: the likeliest of the labels."),
    ] = "generate",
    label: Annotated[
        list[str] | None,
        typer.Option(help="A label to rank; may be repeated.", show_default="those in the data"),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Divide each label's probability by what it has without input."),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default="from the wanted answers")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; may be repeated.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows side by side.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Keep every row here; run again to go on after an interruption.")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=LIMIT", help="Exit with 100 if a figure is worse.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8, int4.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Measure the base, a text or a learned prompt on held-out rows."""
    from softprompt.evaluation.evaluate import as_record, default_metrics, demand, evaluate, read_gates
    from softprompt.evaluation.metric import metrics_named

    if prompt_folder is not None and text is not None:
        raise RecipeError(
            "--prompt and --text are both given. Judge one at a time; `softprompt compare` takes both."
        )
    if calibrate and answers != "rank":
        raise RecipeError("--calibrate weighs ranked labels. Add --answers rank.")
    gates = read_gates(fail_under or [])

    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.store.artifact import load_prompt
    from softprompt.tuning.task import read_splits, settle_template

    prompt = None if prompt_folder is None else load_prompt(prompt_folder)
    flags = {"--base": base, "--data": data, "--column": column}
    sets = [f"data.{key}={value}" for key, value in (("template", template), ("target", target)) if value]
    recipe = recipe_for(prompt, recipe_file, flags, [*sets, *(overrides or [])])
    splits = read_splits(recipe)
    examples, judged_on = chosen(splits, recipe, split)
    examples = examples[:limit]
    lm = FrozenLM.load(
        recipe.base,
        revision=recipe.base_revision,
        dtype=dtype if dtype != "auto" else recipe.dtype,
        device=device if device != "auto" else recipe.device,
        trust_remote_code=trust_remote_code or recipe.trust_remote_code,
    )
    layout = settle_template(recipe, lm, splits)
    compiled = compiled_for(lm, prompt, text, layout)
    names = list(
        dict.fromkeys(
            [
                *(metric or default_metrics(layout, [*splits.train, *examples])),
                *(one.name for one, _ in gates),
            ]
        )
    )
    metrics = metrics_named(names)
    ranked = _labels(layout, splits, examples, label) if answers == "rank" else None

    from softprompt.evaluation.predictor import Asking, predictor

    asking = Asking(
        labels=ranked,
        calibrated=calibrate,
        max_new_tokens=max_new_tokens,
        stop=None if stop is None else tuple(stop),
        end=recipe.data.end,
    ).settled(lm, layout, examples)
    about = {
        "name": "base" if compiled.name is None else compiled.name,
        "arm": compiled.kind,
        "base": asked.describe_base(lm) | {"sha256": lm.fingerprint.sha256},
        "prompt": _identity(prompt, text),
        "prompt_folder": None if prompt_folder is None else str(prompt_folder),
        "template": str(layout),
        "target": layout.target,
        "data": {"source": splits.source, "revision": splits.revision, "split": judged_on},
        "answers": answers,
        "asking": vars(asking),
        "metrics": names,
    }
    console = screen(as_json=as_json)
    predict = predictor(lm, compiled, layout, metrics, asking, batch_rows=batch_size)
    with _bar(console) as bar:
        task = bar.add_task("judging", total=len(examples))
        found = evaluate(
            predict,
            examples,
            metrics,
            layout,
            out=out,
            about=about,
            on_progress=lambda done, rows: bar.update(task, completed=done),
        )
    show(console, found, f"{about['name']} on {splits.source}, {judged_on}")
    if out is not None:
        fact(console, "rows", out / "rows.jsonl")
    if as_json:
        emit({**as_record(found), **{key: about[key] for key in ("name", "template", "data", "answers")}})
    demand(gates, found.estimates)


def recipe_for(
    prompt: Prompt | None, path: Path | None, flags: dict[str, str | None], overrides: Sequence[str]
) -> Recipe:
    """The recipe of a file and flags; without data named there, the one that the prompt was learned by.

    A prompt brings its template, target and base, unless they are given."""
    from softprompt.tuning.recipe import Recipe

    overrides = list(overrides)
    own: dict[str, Any] = dict(prompt.notes.get("recipe") or {}) if prompt is not None else {}
    if prompt is not None:
        if path is None and flags["--data"] is None:
            if not own:
                raise RecipeError(
                    f"{prompt.name} does not say what data it was learned on. Name some with --data."
                )
            overrides = [*_flat(own), *overrides]
        given = " ".join(overrides)
        if "data.template=" not in given and path is None:
            source = prompt.template or f"{{soft:{prompt.length}}}{{text}}"
            overrides = [f"data.template={source}", *overrides]
            if prompt.target is not None and "data.target=" not in given:
                overrides.insert(0, f"data.target={prompt.target}")
        if flags["--base"] is None and path is None:
            flags = {**flags, "--base": prompt.base.name or "builtin"}
        overrides = [f"prompt.kind={prompt.kind}", *overrides]
    return Recipe.from_flags(flags, overrides, path=path)


def _flat(recipe: dict[str, Any]) -> list[str]:
    """The data settings of a recorded recipe as overrides."""
    import yaml

    settings = {f"data.{key}": value for key, value in dict(recipe.get("data") or {}).items()}
    settings |= {key: recipe[key] for key in ("dtype", "device") if key in recipe}
    flat = []
    for key, value in settings.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            flat += [f"{key}.{inner}={one}" for inner, one in value.items()]
        else:
            text = value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("...\n").strip()
            flat.append(f"{key}={text}")
    return flat


def chosen(splits: Splits, recipe: Recipe, split: str | None) -> tuple[tuple[Example, ...], str]:
    """The rows to judge on: the split that was asked for, else the most independent one there is."""
    if split is not None:
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        if parts.get(split):
            return parts[split], split
        from softprompt.tuning.recipe import Recipe
        from softprompt.tuning.task import read_splits

        tree = recipe.model_dump()
        tree["data"] |= {"split": split, "validation": 0, "test": 0, "limit": None}
        return read_splits(Recipe(**tree)).train, split
    for name, rows in (("test", splits.test), ("validation", splits.validation), ("train", splits.train)):
        if rows:
            return rows, name
    raise RecipeError("The data has no row.")  # load_splits refuses empty data before


def compiled_for(lm: FrozenLM, prompt: Prompt | None, text: str | None, layout: Template) -> CompiledPrompt:
    """What is judged, in the one form that generation and scoring know."""
    from softprompt.evaluation.predictor import text_prompt
    from softprompt.inference.compiled import compile_prompt

    if text is not None:
        return text_prompt(lm, layout, text)
    if prompt is None:
        return compile_prompt(lm, None, template=layout)
    return compile_prompt(lm, prompt, template=layout)


def show(console: Console, found: Evaluation, title: str) -> None:
    """The figures, and the confusion table where it is small enough to read."""
    from softprompt.evaluation.metric import METRICS

    heading(console, title)
    for name, one in found.estimates.items():
        unit = METRICS[name].unit
        fact(console, name.replace("_", " "), f"{one} {unit}".rstrip())
    if found.reused:
        fact(console, "kept", f"{found.reused} rows of a former run were not judged again")
    table = found.confusion
    if table is not None and len(table.labels) <= 12:
        grid = Table("wanted \\ said", *(escape(label) for label in table.labels), "other", box=None)
        for label, row, other in zip(table.labels, table.table, table.other, strict=True):
            grid.add_row(Text(label), *(str(count) if count else "·" for count in (*row, other)))
        console.print(grid)


def _labels(
    layout: Template, splits: Splits, examples: Sequence[Example], given: list[str] | None
) -> tuple[str, ...]:
    from softprompt.evaluation.predictor import labels_of

    return tuple(given) if given else labels_of(layout, [*splits.train, *examples])


def _identity(prompt: Prompt | None, text: str | None) -> str | None:
    """What tells this prompt from any other: its numbers' digest, or the text."""
    if prompt is None:
        return text
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(prompt.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
