"""A task: the template, the rows, how long a row may be and how it ends, settled on a base. Everything that learns or
judges takes its rows from here, so that all of them see the same ones."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from softprompt.base.context_length import longest_text
from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.outline import Outline
from softprompt.data.batch import EncodedSet, encode_all
from softprompt.data.default_template import CHAT, ColumnChat, input_columns, is_numbering, lines_template
from softprompt.data.ending import End
from softprompt.data.example import Example, Shape, Splits
from softprompt.data.examples import Examples
from softprompt.data.layout import Layout, Overflow, TooLong, to_judge, to_learn
from softprompt.data.preview import Preview, preview
from softprompt.data.source import load_splits
from softprompt.data.template import Soft, Template, Text, has_slot
from softprompt.data.tokenizer import Tokenizer
from softprompt.errors import DataError, RecipeError
from softprompt.tuning.init_from import natural_length
from softprompt.tuning.recipe import Data, Recipe


@dataclass(frozen=True)
class Task:
    """One task on one base. Make one with `task_of`.

    `max_positions` bounds a row, virtual tokens included; None where nothing does (ALiBi). Longer rows are refused, cut
    or left out, as `on_overflow` says, and the same text is cut whoever reads it."""

    template: Template
    splits: Splits
    tokenizer: Tokenizer
    max_positions: int | None
    on_overflow: Overflow
    end: End
    kind: Literal["soft", "deep"] = "soft"
    special_tokens: bool = False
    base_positions: int | None = None
    """Positions that the base has, whatever `data.max_length` says; None where nothing bounds them."""
    chat: ColumnChat | None = None
    """The exchange that rows make, where the base's chat template writes them (`data.template: chat`)."""

    def behind(self, text: str, shots: Sequence[Example] = ()) -> Template:
        """The layout for the base alone with `text` and solved rows in front of the input: in a chat as the beginning of
        the user's turn and as exchanges before it, else as they are, a row a line."""
        if self.chat is not None:
            return self.chat.layout(self.tokenizer, front=text, shots=shots)
        plain = tuple(piece for piece in self.template.pieces if not isinstance(piece, Soft))
        return Template((Text(text), *plain), self.template.target)

    def check_judged(
        self,
        examples: Sequence[Example],
        split: str,
        positions: Callable[[Example], int] | None = None,
    ) -> tuple[Sequence[Example], int]:
        """The rows that can be judged on this base, each of them whole, and how many were left out.

        Whatever `data.max_length` cuts for learning, rows are judged whole. Call it before anything is learned: a row
        that is empty or that does not fit raises DataError, which names the `split`; with on_overflow drop a row that
        does not fit is left out. `positions` counts those of a row under another prompt than the task's own."""
        layout = replace(self.layout(slots=True), max_length=None)
        limit, kept = self.base_positions, array("q")
        with naming_rows(split):
            for index, example in enumerate(examples):
                need = len(to_judge(layout, example)) if positions is None else positions(example)
                if limit is None or need <= limit:
                    kept.append(index)
                elif self.on_overflow != "drop":
                    raise TooLong(
                        f"{example.where}: {need} positions with the prompt, but the base has {limit}. Judge on shorter "
                        "rows, use a shorter prompt, or leave such rows out (data.on_overflow=drop)."
                    )
        if examples and not kept:
            raise DataError(f"All {len(examples)} {split} rows are longer than the base's {limit} positions.")
        left_out = len(examples) - len(kept)
        if not left_out:
            return examples, 0
        if isinstance(examples, Examples):
            return examples.select(kept), left_out
        return tuple(examples[index] for index in kept), left_out

    def to_learn(self, examples: Sequence[Example], *, slots: bool = True) -> EncodedSet:
        """Rows to learn from; without `slots` as a base without a prompt reads them (LoRA, full fine-tuning)."""
        return encode_all(self.layout(slots=slots and self.kind == "soft"), examples, to_learn)

    def to_judge(self, examples: Sequence[Example], *, prompt: bool) -> EncodedSet:
        """Rows to measure the loss on: the same tokens are scored with a prompt and without."""
        return encode_all(self.layout(slots=prompt and self.kind == "soft"), examples, to_judge)

    def preview(self, examples: Sequence[Example], *, show: int = 3) -> Preview:
        """A preview of learning from these rows: counts over all, the first `show` token by token."""
        return preview(self.layout(slots=True), examples, show=show)

    def layout(self, *, slots: bool) -> Layout:
        """The layout of this task's rows as token ids, with the template's slots or without."""
        return Layout.of(
            self.template,
            self.tokenizer,
            end=self.end,
            special_tokens=self.special_tokens,
            slots=slots,
            max_length=self.max_positions,
            on_overflow=self.on_overflow,
        )


def task_of(recipe: Recipe, base: FrozenLM | Outline, splits: Splits | None = None) -> Task:
    """The task of a recipe on a base, with its weights or without. `splits` replace the recipe's data."""
    splits = splits or read_splits(recipe)
    layout = _layout(recipe, base, splits)
    base_positions = longest_text(base)
    bounds = [bound for bound in (recipe.data.max_length, base_positions) if bound is not None]
    return Task(
        template=_sized(recipe, base, layout),
        splits=replace(splits, notes=tuple(dict.fromkeys((*splits.notes, *layout.notes)))),
        tokenizer=base.tokenizer,
        max_positions=min(bounds, default=None),
        on_overflow=recipe.data.on_overflow,
        end=recipe.data.end,
        kind=recipe.prompt.kind,
        special_tokens=recipe.data.special_tokens,
        base_positions=base_positions,
        chat=layout.chat,
    )


