"""Slot files of llama-server: a prompt's keys and values in the very file that the server saves for as many tokens.

How such a file looks depends on the server's build and settings (types of the cache, flash attention, number of slots). So
the server itself makes one for the prompt's placeholder tokens, the pattern, and here its keys and values are replaced:

    magic, version, number of words, token list          as the server wrote them
    number of streams, and for each: number of cells      all but one are empty
    position, sequences of each cell
    is V transposed, number of layers
    for each layer: type, bytes of a row, keys [P, H*K]
    for each layer: type, bytes of a row, values [P, H*K]; transposed: type, bytes of a number, H*K, values [H*K, P]

What the server computed for the placeholders is compared with what the base computes for them. That shows whether the
server has this base, and in which order it keeps the numbers of a head: llama.cpp stores some models with the halves of
each head interleaved, as their rotation takes pairs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.errors import PromptError, WrongBase

MAGIC = 0x67677371
TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
MAX_DIFFERENCE = (
    0.25  # of the first layer's numbers, relative: weights of 4 bits stay below, another order is above 1
)


@dataclass(frozen=True)
class Span:
    """The place of one layer's keys or values in a file."""

    start: int
    size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Pattern:
    """A slot file of `cells` positions, and where its numbers are."""

    content: bytes
    cells: int
    keys: tuple[Span, ...]
    values: tuple[Span, ...]
    transposed: bool

    def layer(self, span: Span, *, transposed: bool = False) -> Tensor:
        """One layer's numbers [P, H*K] as float32."""
        raw = bytearray(self.content[span.start : span.start + span.size])
        flat = torch.frombuffer(raw, dtype=span.dtype).float()
        return flat.view(-1, self.cells).T if transposed else flat.view(self.cells, -1)

    def filled(self, keys_LPN: Sequence[Tensor], values_LPN: Sequence[Tensor]) -> bytes:
        """The same file with other keys and values [P, H*K] for each layer."""
        content = bytearray(self.content)
        for spans, layers, transposed in (
            (self.keys, keys_LPN, False),
            (self.values, values_LPN, self.transposed),
        ):
            for span, layer in zip(spans, layers, strict=True):
                numbers = (layer.T if transposed else layer).to(span.dtype).contiguous()
                raw = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
                if len(raw) != span.size:
                    raise WrongBase(
                        f"The server keeps {span.size} bytes a layer, and this base has {len(raw)}. Start it with this base."
                    )
                content[span.start : span.start + span.size] = raw
        return bytes(content)


def read_pattern(content: bytes, cells: int) -> Pattern:
    """Finds the numbers in a slot file of `cells` positions. Raises PromptError for a file of another kind."""
    try:
        return _Reader(content).pattern(cells)
    except struct.error:
        raise PromptError(
            "llama-server's slot file ends before its numbers do: a version that is not known here."
        ) from None


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, form: str) -> int:
        (number,) = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return int(number)

    def pattern(self, cells: int) -> Pattern:
        magic, _version, words = self.take("I"), self.take("I"), self.take("I")
        if magic != MAGIC:
            raise PromptError("llama-server saved a file that is no slot file.")
        self.at += 4 * words
        filled = False
        for _ in range(self.take("I")):
            count = self.take("I")
            if count == 0:
                continue
            if filled or count != cells:
                raise PromptError(f"llama-server's slot holds {count} positions, wanted {cells}.")
            filled = True
            for _ in range(count):
                self.take("I")  # position
                sequences = self.take("I")
                self.at += 4 * sequences
            transposed, layers = self.take("I"), self.take("I")
            keys = tuple(self.rows(cells) for _ in range(layers))
            values = tuple(self.columns(cells) if transposed else self.rows(cells) for _ in range(layers))
        if not filled or self.at > len(self.content):
            raise PromptError("llama-server's slot file holds no keys and values.")
        return Pattern(self.content, cells, keys, values, bool(transposed))

    def rows(self, cells: int) -> Span:
        dtype, row = self.dtype(), self.take("Q")
        return self.span(row * cells, dtype)

    def columns(self, cells: int) -> Span:
        dtype, number, width = self.dtype(), self.take("I"), self.take("I")
        return self.span(number * width * cells, dtype)

    def dtype(self) -> torch.dtype:
        kind = self.take("I")
        if kind not in TYPES:
            raise PromptError(
                f"llama-server's cache has numbers of type {kind}. Start it with --cache-type-k f16 --cache-type-v f16 (or f32)."
            )
        return TYPES[kind]

    def span(self, size: int, dtype: torch.dtype) -> Span:
        span = Span(self.at, size, dtype)
        self.at += size
        return span


def flat(layer_HPK: Tensor, *, paired: bool) -> Tensor:
    """One layer's keys or values as a row for each position [P, H*K]; `paired` interleaves the halves of each head."""
    heads, positions, width = layer_HPK.shape
    if paired:
        layer_HPK = layer_HPK.reshape(heads, positions, 2, width // 2).transpose(2, 3)
    return (
        layer_HPK.reshape(heads, positions, width).transpose(0, 1).reshape(positions, heads * width).float()
    )


def is_paired(pattern: Pattern, keys_HPK: Tensor, values_HPK: Tensor, base: str) -> bool:
    """Whether the server keeps the numbers of a head in pairs. `keys_HPK` and `values_HPK` are what the base computes for
    the placeholders in its first layer.

    Raises WrongBase where the server computed something else: it has another base."""
    if len(pattern.layer(pattern.keys[0]).flatten()) != keys_HPK.numel():
        raise WrongBase(f"The server's cache is not that of {base}. Start it with this base.")
    values = pattern.layer(pattern.values[0], transposed=pattern.transposed)
    differences = {
        paired: _difference(pattern.layer(pattern.keys[0]), flat(keys_HPK, paired=paired))
        for paired in (False, True)
    }
    paired = min(differences, key=lambda order: differences[order])
    difference = max(differences[paired], _difference(values, flat(values_HPK, paired=False)))
    if not difference < MAX_DIFFERENCE:
        raise WrongBase(
            f"The server computes other keys and values than {base} (they differ by {difference:.0%} in the first layer). Start "
            "it with this base, converted by llama.cpp's own converter."
        )
    return paired


def _difference(read: Tensor, wanted: Tensor) -> float:
    return float((read - wanted).norm() / wanted.norm())
