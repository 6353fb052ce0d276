"""16-bit models on processors without 16-bit products: weights stay narrow, sums are wide, results are rounded once."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from leankv.config.experiment import ModelConfig
from leankv.models import half_precision
from leankv.models.half_precision import FEWEST_ROWS, multiply_in_float32
from leankv.models.loading import load_model
from tests import tiny

HALVES = (torch.bfloat16, torch.float16)


def _layers(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(96, 40), nn.Linear(96, 40, bias=False), Conv1D(40, 96)]
    return [layer.to(dtype) for layer in layers]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", range(3))
def test_a_product_is_the_exact_one_rounded(dtype: torch.dtype, kind: int) -> None:
    layer = _layers(dtype)[kind]
    inputs = torch.randn(3, 32, 96).to(dtype)
    exact = layer.double()(inputs.double())
    layer.to(dtype)
    multiply_in_float32(layer)
    product = layer(inputs)
    assert product.dtype == dtype
    # Half a unit in the last place of a 16-bit number, and what sums of 96 products in float32 are off by.
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
    assert ((product.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_decoding_step_is_multiplied_as_before(dtype: torch.dtype) -> None:
    for before, after in zip(_layers(dtype), _layers(dtype), strict=True):
        multiply_in_float32(after)
        inputs = torch.randn(1, FEWEST_ROWS - 1, 96).to(dtype)
        assert torch.equal(before(inputs), after(inputs))


def test_gradients_pass() -> None:
    layer, wide = (_layers(dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    wide.load_state_dict(layer.state_dict())
    multiply_in_float32(layer)
    inputs = torch.randn(32, 96).bfloat16().requires_grad_()
    again = inputs.detach().float().requires_grad_()
    layer(inputs).float().square().sum().backward()
    wide(again).square().sum().backward()
    assert inputs.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(inputs.grad.float(), again.grad, rtol=0.03, atol=0.03 * float(again.grad.abs().max()))


def test_a_layer_that_others_changed_keeps_its_product() -> None:
    class Quantized(nn.Linear):
        pass

    changed, kept = _layers(torch.bfloat16)[0], Quantized(96, 40).bfloat16()
    forward = changed.forward = lambda inputs: inputs  # as accelerate's hooks do
    multiply_in_float32(nn.ModuleList([changed, kept]))
    assert changed.forward is forward
    assert "forward" not in vars(kept)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("placement", [{"device": "cpu"}, {"device_map": "auto"}], ids=["device", "device map"])
def test_where_the_processor_cannot_multiply(
    architecture: str, placement: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and fingerprint, and logits nearer to float32's than the processor's own 16-bit products get."""
    folder = tiny.save(tmp_path, tiny.build(architecture))
    tokens, logits, marks = tiny.tokens(2, 32), {}, {}
    for name, capable in (("native", True), ("widened", False)):
        monkeypatch.setattr(half_precision, "multiplies", lambda dtype, capable=capable: capable)
        loaded = load_model(ModelConfig(str(folder), **placement))
        assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            logits[name], marks[name] = loaded.model(tokens).logits.float(), loaded.fingerprint
    assert marks["native"] == marks["widened"]
    with torch.no_grad():
        reference = load_model(ModelConfig(str(folder), dtype="float32")).model(tokens).logits
    error = {name: float((found - reference).norm() / reference.norm()) for name, found in logits.items()}
    assert error["widened"] <= 1.5 * error["native"]
    assert error["native"] < 0.1


def test_what_a_processor_can_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"avx2": True}, set()),
        ({"avx512_bf16": True}, {torch.bfloat16}),
        ({"amx_fp16": True, "amx_bf16": True}, set(HALVES)),
        ({"bf16": False, "fp16": True}, {torch.float16}),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert {dtype for dtype in HALVES if half_precision.multiplies(dtype)} == expected
        assert half_precision.multiplies(torch.float32)
