"""Products in int8 on CPUs with VNNI or AMX: weights coded once, rows in every call, each with a step of its own.

A row's step follows from its largest number. The few dimensions in which rows of a language model are far larger than
in all others would cost these their precision, so they are multiplied in float32 beside the int8 product
(Dettmers et al. 2022, LLM.int8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.loss.kernels.workspace import row_chunks, scratch

# Added to a float32 number of at most 2^22, this leaves it rounded, as an integer in the last bits, 128 further on.
ROUNDING = 1.5 * 2.0**23 + 128
OUTLIER = 2.5  # times what the median dimension reaches
MOST_OUTLIERS = 32


@dataclass(frozen=True)
class CodedRows:
    """Rows [N, D] in two parts: (codes - 128) * step, and float32 numbers at the dimensions whose codes stand for zero."""

    codes_ND: Tensor  # uint8
    step_N1: Tensor
    dimensions_O: Tensor
    outlying_NO: Tensor


def coded_rows(rows_ND: Tensor, dimensions_O: Tensor | None = None) -> CodedRows:
    """The rows in codes, with `dimensions_O` beside them: those of `outliers`, unless given."""
    if dimensions_O is None:
        dimensions_O = outliers(rows_ND)
    codes_ND, step_N1 = quantised(rows_ND, dimensions_O)
    return CodedRows(codes_ND, step_N1, dimensions_O, rows_ND[:, dimensions_O].float())


def outliers(rows_ND: Tensor) -> Tensor:
    """The dimensions in which any of these rows is far larger than in most, [O] of at most MOST_OUTLIERS."""
    largest_D = rows_ND.abs().amax(0).float()
    most = torch.topk(largest_D, min(MOST_OUTLIERS, len(largest_D)))
    return most.indices[most.values > OUTLIER * largest_D.median()].sort().values


class Int8Weights:
    """Weights [O, I] as int8 with a step for each output, in the layout of the product.

    `rows` is the usual number of rows in a call, for which they are packed. Of the weights themselves those at
    outliers are read, so they must stay."""

    def __init__(self, weight_OI: Tensor, rows: int = 512) -> None:
        self.weight_OI = weight_OI
        codes_OI, self.step_O = coded(weight_OI)
        self.packed: Any = torch.ops.onednn.qlinear_prepack(codes_OI, [rows, weight_OI.shape[1]])
        self.zero_O = torch.zeros(len(weight_OI), dtype=torch.int32)
        self._at_outliers = (torch.empty(0, dtype=torch.int64), torch.empty(0))

    def product(self, rows: CodedRows, plus: Tensor | None = None) -> Tensor:
        """rows @ weight.T, float32 [N, O], added to `plus`, which is of that shape or spread to it."""
        product_NO: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows.codes_ND,
            1.0,
            128,
            self.packed,
            self.step_O,
            self.zero_O,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        if plus is None:
            product_NO.mul_(rows.step_N1)
        else:
            torch.addcmul(plus, product_NO, rows.step_N1, out=product_NO)
        if len(rows.dimensions_O):
            product_NO.addmm_(rows.outlying_NO, self._at(rows.dimensions_O))
        return product_NO

    def _at(self, dimensions_O: Tensor) -> Tensor:
        """The weights at these inputs, float32, kept for the next call: outliers are mostly the same from text to text."""
        kept_O, weight = self._at_outliers
        if not torch.equal(kept_O, dimensions_O):
            weight = self.weight_OI[:, dimensions_O].float().T.contiguous()
            self._at_outliers = (dimensions_O, weight)
        return weight


def coded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as int8 (in scratch memory: pack them at once) and the step of each row."""
    wide_OI = scratch("weights", *weight_OI.shape).copy_(weight_OI)
    spare_OI = torch.abs(wide_OI, out=scratch("absolute", *weight_OI.shape))
    step_O = spare_OI.amax(1).clamp_(min=1e-12).div_(127)
    wide_OI.div_(step_O[:, None]).round_()
    return scratch("codes", *weight_OI.shape, dtype=torch.int8).copy_(wide_OI), step_O


def quantised(rows_ND: Tensor, without_O: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and step of each row, uint8 [N, D] and float32 [N, 1]: rows = (codes - 128) * step, zero at `without_O`."""
    codes_ND = torch.empty(rows_ND.shape, dtype=torch.uint8)
    steps_N1 = torch.empty(len(rows_ND), 1)
    # Few rows at a time, in the same memory: five times as fast as over all rows, whose pages are all new.
    for chunk in row_chunks(rows_ND):
        part_nD = rows_ND[chunk]
        wide_nD, spare_nD = scratch("quantised", 2, *part_nD.shape)
        wide_nD.copy_(part_nD)
        if len(without_O):
            wide_nD.index_fill_(1, without_O, 0.0)
        torch.abs(wide_nD, out=spare_nD)
        step_n1 = spare_nD.amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
        steps_N1[chunk] = step_n1
        torch.mul(wide_nD, step_n1.reciprocal_(), out=spare_nD).add_(ROUNDING)
        # The last byte of these integers; torch converts float32 to uint8 one by one, eight times as slowly.
        codes_ND[chunk] = spare_nD.view(torch.int32)
    return codes_ND, steps_N1
