"""The loss through a frozen head, against the whole softmax in float64 and transformers' own loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softprompt.base import hardware as rates
from softprompt.base import nll
from softprompt.base.nll import Head, token_nll
from softprompt.loss.kernels import screened_head as fast_head
from softprompt.loss.kernels.screened_head import PackedHead, ScreenedHead, packed

WIDTH = 24


def head(vocabulary: int = 331, **more: object) -> Head:
    drawn = torch.Generator().manual_seed(0)
    return Head(torch.randn(vocabulary, WIDTH, generator=drawn), **more)  # type: ignore[arg-type]


def rows(count: int, vocabulary: int = 331, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(count, width, generator=drawn)
    return hidden_ND.requires_grad_(), torch.randint(0, vocabulary, (count,), generator=drawn)


def whole(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """The loss from all logits at once, in float64."""
    logits_NV = hidden_ND.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = torch.tanh(logits_NV / head.softcap) * head.softcap
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


def both(count: int, head: Head) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Loss and gradient, ours and those of the whole softmax; every token weighs differently."""
    found = []
    hidden_ND, targets_N = rows(count, len(head.weight_VD))
    weigh_N = torch.linspace(0.5, 2.0, count)
    for loss in (token_nll, whole):
        nll_N = loss(hidden_ND, targets_N, head)
        (gradient_ND,) = torch.autograd.grad((nll_N * weigh_N).sum(), hidden_ND)
        found.append((nll_N.detach().float(), gradient_ND))
    return found[0], found[1]


KINDS = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-1, 1, 331)},
    "scale": {"scale": 0.25},
    "soft cap": {"softcap": 5.0},
    "all of them": {"bias_V": torch.linspace(-1, 1, 331), "scale": 0.5, "softcap": 7.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_loss_and_gradient_are_those_of_the_whole_softmax(kind: str, tokens: int) -> None:
    (ours, our_slope), (theirs, their_slope) = both(tokens, head(**KINDS[kind]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(4, 64), (3, 100), (9, 331), (8, 331)])
def test_blocks_that_do_not_divide_evenly_change_nothing(
    tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nll, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(nll, "BLOCK_VOCABULARY", 64)
    rows, cut = tokens, head(**KINDS["all of them"])
    bias_V = cut.bias_V[:vocabulary] if cut.bias_V is not None else None
    cut = Head(cut.weight_VD[:vocabulary], bias_V, cut.scale, cut.softcap)
    (ours, our_slope), (theirs, their_slope) = both(rows, cut)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-4, atol=1e-5)


def test_logits_of_hundreds_neither_overflow_nor_vanish() -> None:
    far = Head(head().weight_VD * 100)
    (ours, our_slope), (theirs, their_slope) = both(5, far)
    assert float(theirs.max()) > 200
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-3, atol=1e-3)


def test_without_gradient_the_loss_is_the_same() -> None:
    hidden_ND, targets_N = rows(6)
    with_slope = token_nll(hidden_ND, targets_N, head())
    with torch.no_grad():
        torch.testing.assert_close(token_nll(hidden_ND, targets_N, head()), with_slope.detach())


