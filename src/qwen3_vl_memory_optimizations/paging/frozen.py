"""Gradients through products with managed weights. The weights are frozen; activations and biases get gradients.

Adapters, prompt tuning and attributions need the gradient of a layer's input, `grad @ W`: one more product with the
weight, decoded in ranges of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .products import Products
from .records.entry import TensorEntry


def tracks(*tensors: torch.Tensor | None) -> bool:
    """Return whether any of these tensors needs a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def frozen_linear(products: Products, entry: TensorEntry, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x @ W.T + bias` with gradients for `x` and `bias` but not for `W`."""
    out: torch.Tensor = _FrozenLinear.apply(x, bias, products, entry)
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, products: Products, entry: TensorEntry
    ) -> torch.Tensor:
        ctx.products, ctx.entry, ctx.has_bias = products, entry, bias is not None
        return products.linear(entry, x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        of_x = ctx.products.linear_transposed(ctx.entry, grad) if ctx.needs_input_grad[0] else None
        of_bias = None
        if ctx.has_bias and ctx.needs_input_grad[1]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, of_bias, None, None


def runs_as_written(part: nn.Module, *inputs: torch.Tensor) -> bool:
    """Return whether a part must run op by op, because autocast chooses dtypes or gradients flow through it."""
    if torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and (tracks(*inputs) or any(each.requires_grad for each in part.parameters()))
