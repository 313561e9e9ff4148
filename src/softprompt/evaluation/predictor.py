"""Predictors: answers of the base under no prompt, a text, a soft or a deep prompt, all through one code path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain

from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.encoded import Encoded
from softprompt.data.ending import End, ending_of
from softprompt.data.example import Example
from softprompt.data.layout import to_judge
from softprompt.data.template import Field, Template, Text
from softprompt.data.tokenizer import special_tokens_of, surviving
from softprompt.errors import RecipeError
from softprompt.evaluation.evaluate import Answer, Predict, wanted_text, written_out
from softprompt.evaluation.metric import Metric
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.inference.generate import DecodeSettings, generate
from softprompt.inference.score import Scored, score

LABELS_KEPT = 50_000  # texts whose tokens are remembered: labels come again and again
# Inputs without content (Zhao et al. 2021): the label probabilities after them are the prompt's bias.
CONTENT_FREE = ("N/A", "...", "none")


def settled(
    settings: JudgeSettings,
    lm: FrozenLM,
    layout: Template,
    examples: Sequence[Example],
    labelled: Sequence[Example] = (),
) -> JudgeSettings:
    """Fills in the settings that follow from the rows.

    `max_new_tokens` allows the longest wanted answer and a quarter more. Answers stop at the end of a line unless a
    wanted answer has several lines. Labels to rank are those of `labelled` and `examples`.
    """
    written_after = ending_of(layout, lm.tokenizer).text
    tokens = lru_cache(LABELS_KEPT)(lambda text: len(lm.tokenizer(text + written_after)["input_ids"]))
    longest, several_lines = 0, False
    for example in examples:
        wanted = wanted_text(layout, example)
        longest = max(longest, tokens(wanted))
        several_lines = several_lines or "\n" in wanted.strip()
    longest = longest if examples else 1
    stop = [] if several_lines else ["\n"]
    return settings.model_copy(
        update={
            "labels": settings.labels
            or (list(labels_of(layout, chain(labelled, examples))) if settings.answers == "rank" else []),
            "max_new_tokens": settings.max_new_tokens or math.ceil(longest * 1.25) + 2,
            "stop": stop if settings.stop is None else settings.stop,
        }
    )


def predictor(
    lm: FrozenLM,
    prompt: CompiledPrompt,
    layout: Template,
    metrics: Sequence[Metric],
    settings: JudgeSettings,
    *,
    end: End = "auto",
) -> Predict:
    """A function from examples to the answers and losses that `metrics` need, from `lm` under `prompt`.

    `layout` is the task's template with its slots and target; the wanted text is scored on the same tokens under
    every prompt. Raises RecipeError for metrics that compare answers where the template has no target.
    """
    demand_answers(metrics, layout)
    needs = {metric.needs for metric in metrics}
    labels, batch_rows = settings.labels, settings.batch_rows
    bias = _bias(lm, prompt, layout, labels, end, batch_rows) if labels and settings.calibrate else {}
    learned_form = as_learned(lm, special_tokens=prompt.special_tokens)

    def predict(examples: Sequence[Example]) -> list[Answer]:
        answers = [Answer() for _ in examples]
        if "loss" in needs:
            answers = _losses(lm, prompt, layout, examples, end, batch_rows)
        if "answer" not in needs:
            return answers
        if labels:
            ranked = _label_scores(lm, prompt, labels, examples, end, batch_rows)
            return [
                replace(answer, text=learned_form(_likeliest(scores, bias)), scores=scores)
                for answer, scores in zip(answers, ranked, strict=True)
            ]
        decode = DecodeSettings(
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop or (),
            temperature=settings.temperature,
            seed=settings.seed,
        )
        generations = generate(lm, list(examples), prompt, decode, batch_rows=batch_rows, progress=False)
        return [
            replace(
                answer,
                text=generation.text,
                new_tokens=generation.tokens,
                finish_reason=generation.finish_reason,
            )
            for answer, generation in zip(answers, generations, strict=True)
        ]

    return predict


def demand_answers(metrics: Sequence[Metric], layout: Template) -> None:
    """Raises RecipeError for metrics that compare answers where the template has no target."""
    names = [metric.name for metric in metrics if metric.needs == "answer"]
    if names and layout.target is None and not layout.chat:
        raise RecipeError(
            f"metric {', '.join(names)}: compares answers, but the template has no target. Set data.target, or use nll, "
            "perplexity, bits_per_byte."
        )


def as_learned(lm: FrozenLM, *, special_tokens: bool = False) -> Callable[[str], str]:
    """The form in which the base's tokenizer can write a text: the text encoded and decoded again.

    A tokenizer may lowercase, change width or drop characters, so that no answer could equal the original."""
    special = special_tokens_of(lm.tokenizer)
    return lru_cache(LABELS_KEPT)(
        lambda text: surviving(lm.tokenizer, text, special, special_tokens=special_tokens)
    )


def text_prompt(
    lm: FrozenLM, layout: Template, text: str, name: str = "text", *, special_tokens: bool = False
) -> CompiledPrompt:
    """A text in front of the task's template, its soft slots left out."""
    return compile_prompt(lm, with_text(layout, text), name=name, special_tokens=special_tokens)