@pytest.mark.parametrize("wide", [True, False])
def test_bfloat16_weights_are_as_near_to_the_whole_softmax_as_bfloat16_allows(
    wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Either way a CPU may take: products in float32, or in bfloat16 itself.
    monkeypatch.setattr(rates, "float32_is_faster", lambda than: wide)
    half = Head(head().weight_VD.bfloat16(), None, 0.3)
    hidden_ND, targets_N = rows(12)
    half_ND = hidden_ND.detach().bfloat16().requires_grad_()
    ours_N = token_nll(half_ND, targets_N, half)
    (our_slope,) = torch.autograd.grad(ours_N.sum(), half_ND)
    wide_ND = half_ND.detach().float().requires_grad_()
    theirs_N = whole(wide_ND, targets_N, half)
    (their_slope,) = torch.autograd.grad(theirs_N.sum(), wide_ND)
    torch.testing.assert_close(ours_N, theirs_N.float(), rtol=1e-2, atol=1e-2)
    assert float((our_slope.float() - their_slope).norm() / their_slope.norm()) < 0.01


needs_int8 = pytest.mark.skipif(not rates.has_int8_products(), reason="needs a CPU with int8 dot products")


def trained_like(count: int, vocabulary: int = 40_000, width: int = 128) -> tuple[Head, Tensor, Tensor]:
    """A head whose entries are as unevenly likely as words are, with a common direction, as trained heads have."""
    drawn = torch.Generator().manual_seed(2)
    rank_V = torch.arange(1, vocabulary + 1).float()
    weight_VD = (
        torch.randn(vocabulary, width, generator=drawn) / 10 + torch.randn(width, generator=drawn) / 10
    )
    weight_VD[:, 0] = -rank_V.log() / 8
    targets_N = torch.multinomial(1 / rank_V, count, replacement=True, generator=drawn)
    hidden_ND = torch.randn(count, width, generator=drawn) * 0.7 + 3 * weight_VD[targets_N]
    hidden_ND[:, 0] = 8
    return Head(weight_VD.bfloat16()), hidden_ND.bfloat16().requires_grad_(), targets_N


@needs_int8
@pytest.mark.parametrize("blocks", [2**26, 2**20], ids=["one block", "blocks of 26 tokens"])
def test_a_screened_head_is_as_near_as_bfloat16_and_leaves_most_of_the_vocabulary_alone(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_head, "BLOCK_PROBABILITIES", blocks)
    large, hidden_ND, targets_N = trained_like(96)
    road = ScreenedHead(PackedHead(large))
    ours_N = token_nll(hidden_ND, targets_N, large, road)
    (our_slope,) = torch.autograd.grad(ours_N.sum(), hidden_ND)
    assert road.taken > 0
    assert road.refused == 0
    wide_ND = hidden_ND.detach().float().requires_grad_()
    theirs_N = whole(wide_ND, targets_N, large)
    (their_slope,) = torch.autograd.grad(theirs_N.sum(), wide_ND)
    # A logit rounded to bfloat16 is off by 2^-9 of itself; the loss is a difference of two.
    rounding = 2**-8 * float((hidden_ND.detach().float() @ large.weight_VD.float().T).abs().max())
    torch.testing.assert_close(ours_N, theirs_N.float(), rtol=0, atol=rounding)
    assert float((our_slope.float() - their_slope).norm() / their_slope.norm()) < 0.01


@needs_int8
@pytest.mark.parametrize(
    ("dimensions", "counts"), [(1, (1, 0)), (60, (0, 1))], ids=["one dimension", "half of them"]
)
def test_int8_is_believed_beside_an_outlying_dimension_and_not_where_many_are(
    dimensions: int, counts: tuple[int, int]
) -> None:
    large, hidden_ND, targets_N = trained_like(64)
    outlying_ND = hidden_ND.detach().clone()
    drawn = torch.Generator().manual_seed(7)
    # Each leaves no steps for all that are not as large.
    outlying_ND[:, 1 : 1 + dimensions] = torch.randn(64, dimensions, generator=drawn).sign() * 60
    road = ScreenedHead(PackedHead(large))
    ours_N = token_nll(outlying_ND.clone().requires_grad_(), targets_N, large, road).detach()
    assert (road.taken, road.refused) == counts
    theirs_N = whole(outlying_ND.float(), targets_N, large)
    rounding = 2**-8 * float((outlying_ND.float() @ large.weight_VD.float().T).abs().max())
    torch.testing.assert_close(ours_N, theirs_N.float(), rtol=0, atol=rounding)


@needs_int8
@pytest.mark.parametrize(
    ("tokens", "wants_gradient"), [(96, False), (20, True)], ids=["a loss alone", "few tokens"]
)
def test_where_the_dense_road_costs_little_it_is_taken(
    tokens: int, wants_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, hidden_ND, targets_N = trained_like(tokens)
    hidden_ND = hidden_ND.detach().requires_grad_(wants_gradient)
    road = ScreenedHead(PackedHead(large))
    ours_N = token_nll(hidden_ND, targets_N, large, road)
    assert (road.taken, road.refused, road.packed.blocks) == (0, 0, [])
    monkeypatch.setattr(fast_head, "LARGE", 1)
    screened_N = token_nll(hidden_ND, targets_N, large, road)
    assert (road.taken, road.refused) == (1, 0)
    torch.testing.assert_close(ours_N, screened_N, rtol=1e-2, atol=2e-2)


def test_only_large_plain_heads_are_packed() -> None:
    large = torch.zeros(2**15, 2**10, dtype=torch.bfloat16)
    assert (packed(Head(large)) is not None) == rates.has_int8_products()
    assert packed(Head(large[:100])) is None
    assert packed(Head(large, softcap=30.0)) is None
    assert packed(Head(large, torch.zeros(2**15))) is None
    assert packed(Head(large.float())) is None


@pytest.mark.parametrize("wide", [True, False], ids=["products in float32", "products in bfloat16"])
@pytest.mark.parametrize("probability", ["nearly all", "most", "little"])
def test_the_loss_in_bfloat16_is_that_of_cross_entropy_over_the_same_logits(
    probability: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of about 30, whose bfloat16 steps are 1/8: a target in finer arithmetic would be off by as much."""
    monkeypatch.setattr(rates, "float32_is_faster", lambda than: wide)
    drawn = torch.Generator().manual_seed(5)
    weight_VD = torch.randn(331, 64, generator=drawn).bfloat16()
    targets_N = torch.randint(0, 331, (50,), generator=drawn)
    along = {"nearly all": 0.5, "most": 0.15, "little": -0.1}[probability]
    hidden_ND = (weight_VD[targets_N].float() * along + torch.randn(50, 64, generator=drawn) * 0.1).bfloat16()
    logits_NV = (hidden_ND.float() @ weight_VD.float().T) if wide else (hidden_ND @ weight_VD.T).float()
    theirs_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    ours_N = token_nll(hidden_ND, targets_N, Head(weight_VD))
    assert float(ours_N.min()) >= 0
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-5, atol=1e-5)


@needs_int8
@pytest.mark.parametrize("along", [2.0, 12.0], ids=["some probability", "nearly all"])
def test_a_screened_loss_is_never_below_zero(along: float) -> None:
    large, hidden_ND, targets_N = trained_like(64)
    easy_ND = (hidden_ND.detach().float() + along * large.weight_VD[targets_N].float()).bfloat16()
    road = ScreenedHead(PackedHead(large))
    ours_N = token_nll(easy_ND.clone().requires_grad_(), targets_N, large, road).detach()
    assert road.taken > 0
    logits_NV = (easy_ND @ large.weight_VD.T).float()
    if rates.float32_is_faster(torch.bfloat16):
        logits_NV = easy_ND.float() @ large.weight_VD.float().T
    theirs_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    assert float(ours_N.min()) >= 0
    # Int8 estimates what little probability is left: the error is a share of the loss, not of the logits.
    torch.testing.assert_close(ours_N, theirs_N, rtol=0.05, atol=2e-4)
