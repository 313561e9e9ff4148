"""`softprompt demo`: two tasks on one frozen base, from the base's own answers to the tuned ones, with what was measured."""

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
    from softprompt.evaluation.interval import Estimate
    from softprompt.inference.compiled import CompiledPrompt
    from softprompt.prompt.soft_prompt import Prompt
    from softprompt.tuning.task import Task

INPUTS = (
    "I want you to act as a logistician. ",
    "I want you to act as a gardener. ",
    "I want you to act as a history teacher. ",
)
MESSAGES = ("Where is my parcel?", "I was charged twice for one order.")
INSTRUCTION = "Sort the message into one kind: delivery, payment, return, account, thanks or job.\n"
REAL_WEIGHTS = 50_000_000  # a base of so many weights gets fewer rows and steps, to end in about three minutes on two cores
REAL_TEST_ROWS, REAL_TEST_TEXTS = 48, 16  # that the two prompts are judged by
REAL_CHOOSING_ROWS = 16  # that the base's best wording is chosen on
SECOND_TASK_UNTIL_SECONDS = {False: 60, True: 150}  # on a busy machine the second task is left out


EXAMPLE = "softprompt demo --base bases/smollm2 --out runs/demo"


def command(
    base: Annotated[
        str,
        typer.Option(
            help="The base: `builtin`, or a folder such as bases/smollm2, which `make base` fetches."
        ),
    ] = "builtin",
    out: Annotated[Path, typer.Option(help="The folder that the two prompts are written to.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the start and of the rows' order.")] = 0,
    as_json: asked.AsJson = False,
) -> None:
    """The whole path, offline: load a base, train two prompts, compare before and after."""
    began = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the hub, and a demo must not hang on a network
    console = screen(as_json=as_json)
    record = show(console, base, out, seed, began) | {"seconds": time.perf_counter() - began}
    console.print()
    console.print(f"done in {record['seconds']:.0f} s", style="bold")
    if as_json:
        emit(record)


def show(console: Screen, base: str, out: Path, seed: int, began: float) -> dict[str, Any]:
    """Both tasks on one frozen base; what was measured, as plain data."""
    from softprompt.base.frozen_lm import FrozenLM

    lm = FrozenLM.load(base)
    real = lm.num_parameters >= REAL_WEIGHTS
    sha256_before = lm.weights_sha256()
    show_base(console, lm)
    fact(console, "sha256", f"{sha256_before} (every byte of every weight, before)")

    messages = sort_messages(console, lm, messages_recipe(base, out, seed, real=real), real=real)
    roles: dict[str, Any] | None = None
    if time.perf_counter() - began < SECOND_TASK_UNTIL_SECONDS[real]:
        roles = write_roles(console, lm, roles_recipe(base, out, seed, real=real), real=real)
    else:
        heading(console, "task 2 is left out, since this machine is slow or busy")

    sha256_after = lm.weights_sha256()
    heading(console, "the model is unchanged")
    fact(console, "sha256 before", sha256_before)
    same = "identical" if sha256_after == sha256_before else "DIFFERENT"
    fact(console, "sha256 after", f"{sha256_after} ({same})")
    for task in filter(None, (messages, roles)):
        fact(
            console,
            "prompt",
            f"{task['path']} ({task['bytes']:,} bytes of vectors, for {lm.num_parameters:,} frozen weights)",
        )
    next_commands(console, base, messages["path"], roles["path"] if roles else None)
    return {
        "base": asked.describe_base(lm),
        "base_sha256_before": sha256_before,
        "base_sha256_after": sha256_after,
        "messages": messages,
        "roles": roles,
    }


def messages_recipe(base: str, out: Path, seed: int, *, real: bool) -> Recipe:
    """The label alone is trained, and the slot is right before the answer."""
    if real:
        template = "Message: {text}\nKind:{soft:10} {label}"
        rows: dict[str, Any] = {"limit": 184, "validation": 24}
        tuning = TuneSettings(epochs=2, batch_size=8, valid_every_steps=20, seed=seed)
    else:
        template = "{text}\n{soft:10} {label}"
        rows = {}
        tuning = TuneSettings(epochs=8, batch_size=8, seed=seed)
    return Recipe(
        base=base,
        out=str(out / "messages"),
        data=Data(source="builtin:messages", template=template, target="label", **rows),
        prompt=PromptSettings(init="labels"),
        tune=tuning,
    )


def roles_recipe(base: str, out: Path, seed: int, *, real: bool) -> Recipe:
    """All text of role prompts is trained, as in the tutorial."""
    if real:
        rows: dict[str, Any] = {"limit": 48, "validation": 8}
        tuning = TuneSettings(epochs=2, batch_size=8, valid_every_steps=10, seed=seed)
    else:
        rows = {}
        tuning = TuneSettings(epochs=4, batch_size=8, seed=seed)
    return Recipe(
        base=base,
        out=str(out / "roles"),
        data=Data(source="builtin:roles", column="prompt", template="{soft:20}{text}", **rows),
        prompt=PromptSettings(init="vocabulary"),
        tune=tuning,
    )