def with_text(layout: Template, text: str) -> Template:
    """`layout` without soft slots, behind `text`. The text stays a piece of its own."""
    return Template((Text(text), *layout.without_slots().pieces), layout.target)


def _losses(
    lm: FrozenLM,
    prompt: CompiledPrompt,
    layout: Template,
    examples: Sequence[Example],
    end: End,
    batch_rows: int,
) -> list[Answer]:
    """The loss of every wanted text, without its first token where the base alone has nothing to predict it from."""
    alone = [_alone(lm, layout, example, prompt, end) for example in examples]
    scored = _scored(lm, prompt, layout, examples, alone, end, batch_rows)
    answers = []
    for encoded, scores in zip(alone, scored, strict=True):
        values = scores.token_log_probabilities[-encoded.trained_tokens :]
        answers.append(Answer(nll=-math.fsum(values), tokens=len(values), text_bytes=encoded.text_bytes))
    return answers


def _scored(
    lm: FrozenLM,
    prompt: CompiledPrompt,
    layout: Template,
    examples: Sequence[Example],
    alone: Sequence[Encoded],
    end: End,
    batch_rows: int,
) -> list[Scored]:
    if prompt.kind != "text" or layout.target is not None or layout.chat:
        return score(lm, list(examples), None, prompt, end=end, batch_rows=batch_rows, progress=False)
    # Without a target all of the text is scored, except the engineered text in front of it.
    front = Template((*prompt.template.pieces[:1], Field("all")), "all")
    return score(
        lm,
        [replace(example, fields={"all": written_out(layout, example)}) for example in examples],
        None,
        compile_prompt(lm, front, name=prompt.name, special_tokens=prompt.special_tokens),
        end="always" if alone[0].end else "never",
        batch_rows=batch_rows,
        progress=False,
    )


def _alone(lm: FrozenLM, layout: Template, example: Example, prompt: CompiledPrompt, end: End) -> Encoded:
    return to_judge(replace(prompt.layout(lm, layout, end=end), slots=False), example)


def _label_scores(
    lm: FrozenLM,
    prompt: CompiledPrompt,
    labels: Sequence[str],
    examples: Sequence[Example],
    end: End,
    batch_rows: int,
) -> list[dict[str, float]]:
    """Log-probability of every label as the whole answer, its end token with it where the template learns one."""
    scored = score(
        lm,
        [example for example in examples for _ in labels],
        [label for _ in examples for label in labels],
        prompt,
        end=end,
        batch_rows=batch_rows,
        progress=False,
    )
    return [
        {label: scored[i * len(labels) + j].log_probability for j, label in enumerate(labels)}
        for i in range(len(examples))
    ]


def _bias(
    lm: FrozenLM, prompt: CompiledPrompt, layout: Template, labels: Sequence[str], end: End, batch_rows: int
) -> dict[str, float]:
    """Log of each label's mean probability after inputs without content."""
    empty = [Example(dict.fromkeys(layout.inputs, text)) for text in CONTENT_FREE]
    scores = _label_scores(lm, prompt, labels, empty, end, batch_rows)
    return {label: _log_mean_exp([row[label] for row in scores]) for label in labels}


def _log_mean_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values) / len(values))


def _likeliest(scores: dict[str, float], bias: dict[str, float]) -> str:
    return max(scores, key=lambda label: scores[label] - bias.get(label, 0.0))


def labels_of(layout: Template, examples: Iterable[Example]) -> tuple[str, ...]:
    """The distinct wanted answers, sorted. Raises RecipeError without a target."""
    if layout.target is None or Field(layout.target) not in layout.pieces:
        raise RecipeError("labels can only be ranked where the template has a target. Set data.target.")
    return tuple(sorted({wanted_text(layout, example) for example in examples}))
