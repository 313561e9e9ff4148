"""Contexts cut down to a few positions, turned keys, and the loss against a teacher's probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.kv import EMPTY, State, row_state
from softprompt.base.nll import Head, dense
from softprompt.base.rotary import rotary_of, turned_state
from softprompt.errors import PromptError
from softprompt.inference.prefill import PrefillRow, prefill
from softprompt.loss.soft_targets import SoftTargets, soft_cross_entropy
from softprompt.prompt.soft_prompt import Plain
from softprompt.tuning.compaction import compact
from tiny_models import tiny_model, tiny_tokenizer

ROTARY = ["Llama", "GPT-NeoX", "Qwen3", "Phi", "Cohere", "Gemma"]
CONTEXT = [7 * n % 300 + 3 for n in range(1, 41)]
TEXTS = [[11 * n % 300 + 3 for n in range(k, k + 6)] for k in range(1, 13)]


def lm_of(architecture: str) -> FrozenLM:
    return FrozenLM.wrap(tiny_model(architecture), tiny_tokenizer(), architecture)


def read(lm: FrozenLM, ids: list[int]) -> State:
    done = prefill(lm, [PrefillRow(EMPTY, tuple(ids))])
    return row_state(done.cache, 0, *done.span(0), ids)


def log_probabilities(lm: FrozenLM, state: State, text: list[int]) -> Tensor:
    """Of the token after `text`, which follows what `state` holds."""
    done = prefill(lm, [PrefillRow(state, (*state.marks, *text))])
    return lm.logits(done.hidden_BTD[0, -1]).float().log_softmax(-1)


def as_state(plain: Plain) -> State:
    keys, values = (tuple(layer.transpose(0, 1) for layer in tensor) for tensor in plain)
    return State(keys, values, tuple(range(-1, -1 - plain[0].shape[1], -1)))


def divergence(lm: FrozenLM, short: State, whole: State) -> float:
    """Mean KL divergence in nats of the short prefix from the whole context, after texts that nothing was fitted to."""
    texts = [[13 * n % 300 + 3 for n in range(k, k + 5)] for k in range(20, 30)]
    total = 0.0
    for text in texts:
        teacher, student = log_probabilities(lm, whole, text), log_probabilities(lm, short, text)
        total += float((teacher.exp() * (teacher - student)).sum())
    return total / len(texts)


@pytest.mark.parametrize("architecture", ROTARY)
@torch.no_grad()
def test_turned_keys_give_what_the_same_text_gives_at_its_own_positions(architecture: str) -> None:
    lm = lm_of(architecture)
    rotary = rotary_of(lm)
    assert rotary is not None
    whole = read(lm, CONTEXT)
    wanted = log_probabilities(lm, whole, TEXTS[0])
    # As many positions fewer as the marks that are left out: the text then stands that much earlier.
    moved = turned_state(rotary, whole, 3)
    back = turned_state(rotary, moved, -3)
    torch.testing.assert_close(log_probabilities(lm, back, TEXTS[0]), wanted, atol=1e-4, rtol=1e-4)
    for layer, other in zip(moved.keys, whole.keys, strict=True):
        assert not torch.allclose(layer, other, atol=1e-3)


@torch.no_grad()
def test_a_turned_key_is_the_key_of_the_later_position() -> None:
    """The first layer's keys depend on their token and its position alone, so transformers itself says what is right."""
    lm = lm_of("Llama")
    rotary = rotary_of(lm)
    assert rotary is not None
    here, later = read(lm, [9, 20, 20, 20]), read(lm, [9, 8, 7, 20])
    torch.testing.assert_close(
        rotary.turned(here.keys[0][:, 1], 2), later.keys[0][:, 3], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("architecture", ["GPT-2", "BLOOM (ALiBi)", "OPT"])
def test_bases_without_rotary_positions_have_no_rotation(architecture: str) -> None:
    assert rotary_of(lm_of(architecture)) is None


@pytest.mark.parametrize("architecture", ["Llama", "GPT-NeoX", "Qwen3", "BLOOM (ALiBi)"])
@torch.no_grad()
def test_a_short_prefix_says_nearly_what_the_context_says_and_far_more_than_its_first_positions(
    architecture: str,
) -> None:
    lm = lm_of(architecture)
    whole = read(lm, CONTEXT)
    found = compact(lm, whole, TEXTS, 16)
    cut = divergence(lm, whole.first(16), whole)
    assert divergence(lm, as_state(found.plain), whole) < 0.5 * cut
    assert found.turned == (architecture != "BLOOM (ALiBi)")
    assert bool((found.places_LHP[..., 0] == 0).all())  # the attention sink stays
    assert bool((found.places_LHP.diff(dim=-1) > 0).all())


@torch.no_grad()
def test_with_nearly_all_positions_kept_nothing_is_lost() -> None:
    lm = lm_of("Llama")
    whole = read(lm, CONTEXT)
    found = compact(lm, whole, TEXTS, len(CONTEXT) - 1)
    assert divergence(lm, as_state(found.plain), whole) < 0.02 * divergence(lm, whole.first(16), whole)


def test_a_context_that_fits_and_a_missing_text_are_refused() -> None:
    lm = lm_of("Llama")
    whole = read(lm, CONTEXT)
    with pytest.raises(PromptError, match=r"The context has 40 positions; .* found 40"):
        compact(lm, whole, TEXTS, 40)
    with pytest.raises(PromptError, match="no text that follows the context"):
        compact(lm, whole, [], 8)


def head(**about: float) -> Head:
    drawn = torch.Generator().manual_seed(0)
    return Head(torch.randn(50, 8, generator=drawn), **about)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [None, 5], ids=["whole vocabulary", "top 5"])
