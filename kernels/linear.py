"""`Backend.plan_linear` in plain torch, on any device: the oracle, and what backends without a kernel run.

In a decoding step all the weights of a model are read for the sake of one row, so that reading them is what takes time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

__all__ = ["MOST_ROWS", "LinearPlan"]

MOST_ROWS = 4  # of x: beyond, weights are used often enough for products of matrices


class LinearPlan:
    """A prepared product of few rows with a weight; made by `Backend.plan_linear`.

    It holds for as long as weight and bias are where they were, whatever is in them (`is_of`).

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, or `None`.
        compute: The dtype of products and sums.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        checks.check_linear(weight, bias)
        self.weight, self.bias, self.compute, self.dtype = weight, bias, compute, weight.dtype
        self.out_features, self.in_features = self._shape = weight.shape
        self._weight_stride = weight.stride(0)
        self._weight_at, self._bias_at = weight.data_ptr(), 0 if bias is None else bias.data_ptr()

    def is_of(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether the plan was made for these, and they have not been put elsewhere since (as by `.data = `)."""
        return (
            weight is self.weight
            and bias is self.bias
            and weight.data_ptr() == self._weight_at
            and weight.shape == self._shape
            and weight.stride(0) == self._weight_stride
            and weight.dtype is self.dtype
            and (bias is None or bias.data_ptr() == self._bias_at)
        )

    def run(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, summed in float32 and rounded once.

        Args:
            x: `[..., in_features]` in the weight's dtype, with 1 to `MOST_ROWS` rows in all.

        Returns:
            `[..., out_features]`.

        Raises:
            ValueError: A shape or dtype is wrong.
        """
        checks.check_linear_input(x, self.weight, MOST_ROWS)
        result = x.to(self.compute) @ self.weight.to(self.compute).T
        if self.bias is not None:
            result += self.bias.to(self.compute)
        return result.to(x.dtype)
