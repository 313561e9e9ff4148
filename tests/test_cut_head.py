"""The head by cut-cross-entropy, against torch's cross-entropy over all logits. Its kernel for GPUs is in test_cuda.py."""

from __future__ import annotations

import pytest
import torch

from softprompt.base.nll import Head
from softprompt.loss.kernels import cut_head as module
from softprompt.loss.kernels.cut_head import CutHead, cut_head


@pytest.mark.timeout(900)  # torch.compile calls a C++ compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradient_are_those_over_all_logits(softcap: float | None) -> None:
    pytest.importorskip("triton", reason="needs triton, which comes with torch for GPUs")
    pytest.importorskip("cut_cross_entropy", reason="needs cut-cross-entropy, an optional package")
    drawn = torch.Generator().manual_seed(1)
    weight_VD = torch.randn(37, 16, generator=drawn)
    hidden_ND = torch.randn(9, 16, generator=drawn)
    targets_N = torch.randint(0, 37, (9,), generator=drawn)
    head = Head(weight_VD, scale=0.7, softcap=softcap)
    with torch.inference_mode():  # as a loss without a gradient is read
        alone_N, none = CutHead(head, "torch_compile", 0)(hidden_ND, targets_N, head, False)
    found_N, slope_ND = CutHead(head, "torch_compile", 0)(hidden_ND, targets_N, head, True)

    leaf_ND = hidden_ND.clone().requires_grad_()
    logits_NV = 0.7 * (leaf_ND @ weight_VD.T)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    wanted_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    wanted_N.sum().backward()
    assert none is None
    torch.testing.assert_close(alone_N, wanted_N.detach())
    torch.testing.assert_close(found_N, wanted_N.detach())
    assert slope_ND is not None
    torch.testing.assert_close(slope_ND, leaf_ND.grad)


def test_a_head_that_it_does_not_know_goes_the_plain_road(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    half = torch.randn(37, 16).bfloat16()
    assert isinstance(cut_head(Head(half), "torch_compile"), CutHead)
    assert cut_head(Head(half)) is None  # its kernel is for GPUs
    assert cut_head(Head(half.float()), "torch_compile") is None
    assert cut_head(Head(half, bias_V=torch.zeros(37)), "torch_compile") is None


def test_few_logits_and_a_kernel_that_gives_something_else_go_the_plain_road(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = torch.Generator().manual_seed(2)
    head = Head(torch.randn(37, 16, generator=drawn).bfloat16())
    hidden_ND, targets_N = torch.randn(9, 16, generator=drawn), torch.randint(0, 37, (9,), generator=drawn)
    asked: list[int] = []
    factors = [1.0]

    def kernel(self: CutHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor, wants: bool) -> object:
        asked.append(len(hidden_ND))
        nll_N, slope_ND = module.dense(hidden_ND, targets_N, head, wants)
        return nll_N, None if slope_ND is None else factors[0] * slope_ND

    monkeypatch.setattr(CutHead, "cut", kernel)
    wanted_N, wanted_ND = module.dense(hidden_ND, targets_N, head, True)
    assert wanted_ND is not None
    for factor, most_plain, used in (
        (1.0, 9 * 37, []),  # as few logits as the plain road takes
        (1.0, 9 * 37 - 1, [module.PROBED, 9]),  # compared, then used
        (1.2, 9 * 37 - 1, [module.PROBED]),  # compared, and never used
    ):
        asked.clear()
        factors[0] = factor
        nll_N, slope_ND = CutHead(head, most_plain=most_plain)(hidden_ND, targets_N, head, True)
        assert asked == used
        assert slope_ND is not None
        torch.testing.assert_close(nll_N, wanted_N)
        torch.testing.assert_close(slope_ND, wanted_ND)


def test_without_the_package_heads_go_the_plain_road(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert cut_head(Head(torch.randn(37, 16).bfloat16()), "torch_compile") is None
