"""Forgetting: how well general text is still predicted once a task has been learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.example import Example
from softprompt.data.template import Soft, Template
from softprompt.errors import DataError
from softprompt.evaluation.evaluate import judge_rows
from softprompt.evaluation.metric import METRICS, Estimate
from softprompt.evaluation.predictor import predictor, text_prompt
from softprompt.evaluation.settings import JudgeSettings
from softprompt.inference.compiled import CompiledPrompt, compile_prompt
from softprompt.prompt.soft_prompt import Prompt
from softprompt.store.plain_file import read_text

BUNDLED = Path(__file__).parent / "general_text.txt"
PASSAGES = 24
PASSAGE_CHARACTERS = 600
PLAIN = Template.parse("{text}")


def passages(path: Path | None = None) -> list[Example]:
    """General text in pieces: paragraphs of the bundled text or of a file, long ones cut, at most 24 of them."""
    path = path or BUNDLED
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the general text cannot be read ({error}). Give a UTF-8 text file."
        ) from error
    passages = [passage.strip() for passage in text.replace("\r\n", "\n").split("\n\n")]
    if len(passages) < PASSAGES:  # no blank lines between paragraphs: lines will do
        passages = [line.strip() for line in text.splitlines()]
    passages = [passage[:PASSAGE_CHARACTERS] for passage in passages if len(passage.split()) >= 5]
    if not passages:
        raise DataError(f"{path}: no paragraph of at least five words is in it. Give a file of running text.")
    spread = max(1, len(passages) // PASSAGES)
    return [Example({"text": passage}, row=row) for row, passage in enumerate(passages[::spread][:PASSAGES])]


def fitted(lm: FrozenLM, general: list[Example]) -> list[Example]:
    """The passages, cut where they would fill more than half of the base's context: a prompt comes in front of them."""
    most = longest_text(lm)
    if most is None:
        return general
    cut = []
    for example in general:
        words = example.fields["text"].split(" ")
        while len(words) > 1 and len(lm.tokenizer(" ".join(words), verbose=False)["input_ids"]) > most // 2:
            words = words[: len(words) * 3 // 4]
        cut.append(replace(example, fields={"text": " ".join(words)}))
    return cut


def general_loss(lm: FrozenLM, prompt: CompiledPrompt, general: list[Example]) -> Estimate:
    """Nats per token of general text that the model reads under `prompt`."""
    metrics = [METRICS["nll"]]
    predict = predictor(lm, prompt, PLAIN, metrics, JudgeSettings(), end="never")
    return judge_rows(predict, general, metrics, PLAIN).estimates["nll"]


def before_general_text(lm: FrozenLM, prompt: Prompt | str | None) -> CompiledPrompt:
    """The prompt in front of general text, in place of its task's template."""
    if prompt is None:
        return compile_prompt(lm, None, template=PLAIN)
    if isinstance(prompt, str):
        return text_prompt(lm, PLAIN, prompt)
    # All vectors in front, wherever the task's template has them; nothing of the task's own text.
    return compile_prompt(lm, prompt, template=Template((Soft(prompt.length), *PLAIN.pieces)))
