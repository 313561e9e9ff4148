"""Generation: texts continued under any mix of prompts, every row as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.errors import DataError
from softprompt.inference.compiled import CompiledPrompt, Promptable, compile_prompt
from softprompt.inference.request import GREEDY, FinishReason, Request, request
from softprompt.inference.running_batch import Running
from softprompt.inference.settings import DecodeSettings as DecodeSettings
from softprompt.progress.bar import Advance, progress_bar


@dataclass(frozen=True, repr=False)
class Generation:
    """One continuation.

    `prompt` is the prompt's name (None: the base alone), `input` what was given, as one text, `tokens` the number of
    new tokens with an end token among them. `log_probability` sums the chosen tokens' in nats; None where it was not
    asked for.
    """

    prompt: str | None
    input: str
    text: str
    tokens: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    sample: int = 0
    log_probability: float | None = None

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"Generation({text!r}, {self.tokens} tokens, {self.finish_reason}, prompt {self.prompt!r})"

    def to_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "token_ids": list(self.token_ids)}


def generate(
    lm: FrozenLM,
    inputs: str | Example | Iterable[str | Example],
    prompts: Promptable | Sequence[Promptable] = None,
    settings: DecodeSettings | Sequence[DecodeSettings] = GREEDY,
    *,
    batch_rows: int = 16,
    memory_bytes: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
    progress: bool | Advance | None = None,
) -> list[Generation]:
    """Continues every input, in the order of `inputs`, `settings.n` texts each. Always a list; a str is one input.

    `prompts` and `settings` are one for all inputs or one for each. At most `batch_rows` rows run side by side, in at
    most `memory_bytes` of key/value state. `on_text` is called with the input's number and each new piece of its
    text; it takes n = 1. Progress over several texts is shown in terminals and notebooks, unless they are streamed or
    `progress` is False; a function is called instead with the number of texts done and of all.

    Raises DataError for an input that has no room to continue, WrongBase and PromptError as compiling does.
    """
    inputs = listed(inputs)
    chosen = compiled_each(lm, prompts, len(inputs))
    how = one_each(settings, len(inputs), "settings")
    requests: list[list[Request]] = []
    for number, (given, prompt, decode) in enumerate(zip(inputs, chosen, how, strict=True)):
        if on_text is not None and decode.drawn > 1:
            raise DataError(f"Streaming takes one text an input; found n {decode.drawn}. Set n to 1.")
        on_piece = None if on_text is None else _for_input(on_text, number)
        first = request(lm, prompt, given, decode, on_text=on_piece)
        more = [
            request(lm, prompt, given, decode, sample=sample, row=first.row)
            for sample in range(1, decode.drawn)
        ]
        requests.append([first, *more])
    rows = [request for group in requests for request in group]
    if progress is None and (on_text is not None or len(rows) == 1):
        progress = False
    with progress_bar(progress, "generating") as advance:
        run(Running(lm, max_rows=batch_rows, memory_bytes=memory_bytes), rows, advance)
    return [
        generation
        for given, prompt, group in zip(inputs, chosen, requests, strict=True)
        for generation in _best(given, prompt.name, group)
    ]


def run(running: Running, requests: Sequence[Request], advance: Advance = lambda done, total: None) -> None:
    """Runs all requests through a running batch: long rows first, new ones once a quarter of the rows is free.

    `advance` is called with the number of requests done and of all."""
    waiting = sorted(requests, key=lambda request: request.total)
    while waiting or len(running):
        free = running.max_rows - len(running)
        if waiting and (len(running) == 0 or free * 4 >= running.max_rows):
            joining: list[Request] = []
            while waiting and len(joining) < free and running.fits([*joining, waiting[-1]]):
                joining.append(waiting.pop())
            running.admit(joining)
        running.step()
        advance(len(requests) - len(waiting) - len(running), len(requests))


def _best(given: str | Example, name: str | None, group: Sequence[Request]) -> list[Generation]:
    settings = group[0].settings
    if settings.drawn > settings.n:
        group = sorted(group, key=_mean_nll)[: settings.n]
    return [generation(name, given, request) for request in group]


def _mean_nll(request: Request) -> float:
    """Mean over tokens, not the sum: the likeliest text as a whole would be the shortest one."""
    return -sum(request.log_probabilities) / len(request.log_probabilities)


def generation(name: str | None, given: str | Example, request: Request) -> Generation:
    """Makes the result of a finished request."""
    assert request.finish_reason is not None
    rated = sum(request.log_probabilities) if request.settings.rated else None
    return Generation(
        name,
        shown(given),
        request.text,
        len(request.token_ids),
        request.finish_reason,
        tuple(request.token_ids),
        request.sample,
        rated,
    )


def shown(given: str | Example) -> str:
    """Shows an input as one text: its only field, its last message, or its fields by name."""
    if isinstance(given, str):
        return given
    if given.messages:
        return given.messages[-1].content
    fields = given.fields
    return (
        next(iter(fields.values())) if len(fields) == 1 else "\n".join(f"{k}: {v}" for k, v in fields.items())
    )


def listed(inputs: str | Example | Iterable[str | Example]) -> list[str | Example]:
    """Gives inputs as a list; a single text or row is a list of one."""
    return [inputs] if isinstance(inputs, str | Example) else list(inputs)


def compiled_each(
    lm: FrozenLM, prompts: Promptable | Sequence[Promptable], count: int
) -> list[CompiledPrompt]:
    """A compiled prompt for each of `count` inputs; every prompt is read once."""
    chosen = one_each(prompts, count, "prompts")
    compiled: dict[str | int, CompiledPrompt] = {}
    keys = [str(prompt) if isinstance(prompt, str | Path) else id(prompt) for prompt in chosen]
    for key, prompt in zip(keys, chosen, strict=True):
        if key not in compiled:
            compiled[key] = compile_prompt(lm, prompt)
    return [compiled[key] for key in keys]


def one_each(given: Any, count: int, what: str) -> list[Any]:
    """Gives a list of `count` values: the list that was given, or the same value for all inputs."""
    if isinstance(given, list | tuple):
        if len(given) != count:
            raise DataError(
                f"{what}: found {len(given)} for {count} inputs. Give one for all, or one for each."
            )
        return list(given)
    return [given] * count


def _for_input(on_text: Callable[[int, str], None], number: int) -> Callable[[str], None]:
    return lambda piece: on_text(number, piece)