@contextmanager
def naming_rows(split: str) -> Iterator[None]:
    """Names the split in errors about its rows, which are numbered by themselves."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{split.capitalize()} rows: {error}") from error


def read_splits(recipe: Recipe, rows: Any = None) -> Splits:
    """The rows that the recipe names, or `rows` in memory read as it says."""
    data = recipe.data
    return load_splits(
        data.source if rows is None else rows,
        revision=data.revision,
        config=data.config,
        split=data.split,
        column=data.column,
        fields=data.fields,
        messages=data.messages,
        target=data.target,
        references=data.references,
        limit=data.limit,
        validation=data.validation,
        test=data.test,
        seed=data.seed,
        encoding=data.encoding,
        quoting=data.quoting,
        streaming=data.streaming,
    )


def settle_template(recipe: Recipe, lm: FrozenLM | Outline, splits: Splits | None = None) -> Template:
    """The recipe's template with the length of every slot; without one, that which suits its columns or its rows' form.

    Without `splits` the recipe's data are read where the columns decide."""
    if splits is None and recipe.data.target is not None and recipe.data.template in (None, CHAT):
        splits = read_splits(recipe)
    return _sized(recipe, lm, _layout(recipe, lm, splits))


@dataclass(frozen=True)
class _Layout:
    """A template as text, its slots not yet sized; and what to say of how it was chosen."""

    source: str
    target: str | None = None
    chat: ColumnChat | None = None
    notes: tuple[str, ...] = ()


def _layout(recipe: Recipe, base: FrozenLM | Outline, splits: Splits | None) -> _Layout:
    """The template that the recipe names, or the one that suits the rows: of their known form, or of their columns."""
    data = recipe.data
    shape = splits.shape if splits is not None else None
    at_answer = recipe.prompt.place == "answer"

    def slotted(source: str, target: str | None = None) -> str:
        return Template.parse(source, target=target).with_slot(at_answer=at_answer)

    if data.template not in (None, CHAT):
        source = str(data.template)
        if not has_slot(source):
            return _Layout(slotted(source, data.target), data.target)
        if at_answer:
            raise RecipeError(
                f'prompt.place is answer, but data.template is "{source}", whose slot has a place. Leave one of the two out.'
            )
        return _Layout(source, data.target)
    if data.template is None and data.target is None:
        if shape is not None:
            return _Layout(slotted(shape.template, shape.target), shape.target, notes=(shape.note,))
        if data.messages:
            return _Layout(slotted("{messages}"))
        return _Layout(slotted("{text}"), notes=_unread(data, splits))
    target = data.target or (shape.target if shape is not None else None)
    if target is None:  # the rows are chats themselves
        return _Layout(slotted("{messages}"))
    if splits is None:
        raise RecipeError("data.template is not set, and there are no rows to choose it by. Write one.")
    inputs, left_out = _inputs(data, shape, splits, target)
    of_columns = f"{_named(inputs)} {'is' if len(inputs) == 1 else 'are'} read and {target} is learned"
    if left_out:
        of_columns += f" ({_named(left_out)} left out)"
    other = "Set data.template for another one."
    if data.template == CHAT or base.tokenizer.chat_template:
        chat = ColumnChat.of(inputs, target)
        try:
            source = chat.layout(base.tokenizer).with_slot(at_answer=at_answer)
        except DataError as error:
            if data.template == CHAT:
                raise
            other = f"{error} {other}"
        else:
            note = f"Rows are put into the base's chat template: {of_columns}, as its user and its assistant. {other}"
            return _Layout(source, target, chat, () if data.template == CHAT else (note,))
    source = slotted(lines_template(inputs, target), target)
    return _Layout(source, target, notes=(f'Template by default "{source}": {of_columns}. {other}',))


def _unread(data: Data, splits: Splits | None) -> tuple[str, ...]:
    """A note on columns beside the text, where the recipe names none: one of them may be what is to be learned."""
    fields = splits.train[0].fields if splits is not None else {}
    others = [name for name in fields if name != "text" and not is_numbering(name)]
    if "text" not in fields or not others or data.column is not None or data.fields:
        return ()
    verb, subject = ("is", others[0]) if len(others) == 1 else ("are", "one of them")
    return (
        f"All of text is learned; {_named(others)} {verb} not read. To learn {subject} from it: --target {others[0]}.",
    )


def _inputs(data: Data, shape: Shape | None, splits: Splits, target: str) -> tuple[list[str], list[str]]:
    """The fields that are read, and the columns that are left out."""
    if shape is not None and shape.target == target:
        return list(Template.parse(shape.template, target=target, length=1).inputs), []
    named = [name for name in data.fields if name != target]
    if named:
        return named, []
    return input_columns(splits.train, target, data.column)


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sized(recipe: Recipe, lm: FrozenLM | Outline, layout: _Layout) -> Template:
    """The template with the length of every slot."""
    prompt = recipe.prompt
    length = prompt.length
    if length is None and not re.search(r"\{soft:\d+\}", layout.source):
        length = natural_length(recipe, lm)
    template = Template.parse(layout.source, target=layout.target, length=length)
    if prompt.kind == "deep" and not re.match(r"\{soft:\d+\}(?!.*\{soft)", str(template), re.DOTALL):
        raise RecipeError(
            f'data.template: found "{template}", but a deep prompt comes before all text. Put its one slot in front.'
        )
    return template
