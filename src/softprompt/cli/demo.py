"""`softprompt demo`: the whole path, offline, on the bundled base and data, with everything it rests on shown."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt.cli import asked
from softprompt.cli.generate import answers, show_side_by_side
from softprompt.cli.preview import show_preview
from softprompt.cli.screen import emit, fact, figure, heading, screen, to_copy
from softprompt.cli.tune import learn, show_base
from softprompt.progress.console import Screen
from softprompt.tuning.recipe import Data, PromptSettings, Recipe, TuneSettings

if TYPE_CHECKING:
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.data.example import Example
    from softprompt.prompt.soft_prompt import Prompt
    from softprompt.tuning.result import TuneResult

INPUTS = (
    "I want you to act as a gardener.",
    "I want you to act as a logistician.",
    "I want you to act as a history teacher.",
)
SECOND_TASK_UNTIL_SECONDS = (
    60  # on a machine that is busy with other work the demo still ends within two minutes
)


EXAMPLE = "softprompt demo --out runs/demo"


def command(
    out: Annotated[Path, typer.Option(help="The folder that the two prompts are written to.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the start and of the rows' order.")] = 0,
    as_json: asked.AsJson = False,
) -> None:
    """The whole path in under two minutes, offline: load, tune, compare before and after."""
    began = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the hub, and a demo must not hang on a network
    console = screen(as_json=as_json)
    record = show(console, out, seed, began) | {"seconds": time.perf_counter() - began}
    console.print()
    console.print(f"done in {record['seconds']:.0f} s", style="bold")
    if as_json:
        emit(record)


def show(console: Screen, out: Path, seed: int, began: float) -> dict[str, Any]:
    """Runs both tasks on one frozen base; returns the measurements as plain data."""
    from softprompt.base.frozen_lm import FrozenLM
    from softprompt.inference.sampling import DecodeSettings

    lm = FrozenLM.load("builtin")
    sha256_before = lm.weights_sha256()
    show_base(console, lm)
    fact(console, "sha256", f"{sha256_before} (every byte of every weight, before)")

    heading(console, "what the base answers by itself")
    decoding = DecodeSettings(max_new_tokens=24, repetition_penalty=1.3)
    show_side_by_side(console, answers(lm, INPUTS, [], decoding, with_base=True))

    tuned = first_task(console, lm, roles_recipe(out, seed))
    heading(console, "the same inputs, before and after")
    show_side_by_side(console, answers(lm, INPUTS, [tuned.prompt], decoding, with_base=True))
    before, after, rows = held_out(lm, tuned.prompt)
    fact(
        console,
        "held-out loss",
        f"{figure(before)} before, {figure(after)} after: nats per token, {rows} test rows",
    )

    sorting: dict[str, Any] | None = None
    if time.perf_counter() - began < SECOND_TASK_UNTIL_SECONDS:
        sorting = second_task(console, lm, messages_recipe(out, seed))
    else:
        heading(console, "task 2 is left out, since this machine is slow or busy")

    sha256_after = lm.weights_sha256()
    path, bytes = tuned.path, tuned.prompt_bytes
    heading(console, "the model is unchanged")
    fact(console, "sha256 before", sha256_before)
    same = "identical" if sha256_after == sha256_before else "DIFFERENT"
    fact(console, "sha256 after", f"{sha256_after} ({same})")
    fact(console, "prompt", f"{path} ({bytes:,} bytes of vectors, for {lm.num_parameters:,} frozen weights)")
    if sorting is not None:
        fact(console, "prompt", f"{sorting['path']} ({sorting['bytes']:,} bytes of vectors)")
    next_commands(console, path, sorting["path"] if sorting is not None else None)
    return {
        "base": asked.describe_base(lm),
        "base_sha256_before": sha256_before,
        "base_sha256_after": sha256_after,
        "heldout_nll_before": before,
        "heldout_nll_after": after,
        "heldout_rows": rows,
        "prompt_path": path,
        "prompt_bytes": bytes,
        "tune": tuned.to_record(),
        "messages": sorting,
    }


def roles_recipe(out: Path, seed: int) -> Recipe:
    """All text of role prompts is learned, as in the tutorial."""
    return Recipe(
        out=str(out / "roles"),
        data=Data(source="builtin:roles", column="prompt", template="{soft:20}{text}"),
        prompt=PromptSettings(init="vocabulary"),
        tune=TuneSettings(epochs=4, batch_size=8, seed=seed),
    )


def messages_recipe(out: Path, seed: int) -> Recipe:
    """The label alone is learned."""
    return Recipe(
        out=str(out / "messages"),
        data=Data(
            source="builtin:messages",
            template="{text}\n{soft:10} {label}",  # the slot is right before the answer
            target="label",
        ),
        prompt=PromptSettings(init="labels"),
        tune=TuneSettings(epochs=8, batch_size=8, seed=seed),
    )


def first_task(console: Screen, lm: FrozenLM, recipe: Recipe) -> TuneResult:
    """Shows what will be trained, then trains it."""
    heading(console, "task 1: role prompts. What will be trained")
    preview(console, lm, recipe, rows=1)
    heading(console, "task 1: learning")
    return learn(console, recipe, lm)


def second_task(console: Screen, lm: FrozenLM, recipe: Recipe) -> dict[str, Any]:
    """Sorting messages: accuracy on the test rows with the base alone and with the prompt."""
    from softprompt.tuning.task import read_splits

    heading(console, "task 2: sorting messages, on the same base. What will be trained")
    preview(console, lm, recipe, rows=1)
    heading(console, "task 2: learning")
    tuned = learn(console, recipe, lm)
    test = read_splits(recipe).test
    before, after = accuracy(lm, None, tuned.prompt, test), accuracy(lm, tuned.prompt, tuned.prompt, test)
    fact(
        console,
        "test rows right",
        f"{before:.3f} before, {after:.3f} after (n={len(test)}, label generated freely)",
    )
    return {
        "path": tuned.path,
        "bytes": tuned.prompt_bytes,
        "accuracy_before": before,
        "accuracy_after": after,
        "rows": len(test),
    }


def preview(console: Screen, lm: FrozenLM, recipe: Recipe, rows: int) -> None:
    from softprompt.tuning.task import task_of

    task = task_of(recipe, lm)
    show_preview(console, task.preview(task.splits.train, show=rows))


def held_out(lm: FrozenLM, prompt: Prompt) -> tuple[float, float, int]:
    """Loss of the base alone and with the prompt, on the same tokens of the test rows, which chose nothing."""
    from softprompt.data.batch import encode_all
    from softprompt.data.layout import Layout, to_judge
    from softprompt.data.source import load_splits
    from softprompt.data.template import Template
    from softprompt.loss.fast import FastLoss
    from softprompt.loss.mean import mean_nll

    test = load_splits("builtin:roles", column="prompt").test
    template = Template.parse(prompt.template)
    base, tuned = (
        encode_all(Layout.of(template, lm.tokenizer, slots=slots), test, to_judge).encoded
        for slots in (False, True)
    )
    loss = FastLoss(lm)
    return mean_nll(loss, base), mean_nll(loss, tuned, prompt.plain), len(test)


def accuracy(lm: FrozenLM, prompt: Prompt | None, layout: Prompt, test: Sequence[Example]) -> float:
    """Share of test rows whose label is generated exactly, out of the whole vocabulary."""
    from softprompt.data.template import Template
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.generate import generate
    from softprompt.inference.sampling import DecodeSettings

    template = Template.parse(layout.template, target=layout.target)
    compiled = (
        compile_prompt(lm, prompt) if prompt is not None else compile_prompt(lm, None, template=template)
    )
    written = generate(lm, test, compiled, DecodeSettings(max_new_tokens=4), batch_rows=32)
    right = sum(
        answer.text.strip() == example.fields[str(layout.target)]
        for answer, example in zip(written, test, strict=True)
    )
    return right / len(test)


def next_commands(console: Screen, roles: str, messages: str | None) -> None:
    heading(console, "next commands to try")
    sort = [f'softprompt generate --prompt {shlex.quote(messages)} "Where is my parcel?"'] if messages else []
    for command in (
        f'softprompt generate --prompt {shlex.quote(roles)} --side-by-side "I want you to act as a baker."',
        *sort,
        f"softprompt inspect {shlex.quote(roles)}",
        "softprompt tune --data YOUR.csv --column YOUR_COLUMN --out runs/mine",
        "softprompt recipe > mine.yaml",
    ):
        to_copy(console, command)
