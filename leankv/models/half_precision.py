"""16-bit models on processors that have no 16-bit products.

There torch multiplies matrices in bfloat16 or float16 six to nine times more slowly than in float32. A model loaded in
float32 instead takes twice the memory, and so does all that its cache holds exact. Here weights stay in 16 bits; each
product widens its factors, sums in float32 and rounds once, as GPUs do.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

# Fewer rows than this (a decoding step) are multiplied faster as they are than their weights are widened. Measured on
# an AVX2 processor: even at 4 rows for 576 x 1,536, at 32 for 576 x 49,152.
FEWEST_ROWS = 16

# Names of torch.cpu.get_capabilities(); `bf16` and `fp16` are those of Arm.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products in `dtype`."""
    if dtype not in INSTRUCTIONS:
        return True
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in INSTRUCTIONS[dtype])


def multiply_in_float32(model: nn.Module) -> None:
    """Let all linear layers of a 16-bit model on the CPU multiply in float32; weights and results stay in 16 bits.

    Layers that others have changed (quantized, offloaded, with adapters) keep their own products, and so does a model
    that is moved to another device later.
    """
    for module in model.modules():
        if type(module) in PRODUCTS and "forward" not in vars(module):
            module.forward = MethodType(PRODUCTS[type(module)], module)


def _linear(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    return _product(inputs, layer.weight, layer.bias)


def _conv1d(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    return _product(inputs, layer.weight.t(), layer.bias)


def _product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if inputs.shape[:-1].numel() < FEWEST_ROWS or inputs.device.type != "cpu":
        return linear(inputs, weight, bias)
    wide = linear(inputs.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(inputs.dtype)


PRODUCTS: dict[type[nn.Module], Any] = {nn.Linear: _linear, Conv1D: _conv1d}
