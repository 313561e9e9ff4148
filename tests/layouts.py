"""Rows laid out in one call, for tests that want many layouts of many rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from softprompt.data import batch
from softprompt.data import preview as previews
from softprompt.data.batch import EncodedSet
from softprompt.data.encoded import Encoded
from softprompt.data.example import Example
from softprompt.data.layout import Layout, View, to_learn
from softprompt.data.preview import Preview
from softprompt.data.template import Template


def encode(
    template: Template, example: Example, tokenizer: Any, view: View = to_learn, **settings: Any
) -> Encoded:
    return view(Layout.of(template, tokenizer, **settings), example)


def encode_all(
    template: Template, examples: Iterable[Example], tokenizer: Any, view: View = to_learn, **settings: Any
) -> EncodedSet:
    return batch.encode_all(Layout.of(template, tokenizer, **settings), examples, view)


def preview(
    template: Template, examples: Sequence[Example], tokenizer: Any, *, show: int = 3, **settings: Any
) -> Preview:
    return previews.preview(Layout.of(template, tokenizer, **settings), examples, show=show)
