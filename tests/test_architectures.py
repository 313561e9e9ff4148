"""One exactness matrix over the architectures: every road to a token's logits gives the same logits.

`make docs` writes docs/exactness.md from a run of the same checks.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from layouts import encode
from softprompt.base.frozen_lm import FrozenLM
from softprompt.data.batch import collate
from softprompt.data.example import Example
from softprompt.data.template import Template
from softprompt.errors import BaseError, PromptError
from softprompt.inference.compiled import TextPrompt, compile_prompt, text_state
from softprompt.inference.generate import DecodeSettings
from softprompt.inference.prefill import PrefillRow, prefill
from softprompt.inference.request import request
from softprompt.inference.running_batch import Running
from softprompt.inference.verify import PROVEN
from softprompt.prompt.soft_prompt import DeepPrompt, SoftPrompt
from softprompt.tuning.starts import first_layer_sizes
from tiny_models import ARCHITECTURES, REFUSED, WINDOW, tiny_model, tiny_tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "exactness.md"
TOLERANCE = 5e-5  # of logits about 1 in size, in float32
NEW_TOKENS = 12
HEAD = "Classify: "
TEXTS = ["Tweet: my order never came", "hello", "quick help.", "a"]


@dataclass(frozen=True)
class Subject:
    """A base, a prompt made of the embeddings of real tokens, and the model's own logits for any tokens."""

    lm: FrozenLM
    head: list[int]
    texts: list[list[int]]
    vectors_PD: Tensor

    def soft(self, template: str = "{text}") -> SoftPrompt:
        return SoftPrompt(self.vectors_PD, self.lm.fingerprint, template)

    def own(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def logits(self, rows: list[PrefillRow]) -> list[Tensor]:
        with torch.no_grad():
            done = prefill(self.lm, rows)
            return [self.lm.logits(done.hidden_BTD[b, row.rest - 1]) for b, row in enumerate(rows)]


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def compiled_is_embedded(one: Subject) -> float:
    """A prompt of random vectors: its compiled state, and the vectors themselves in one input."""
    noise_PD = one.vectors_PD + 0.3 * torch.randn(
        one.vectors_PD.shape, generator=torch.Generator().manual_seed(1)
    )
    prompt = compile_prompt(one.lm, SoftPrompt(noise_PD, one.lm.fingerprint))
    worst = 0.0
    for ids in one.texts:
        row = prompt.row([*range(-1, -1 - len(noise_PD), -1), *ids])
        assert row.state.length == len(noise_PD)
        with torch.no_grad():
            whole_1SD = torch.cat([noise_PD, one.lm.embed(torch.tensor(ids))])[None]
            embedded = one.lm.model(inputs_embeds=whole_1SD, use_cache=False).logits[0, -1]
        worst = max(worst, far(one.logits([row])[0], embedded))
    return worst


def embedded_is_token_made(one: Subject) -> float:
    """A prompt made of the embeddings of real tokens, at the start, scores as those tokens do."""
    prompt = compile_prompt(one.lm, one.soft())
    rows = [prompt.row([*range(-1, -1 - len(one.head), -1), *ids]) for ids in one.texts]
    return max(
        far(one.logits([row])[0], one.own(one.head + ids)[-1])
        for row, ids in zip(rows, one.texts, strict=True)
    )


def a_slot_in_the_middle_is_token_made(one: Subject) -> float:
    """The same behind the row's own text."""
    prompt = compile_prompt(one.lm, one.soft(f"{{text}}{{soft:{len(one.head)}}} go"))
    tail = list(one.lm.tokenizer(" go")["input_ids"])
    worst = 0.0
    for text, ids in zip(TEXTS, one.texts, strict=True):
        row = prompt.row(prompt.marks(one.lm, text))
        worst = max(worst, far(one.logits([row])[0], one.own(ids + one.head + tail)[-1]))
    return worst


def deep_is_token_made(one: Subject) -> float | str:
    """A deep prompt made of a text's keys and values scores as that text."""
    try:
        keys_LPHK, values_LPHK = text_state(one.lm, HEAD, len(one.head))
        deep = DeepPrompt(keys_LPHK, values_LPHK, one.lm.fingerprint)
    except PromptError:
        return "no"  # its layers, or its keys and values, differ in width
    prompt = compile_prompt(one.lm, deep)
    rows = [prompt.row([*range(-1, -1 - len(one.head), -1), *ids]) for ids in one.texts]
    return max(
        far(one.logits([row])[0], one.own(one.head + ids)[-1])
        for row, ids in zip(rows, one.texts, strict=True)
    )


def alone_is_batched(one: Subject) -> float:
    """Rows with a soft prompt, with none, and with a text, in one batch and one by one."""
    made = [compile_prompt(one.lm, prompt) for prompt in (one.soft(), None, TextPrompt(HEAD))]
    rows = [prompt.row(prompt.marks(one.lm, text)) for text in TEXTS for prompt in made]
    together = one.logits(rows)
    return max(far(together[b], one.logits([row])[0]) for b, row in enumerate(rows))


def left_padded_is_right_padded(one: Subject) -> float:
    """Padding on either side, and none at all."""
    longest = max(len(ids) for ids in one.texts)
    worst = 0.0
    padded: dict[str, Tensor] = {}
    for side in ("left", "right"):
        rows, masks = [], []
        for ids in one.texts:
            fill = [0] * (longest - len(ids))
            rows.append(fill + ids if side == "left" else ids + fill)
            masks.append(
                [0] * len(fill) + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * len(fill)
            )
        mask_BS = torch.tensor(masks)
        positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            hidden_BSD = one.lm.hidden(one.lm.embed(torch.tensor(rows)), mask_BS, positions_BS)
            padded[side] = one.lm.logits(hidden_BSD)
    for b, ids in enumerate(one.texts):
        own = one.own(ids)
        worst = max(worst, far(padded["left"][b, longest - len(ids) :], own))
        worst = max(worst, far(padded["right"][b, : len(ids)], own))
    return worst


def cached_is_not_cached(one: Subject) -> float:
    """Each generated token's log-probability, and the one of reading everything again; and the tokens themselves."""
    made = [compile_prompt(one.lm, prompt) for prompt in (one.soft(), None, TextPrompt(HEAD))]
    settings = DecodeSettings(max_new_tokens=NEW_TOKENS, ignore_end=True, log_probabilities=True)
    requests = [request(one.lm, prompt, text, settings) for text in TEXTS for prompt in made]
    running = Running(one.lm)
    running.admit(requests)
    while len(running):
        running.step()
    worst = 0.0
    for place, asked in enumerate(requests):
        text = TEXTS[place // 3]
        whole = [
            one.head + list(one.lm.tokenizer(text)["input_ids"]),
            list(one.lm.tokenizer(text)["input_ids"]),
            list(one.lm.tokenizer(HEAD + text)["input_ids"]),
        ][place % 3]
        own_TV = one.own(whole + asked.token_ids)[len(whole) - 1 : -1]
        assert own_TV.argmax(1).tolist() == asked.token_ids, "other tokens than without a cache"
        ours = torch.tensor(asked.log_probabilities)
        theirs = own_TV.log_softmax(1).gather(1, torch.tensor(asked.token_ids)[:, None])[:, 0]
        worst = max(worst, far(ours, theirs))
    return worst


def the_loss_is_token_made(one: Subject) -> float:
    """What tuning sees: each token's loss under a soft and under a deep prompt, in a batch."""
    layout = Template.parse(f"{{soft:{len(one.head)}}}{{text}}")
    texts = [text for text, ids in zip(TEXTS, one.texts, strict=True) if len(ids) > 1]
    encoded = [encode(layout, Example({"text": text}), one.lm.tokenizer) for text in texts]
    batch = collate([row for row in encoded if row is not None])
    expected = []
    for text in texts:
        ids = list(one.lm.tokenizer(text)["input_ids"])
        own_TV = one.own(one.head + ids)[len(one.head) - 1 : -1].log_softmax(1)
        expected.append(-own_TV.gather(1, torch.tensor(ids)[:, None])[:, 0])
    vectors_PD = one.vectors_PD.clone().requires_grad_()
    loss_N = one.lm.token_nll(batch, (vectors_PD,))
    loss_N.sum().backward()
    assert vectors_PD.grad is not None
    assert bool((vectors_PD.grad.abs().sum(1) > 0).any())
    worst = far(loss_N.detach(), torch.cat(expected))
    try:
        state = text_state(one.lm, HEAD, len(one.head))
    except PromptError:
        return worst
    if state[0].shape != state[1].shape:
        return worst
    base_only = [encode(layout, Example({"text": text}), one.lm.tokenizer, slots=False) for text in texts]
    keys_LPHK, values_LPHK = (tensor.clone().requires_grad_() for tensor in state)
    batch = collate([row for row in base_only if row is not None])
    loss_N = one.lm.token_nll(batch, (keys_LPHK, values_LPHK))
    loss_N.sum().backward()
    assert keys_LPHK.grad is not None
    assert bool((keys_LPHK.grad != 0).any())
    # Nothing stands before the first token but keys and values, so it has no state that predicts it.
    theirs = torch.cat([nll_T[1:] for nll_T in expected])
    return max(worst, far(loss_N.detach(), theirs))


CHECKS: dict[str, Callable[[Subject], float | str]] = {
    "compiled = embedded": compiled_is_embedded,
    "embedded = token-made": embedded_is_token_made,
    "slot in the middle": a_slot_in_the_middle_is_token_made,
    "deep = token-made": deep_is_token_made,
    "alone = batched": alone_is_batched,
    "left = right padded": left_padded_is_right_padded,
    "cache = no cache": cached_is_not_cached,
    "loss = token-made": the_loss_is_token_made,
}


def subject(architecture: str) -> Subject:
    tokenizer = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the reference code of some architectures says of itself
        lm = FrozenLM.wrap(tiny_model(architecture), tokenizer, name=architecture)
    head = list(tokenizer(HEAD)["input_ids"])
    return Subject(
        lm, head, [list(tokenizer(text)["input_ids"]) for text in TEXTS], lm.embed(torch.tensor(head)).clone()
    )


@cache
def measured(architecture: str) -> dict[str, float | str]:
    one = subject(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: check(one) for name, check in CHECKS.items()}


@cache
def refusal(architecture: str) -> str:
    with pytest.raises(BaseError) as found:
        subject(architecture)
    return str(found.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_road_gives_the_same_logits(architecture: str) -> None:
    wrong = {
        name: found
        for name, found in measured(architecture).items()
        if isinstance(found, float) and found > TOLERANCE
    }
    assert not wrong, f"{architecture}: {wrong}"


# Gemma 4 makes its only layer a full one.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sizes_before_and_after_the_first_layer_are_those_of_its_own_input_and_output(
    architecture: str,
) -> None:
    lm = subject(architecture).lm
    stacks = [module for module in lm.model.modules() if isinstance(module, torch.nn.ModuleList)]
    layer = next(stack[0] for stack in stacks if len(stack) == lm.num_layers)
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, named: Any, output: Any) -> None:
        entering = inputs[0] if inputs else named["hidden_states"]
        seen.extend((entering, output if isinstance(output, Tensor) else output[0]))

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    sizes = first_layer_sizes(lm)
    hook.remove()
    wanted = [states_1SD[0].square().mean(1).sqrt().median().item() for states_1SD in seen]
    assert sizes == pytest.approx(tuple(wanted), rel=1e-5)


LIMITED = [name for name in ARCHITECTURES if ("sliding" in name or "chunk" in name) and "Gemma 4" not in name]


@pytest.mark.parametrize("architecture", LIMITED)
def test_the_window_of_the_matrix_is_shorter_than_its_texts(architecture: str) -> None:
    """One layer sees no further back than 8 positions, so the matrix does put windows to the test."""
    types = ARCHITECTURES[architecture][1].get("layer_types")
    model = tiny_model(architecture, num_hidden_layers=1, **({"layer_types": types[:1]} if types else {}))
    ids_1T = torch.arange(20, 40)[None]
    other_1T = ids_1T.clone()
    other_1T[0, 0] = 7
    with torch.no_grad():
        differs_T = (model(input_ids=ids_1T).logits - model(input_ids=other_1T).logits)[0].abs().amax(
            1
        ) > 1e-6
    assert differs_T.nonzero()[-1].item() == WINDOW - 1


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name_with_the_reason(architecture: str) -> None:
    assert refusal(architecture).startswith(architecture)
    assert "hoose another base" in refusal(architecture)


def test_what_is_proven_here_needs_no_proof_at_run_time() -> None:
    assert set(PROVEN) == {model_type for model_type, _ in ARCHITECTURES.values()}


def page() -> str:
    """docs/exactness.md, from a run of every check."""
    lines = [
        "# Exactness, architecture by architecture",
        "",
        "Small random models (2 layers, float32), one for each architecture, built from transformers' own configs and",
        "checked against the model's own forward pass over tokens, without a cache and alone. Each figure is the",
        f"largest difference of any logit, log-probability or loss (all about 1 in size; the limit is {TOLERANCE:g}).",
        "Sliding windows and chunks are 8 positions, shorter than the texts. Wherever tokens are generated they are",
        "the same tokens. Written by `make docs`; the tests check that it is current.",
        "",
        *(f"- **{name}**: {(check.__doc__ or '').strip()}" for name, check in CHECKS.items()),
        "",
        "| architecture | " + " | ".join(CHECKS) + " |",
        "|---|" + "---|" * len(CHECKS),
    ]
    for architecture in ARCHITECTURES:
        found = measured(architecture)
        cells = [f"{value:.0e}" if isinstance(value, float) else value for value in found.values()]
        lines.append(f"| {architecture} | " + " | ".join(cells) + " |")
    lines += [
        "",
        '"no": the base\'s layers, or its keys and values, differ in width, so a deep prompt is not one tensor; soft',
        "and text prompts work. Bases of other architectures are put through the same checks, in short, when they are",
        "first used, and refused where they fail.",
        "",
        "## Refused",
        "",
        *(f"- {architecture}: {_reason(architecture)}" for architecture in REFUSED),
        "- Encoder-decoder models (T5, BART, ...): not causal language models.",
        "",
    ]
    return "\n".join(lines)


def _reason(architecture: str) -> str:
    return refusal(architecture).removeprefix(f"{architecture}: ").replace(" Choose another base.", "")


def test_the_published_matrix_is_current() -> None:
    def without_figures(text: str) -> str:
        return re.sub(r"\d(\.\d+)?e[+-]\d\d|differ by [\d.]+", "#", text)

    assert without_figures(PAGE.read_text()) == without_figures(page()), "run make docs"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
