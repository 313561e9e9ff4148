"""Products in int8 against the same products in float64."""

from __future__ import annotations

import pytest
import torch

from softprompt.base import hardware
from softprompt.loss.kernels.int8 import Int8Weights, coded_rows, outliers, quantised

pytestmark = pytest.mark.skipif(not hardware.has_int8_products(), reason="needs a CPU with int8 dot products")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_are_the_nearest_multiples_of_a_127th_of_the_largest_number() -> None:
    rows_ND = torch.tensor([[127.0, -127.0, 0.6, -0.6, 3.4, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    codes_ND, step_N1 = quantised(rows_ND, torch.empty(0, dtype=torch.int64))
    assert codes_ND.tolist() == [[255, 1, 129, 127, 131, 128], [128] * 6]
    assert float(step_N1[0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [2**17, 100], ids=["at once", "row by row"])
def test_a_product_is_as_near_as_seven_bits_allow(
    dtype: torch.dtype, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.loss.kernels.workspace.NUMBERS_AT_ONCE", numbers)
    weight_OI, rows_NI = drawn(48, 96).to(dtype), drawn(40, 96, seed=1).to(dtype)
    true_NO = rows_NI.double() @ weight_OI.double().T
    product_NO = Int8Weights(weight_OI).product(coded_rows(rows_NI))
    # Two sides with steps of a 127th of about three standard deviations: an error of some 1 % of the product's.
    assert float((product_NO - true_NO).norm() / true_NO.norm()) < 0.015
    bias_O = drawn(48, seed=2)
    with_bias_NO = Int8Weights(weight_OI).product(coded_rows(rows_NI), bias_O)
    torch.testing.assert_close(with_bias_NO, product_NO + bias_O)


def test_outlying_dimensions_cost_the_others_no_precision() -> None:
    weight_OI, rows_NI = drawn(48, 96), drawn(40, 96, seed=1)
    rows_NI[:, [5, 60]] *= 300
    assert outliers(rows_NI).tolist() == [5, 60]
    true_NO = rows_NI.double() @ weight_OI.double().T
    weights = Int8Weights(weight_OI)
    apart = (weights.product(coded_rows(rows_NI)) - true_NO).norm()
    coarse = (weights.product(coded_rows(rows_NI, torch.empty(0, dtype=torch.int64))) - true_NO).norm()
    small_NI = rows_NI.clone()
    small_NI[:, [5, 60]] = 0
    assert float(apart) < 0.015 * float((small_NI.double() @ weight_OI.double().T).norm())
    assert float(coarse) > 50 * float(apart)


def test_other_outliers_in_the_next_call_take_their_own_weights() -> None:
    weight_OI, first_NI = drawn(48, 96), drawn(40, 96, seed=1)
    second_NI = first_NI.clone()
    first_NI[:, 5] *= 300
    second_NI[:, 6] *= 300
    weights = Int8Weights(weight_OI)
    weights.product(coded_rows(first_NI))
    product_NO, true_NO = weights.product(coded_rows(second_NI)), second_NI.double() @ weight_OI.double().T
    assert float((product_NO - true_NO).norm() / true_NO.norm()) < 0.001
