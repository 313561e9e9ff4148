"""What each process does in test_processes.py: losses through a head of which it holds a part, against the whole head."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.base.frozen_lm import FrozenLM
from softprompt.base.nll import Head, token_nll
from softprompt.base.processes import joined
from softprompt.base.split import Shard
from softprompt.loss.soft_targets import SoftTargets, soft_cross_entropy

POSITIONS, WIDTH = 7, 6


def plain_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head) -> Tensor:
    logits_NV = head.scale * nn.functional.linear(hidden_ND, weight_VD, bias_V)
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def differences(vocabulary: int, softcap: float | None, biased: bool) -> list[float]:
    """How far losses and gradients of the parts are from those of torch's cross-entropy over all logits."""
    processes = joined()
    drawn = torch.Generator().manual_seed(vocabulary)
    weight_VD = torch.randn(vocabulary, WIDTH, generator=drawn)
    bias_V = torch.randn(vocabulary, generator=drawn) if biased else None
    hidden_ND = torch.randn(POSITIONS, WIDTH, generator=drawn)
    targets_N = torch.randint(0, vocabulary, (POSITIONS,), generator=drawn)
    each = -(-vocabulary // processes.count)
    first = processes.rank * each
    own = slice(first, first + each)
    shard = Shard(first, vocabulary)
    head = Head(weight_VD[own], None if bias_V is None else bias_V[own], 0.7, softcap, shard)

    leaf_ND, plain_ND = hidden_ND.clone().requires_grad_(), hidden_ND.clone().requires_grad_()
    ours_N = token_nll(leaf_ND, targets_N, head)
    (ours_N * torch.arange(1, POSITIONS + 1)).sum().backward()
    logits_NV = plain_logits(plain_ND, weight_VD, bias_V, head)
    wanted_N = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    (wanted_N * torch.arange(1, POSITIONS + 1)).sum().backward()
    found = [float((ours_N - wanted_N).detach().abs().max()), _off(leaf_ND, plain_ND)]

    # A teacher's probabilities instead of one right token; all of them are listed, so that the loss is a plain one.
    teacher_NV = torch.randn(POSITIONS, vocabulary, generator=drawn)
    leaf_ND, plain_ND = hidden_ND.clone().requires_grad_(), hidden_ND.clone().requires_grad_()
    soft_N = soft_cross_entropy(leaf_ND, SoftTargets.of(teacher_NV, None), head)
    soft_N.sum().backward()
    logits_NV = plain_logits(plain_ND, weight_VD, bias_V, head)
    plain_N = nn.functional.cross_entropy(logits_NV, teacher_NV.softmax(1), reduction="none")
    plain_N.sum().backward()
    found += [float((soft_N - plain_N).detach().abs().max()), _off(leaf_ND, plain_ND)]
    return [*found, float((head.logits(hidden_ND) - logits_NV).detach().abs().max())]


def _off(leaf: Tensor, plain: Tensor) -> float:
    assert leaf.grad is not None
    assert plain.grad is not None
    return float((leaf.grad - plain.grad).abs().max())


def main(folder: str) -> None:
    lm = FrozenLM.load(folder, dtype="float32", device="cpu", spread="tensor")
    shard: Any = lm.head.shard
    print(
        json.dumps(
            {
                "differences": max(
                    value
                    for vocabulary in (8, 11, 3)
                    for softcap in (None, 2.0)
                    for biased in (False, True)
                    for value in differences(vocabulary, softcap, biased)
                ),
                "head_rows": len(lm.head.weight_VD),
                "first": shard.first,
                "vocabulary": shard.size,
                "logits": lm.logits(torch.zeros(1, lm.width)).shape[1],
                "weights_sha256": lm.fingerprint.weights_sha256,
                "sha256": lm.fingerprint.sha256,
                "in_memory": lm.weights_sha256(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
