"""The attention sink of a base, and a deep prompt's start near it.

Most language models attend to the first position, whatever stands there, and take little from it: the attention sink (Xiao
et al. 2023, "Efficient streaming language models with attention sinks"). Of keys and values that such a base holds after reading
a text, those of the first position get nearly all of a prompt's attention and of its gradient, and the others have little to
learn from (figures in LOG.md).
"""

from __future__ import annotations

from torch import Tensor

SHORT = 0.5  # of the usual length of values: a sink's are shorter, so that attending to it changes little (Guo et al. 2024)
SHARE = 0.8  # of the first position in the start of each other one


def has_sink(values_LPHK: Tensor) -> bool:
    """Whether the first position of `values_LPHK`, which a base holds after reading P of them, is an attention sink.

    It is where, in half of the layers at least, its values are shorter than `SHORT` times the median of the other positions'.
    False for a single position, which has no others."""
    lengths_LP = values_LPHK.float().square().sum((2, 3)).sqrt()
    if lengths_LP.shape[1] < 2:
        return False
    usual_L = lengths_LP[:, 1:].median(1).values
    return bool((lengths_LP[:, 0] < SHORT * usual_L).float().mean() >= 0.5)


def near_first(tensor_LPHK: Tensor) -> Tensor:
    """Keys or values with every position moved by `SHARE` of the way to the first one.

    A query that attends to the first position attends to all of them then, and gets little from them, as before. Keys hold the
    rotation of the first position too, so it is that one they stand for, wherever they lie."""
    return tensor_LPHK.lerp(tensor_LPHK[:, :1].expand_as(tensor_LPHK), SHARE)
