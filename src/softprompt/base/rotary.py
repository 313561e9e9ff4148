"""Rotary positions (Su et al. 2021): cached keys turned to other positions, where the base can be shown to allow it.

A rotary key at position t is the unrotated key turned by t angles, so turning it by a further d makes it the key of
position t + d exactly. Scores then depend on distances alone, as they did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import State, batch_cache, new_cache, row_state
from softprompt.base.placement import Placed

PROBE_TOKENS, PROBE_SHIFT = 12, 5


@dataclass(frozen=True)
class Rotary:
    """The rotation of a base's keys: one frequency per pair of dimensions.

    A pair is (i, i + R/2) of the first R dimensions of a head (Llama, NeoX), or (2i, 2i + 1) where `interleaved`
    (GPT-J, Cohere)."""

    frequencies_R: Tensor
    interleaved: bool

    def turned(self, keys: Tensor, shift: int) -> Tensor:
        """Keys [..., K] as they would be `shift` positions later (earlier where negative). Same dtype and shape."""
        angles_R = self.frequencies_R.to(keys.device).double() * shift
        cos_R, sin_R = angles_R.cos().float(), angles_R.sin().float()
        rotated, rest = torch.split(keys.float(), [2 * len(cos_R), keys.shape[-1] - 2 * len(cos_R)], -1)
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, -1)
        pair = (first * cos_R - second * sin_R, second * cos_R + first * sin_R)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1).to(keys.dtype)


_KNOWN: WeakKeyDictionary[FrozenLM, Rotary | None] = WeakKeyDictionary()


def rotary_of(lm: FrozenLM) -> Rotary | None:
    """The base's rotation, or None where it has none, several, or one by which turned keys do not give its own logits.

    Nothing is believed of the architecture: a short text is read, its keys are turned, and what follows must come out
    as if they had not been."""
    if lm not in _KNOWN:
        _KNOWN[lm] = _proved(lm)
    return _KNOWN[lm]


def turned_state(rotary: Rotary, state: State, shift: int) -> State:
    """A state as if its text had been `shift` positions later."""
    return State(tuple(rotary.turned(keys, shift) for keys in state.keys), state.values, state.marks)


@torch.no_grad()
def _proved(lm: FrozenLM) -> Rotary | None:
    modules: list[Any] = [module for module in lm.body.modules() if hasattr(module, "inv_freq")]
    frequencies = [module.inv_freq.detach().float().cpu() for module in modules]
    if not frequencies or any(not torch.equal(other, frequencies[0]) for other in frequencies):
        return None
    ids_T = torch.arange(1, PROBE_TOKENS + 5, device=lm.device) * 7 % lm.vocab_size
    cache = new_cache()
    lm.hidden(lm.embed(ids_T[None, :PROBE_TOKENS]), past=cache)
    state = row_state(cache, 0, 0, PROBE_TOKENS, ids_T[:PROBE_TOKENS].tolist())
    wanted = _after(lm, state, ids_T[PROBE_TOKENS:], PROBE_TOKENS)
    close = 64 * torch.finfo(lm.dtype).eps * wanted.abs().max().clamp(min=1.0)
    for interleaved in (False, True):
        rotary = Rotary(frequencies[0], interleaved)
        moved = turned_state(rotary, state, -PROBE_SHIFT)
        logits = _after(lm, moved, ids_T[PROBE_TOKENS:], PROBE_TOKENS - PROBE_SHIFT)
        if bool((logits - wanted).abs().max() <= close):
            return rotary
    return None


def _after(lm: FrozenLM, state: State, ids_T: Tensor, position: int) -> Tensor:
    """Logits [T, V] of tokens after `state`, the first of them at `position`."""
    cache, _ = batch_cache([state])
    positions_1T = torch.arange(position, position + len(ids_T), device=lm.device)[None]
    hidden_1TD = lm.states(Placed(lm.embed(ids_T[None]), None, positions_1T, cache))
    return lm.logits(hidden_1TD[0]).float()