def sort_messages(console: Screen, lm: FrozenLM, recipe: Recipe, *, real: bool) -> dict[str, Any]:
    """Sorting messages: accuracy on test rows of the base alone, of the base under its best wording, and of the prompt."""
    from softprompt.comparison.arms import CHOOSING_ROWS, best_wording
    from softprompt.inference.compiled import compile_prompt
    from softprompt.inference.sampling import DecodeSettings
    from softprompt.tuning.task import task_of

    task = task_of(recipe, lm)
    heading(console, "task 1: sorting messages. What will be trained")
    show_preview(console, task.preview(task.splits.train, show=1))
    heading(console, "task 1: learning")
    tuned = learn(console, recipe, lm)

    heading(console, "task 1: the same messages, before and after")
    decoding = DecodeSettings(max_new_tokens=12)
    show_side_by_side(console, answers(lm, MESSAGES, [tuned.prompt], decoding, with_base=True))
    test = task.splits.test[: REAL_TEST_ROWS if real else None]
    worded, _, _ = best_wording(lm, task, rows=REAL_CHOOSING_ROWS if real else CHOOSING_ROWS)
    instructed = compile_prompt(lm, None, template=task.behind(INSTRUCTION))
    tried = {
        "base": (compile_prompt(lm, None, template=task.template), "base, same layout"),
        "best_wording": (worded, f"base, {worded.template}"),
        "instruction": (instructed, "base, instruction"),
        "prompt": (compile_prompt(lm, tuned.prompt), "soft prompt"),
    }
    right = {}
    for name, (compiled, shown) in tried.items():
        right[name] = accuracy(lm, compiled, task, test)
        fact(console, shown.replace("\n", "\\n"), f"{right[name]} of the test messages right")
    return {
        "path": tuned.path,
        "bytes": tuned.prompt_bytes,
        "accuracy": {name: estimate.value for name, estimate in right.items()},
        "wording": str(worded.template),
        "rows": len(test),
        "tune": tuned.to_record(),
    }


def write_roles(console: Screen, lm: FrozenLM, recipe: Recipe, *, real: bool) -> dict[str, Any]:
    """The tutorial: the base's answers, the training, the tuned answers, and the loss on rows that chose nothing."""
    from softprompt.inference.sampling import DecodeSettings
    from softprompt.tuning.task import task_of

    decoding = DecodeSettings(max_new_tokens=32, repetition_penalty=1.3)
    heading(console, "task 2: role prompts, on the same base. What the base answers by itself")
    alone = answers(lm, INPUTS, [], decoding, with_base=True)
    show_side_by_side(console, alone)
    task = task_of(recipe, lm)
    heading(console, "task 2: what will be trained")
    show_preview(console, task.preview(task.splits.train, show=1))
    heading(console, "task 2: learning")
    tuned = learn(console, recipe, lm)
    heading(console, "task 2: the same inputs, before and after")
    behind = answers(lm, INPUTS, [tuned.prompt], decoding, with_base=False)
    show_side_by_side(console, [*alone, *behind])
    test = task.splits.test[: REAL_TEST_TEXTS if real else None]
    before, after = held_out(lm, tuned.prompt, task, test)
    fact(
        console,
        "held-out loss",
        f"{figure(before)} before, {figure(after)} after: nats per token, {len(test)} test rows",
    )
    return {
        "path": tuned.path,
        "bytes": tuned.prompt_bytes,
        "heldout_nll_before": before,
        "heldout_nll_after": after,
        "heldout_rows": len(test),
        "tune": tuned.to_record(),
    }


def held_out(lm: FrozenLM, prompt: Prompt, task: Task, test: Sequence[Example]) -> tuple[float, float]:
    """Loss of the base alone and with the prompt, on the same tokens of the test rows, which chose nothing."""
    from softprompt.data.batch import encode_all
    from softprompt.data.layout import Layout, to_judge
    from softprompt.loss.fast import FastLoss
    from softprompt.loss.mean import mean_nll

    base, tuned = (
        encode_all(Layout.of(task.template, lm.tokenizer, slots=slots), test, to_judge).encoded
        for slots in (False, True)
    )
    loss = FastLoss(lm)
    return mean_nll(loss, base), mean_nll(loss, tuned, prompt.plain)


def accuracy(lm: FrozenLM, compiled: CompiledPrompt, task: Task, test: Sequence[Example]) -> Estimate:
    """Share of test rows whose label is generated, out of the whole vocabulary, as `softprompt evaluate` counts it."""
    from softprompt.evaluation.evaluate import judge_rows
    from softprompt.evaluation.metric import METRICS
    from softprompt.evaluation.predictor import predictor, settled
    from softprompt.evaluation.settings import JudgeSettings

    metrics = [METRICS["accuracy"]]
    answering = settled(JudgeSettings(batch_rows=32), lm, task.template, test)
    predict = predictor(lm, compiled, task.template, metrics, answering, end=task.end)
    return judge_rows(predict, test, metrics, task.template).estimates["accuracy"]


def next_commands(console: Screen, base: str, messages: str, roles: str | None) -> None:
    heading(console, "next commands to try")
    role = '"I want you to act as a baker. "'
    more = [f"softprompt generate --prompt {shlex.quote(roles)} --side-by-side {role}"] if roles else []
    for command in (
        f'softprompt generate --prompt {shlex.quote(messages)} "Where is my parcel?"',
        *more,
        f"softprompt inspect {shlex.quote(messages)}",
        f"softprompt tune --base {shlex.quote(base)} --data YOUR.csv --target YOUR_COLUMN --out runs/mine",
        "softprompt recipe > mine.yaml",
    ):
        to_copy(console, command)