@pytest.mark.parametrize("about", [{}, {"scale": 0.5}, {"softcap": 3.0}], ids=["plain", "scaled", "capped"])
def test_loss_and_gradient_are_torchs_cross_entropy_with_soft_targets(
    k: int | None, about: dict[str, float]
) -> None:
    drawn = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(7, 8, generator=drawn).requires_grad_()
    targets = SoftTargets.of(torch.randn(7, 50, generator=drawn) * 3, k)
    # torch's own softmax over the listed tokens and, as one class, the log-sum of all others.
    listed_NV = torch.zeros(7, 50, dtype=torch.bool).scatter(1, targets.ids_Nk, True)
    likely_NV = head(**about).logits(hidden_ND).log_softmax(1)
    rest_N = likely_NV.masked_fill(listed_NV, -torch.inf).logsumexp(1) if k else torch.zeros(7)
    wanted_NV = torch.zeros(7, 50).scatter(1, targets.ids_Nk, targets.probabilities_Nk)
    theirs_N = -(wanted_NV * likely_NV).sum(1) - targets.rest_N * rest_N
    ours_N = soft_cross_entropy(hidden_ND, targets, head(**about))
    torch.testing.assert_close(ours_N, theirs_N)
    weights_N = torch.arange(1.0, 8.0)
    (theirs,) = torch.autograd.grad((theirs_N * weights_N).sum(), hidden_ND)
    (ours,) = torch.autograd.grad((ours_N * weights_N).sum(), hidden_ND)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("about", [{}, {"scale": 0.5}, {"softcap": 3.0}], ids=["plain", "scaled", "capped"])
def test_by_way_of_one_target_the_loss_and_its_gradient_are_the_same(about: dict[str, float]) -> None:
    """`dense` is the loss of single targets, which the screened head stands in for on large vocabularies."""
    drawn = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(7, 8, generator=drawn).requires_grad_()
    targets = SoftTargets.of(torch.randn(7, 50, generator=drawn) * 3, 5)
    weights_N = torch.arange(1.0, 8.0)
    found = []
    for head_loss in (None, dense):
        loss_N = soft_cross_entropy(hidden_ND, targets, head(**about), head_loss)
        found.append((loss_N, *torch.autograd.grad((loss_N * weights_N).sum(), hidden_ND)))
    for plain, screened in zip(*found, strict=True):
        torch.testing.assert_close(screened, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [None, 5], ids=["whole vocabulary", "top 5"])
def test_the_loss_is_never_below_the_teachers_entropy_and_reaches_it_at_the_teacher(k: int | None) -> None:
    drawn = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(6, 8, generator=drawn).requires_grad_()
    targets = SoftTargets.of(head().logits(hidden_ND.detach()), k)
    own_N = soft_cross_entropy(hidden_ND, targets, head())
    torch.testing.assert_close(own_N.detach(), targets.entropy_N)
    (pull_ND,) = torch.autograd.grad(own_N.sum(), hidden_ND)
    torch.testing.assert_close(pull_ND, torch.zeros_like(pull_ND), atol=1e-5, rtol=0)
    other_N = soft_cross_entropy(torch.randn(6, 8, generator=drawn), targets, head())
    assert bool((other_N >= targets.entropy_N).all())


def test_right_answers_get_their_share_once_whether_the_teacher_lists_them_or_not() -> None:
    targets = SoftTargets.of(torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(2, 1), 2).mixed(
        torch.tensor([1, 3]), 0.25
    )
    whole_NV = torch.zeros(2, 4).scatter_add(1, targets.ids_Nk, targets.probabilities_Nk)
    likely_V = torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(0)
    assert whole_NV[0, 1] == pytest.approx(0.75 * float(likely_V[1]) + 0.25)
    assert whole_NV[1, 3] == pytest.approx(0.25)
    torch.testing.assert_close(targets.rest_N, (0.75 * likely_V[2:].sum()).repeat(2))
    for ids_k, probabilities_k in zip(targets.ids_Nk, targets.probabilities_Nk, strict=True):
        named = ids_k[probabilities_k > 0].tolist()
        assert len(named) == len(set(named))
