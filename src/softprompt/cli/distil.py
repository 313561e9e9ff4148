"""`softprompt distil`: a long instruction, few-shot block or document becomes a short prompt, without labels."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt.cli import asked
from softprompt.cli.flags import takes
from softprompt.cli.screen import emit, fact, figure, heading, line, screen, size, to_copy
from softprompt.progress.console import Screen
from softprompt.progress.runs import ShowProgress
from softprompt.tuning.distil_settings import DistilSettings

if TYPE_CHECKING:
    from softprompt.tuning.distil import DistilResult

EXAMPLE = "softprompt distil --base BASE --context handbook.md --data questions.csv --column text --out runs/handbook"


@takes(DistilSettings)
def command(
    settings: DistilSettings,
    *,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a distillation that was killed, from its last checkpoint."),
    ] = False,
    as_json: asked.AsJson = False,
) -> None:
    """Make a short prompt of a long text: the base under the prompt learns to answer as it does under the text."""
    from softprompt.tuning.distil import distil

    console = screen(as_json=as_json)
    with ShowProgress(console) as progress:
        try:
            result = distil(settings, on_event=progress, progress=False, resume=resume)
        except KeyboardInterrupt:
            line(console, asked.RESUME)
            raise
    show_result(console, result)
    if as_json:
        emit(result.to_record())


def show_result(console: Screen, result: DistilResult) -> None:
    """Prints how near the prompt comes to the long text, what it saves and costs, and what to do next."""
    heading(console, "result")
    fact(
        console,
        "length",
        f"{result.context_positions} positions -> {result.virtual_tokens} virtual tokens: {result.times_shorter:.1f} times shorter",
    )
    fact(
        console,
        "KL",
        f"{figure(result.kl)} nats a token from the long text; {figure(result.kl_start)} before learning, "
        f"{figure(result.kl_base)} without any prompt",
    )
    fact(
        console,
        "same answer",
        f"{result.agreement:.0%} of {result.judged} held-out questions; {result.agreement_base:.0%} without any prompt",
    )
    if not math.isnan(result.agreement_sure):
        fact(
            console,
            "where it is sure",
            f"{result.agreement_sure:.0%} (n={round(result.sure * result.judged)}, those that the long text answers without doubt)",
        )
    if not math.isnan(result.gold_prompt):
        fact(
            console,
            "right answers",
            f"{result.gold_prompt:.3f} with the prompt, {result.gold_context:.3f} with the long text, "
            f"{result.gold_base:.3f} without either (n={result.held_out})",
        )
    fact(console, "saved a request", f"{result.milliseconds_saved:,.0f} ms of reading")
    fact(
        console,
        "work",
        f"{result.seconds:.0f} s: {result.seconds_teacher:.0f} for the teacher's answers, "
        f"{result.seconds_start:.0f} for the start, the rest for {result.steps} steps",
    )
    fact(console, "peak memory", size(result.peak_memory_bytes))
    fact(console, "prompt", f"{result.path} ({size(result.prompt_bytes)})")
    heading(console, "next")
    base = "" if result.base == "builtin" else f" --base {shlex.quote(result.base)}"
    path = shlex.quote(result.path)
    to_copy(console, f'softprompt generate{base} --prompt {path} "..."')
    if result.sure < 0.5 and result.agreement < 0.9:
        line(
            console,
            "The long text leaves the base undecided in most answers: two tokens are about level, so small differences "
            "change them. Judge by KL and by where it is sure.",
        )
    if result.kl > 0.1:
        line(
            console, "Still far from the long text: more --virtual-tokens, more questions, or more --epochs."
        )
