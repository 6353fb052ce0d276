"""Prefill of a bfloat16 model on a processor without bfloat16 products: widened against torch's own, and float32.

On a processor that has such products LeanKV leaves them to it, and there is nothing to compare.
"""

import torch
import transformers
from side_by_side import report, say, side_by_side, timed

from leankv.config.experiment import ModelConfig
from leankv.models.half_precision import multiplies
from leankv.models.loading import load_model

TOKENS, CHUNK = 1024, 128


def prefill(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds for all tokens, chunk by chunk through the stock cache."""
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        return timed(lambda: [model(part, past_key_values=cache) for part in ids.split(CHUNK, dim=1)])[0]


def main() -> None:
    if multiplies(torch.bfloat16):
        say("this processor multiplies bfloat16 itself")
        return
    widened, float32 = (load_model(ModelConfig(dtype=dtype)).model for dtype in ("bfloat16", "float32"))
    native = load_model(ModelConfig(dtype="bfloat16")).model
    for module in native.modules():
        vars(module).pop("forward", None)
    ids = torch.randint(0, 49152, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    what, notes = "prefill of SmolLM2-135M in bfloat16, products in float32", {"tokens": TOKENS, "chunk": CHUNK}
    for name, against, other, required in (
        ("half_precision", "torch's own bfloat16 products", native, 3),
        ("half_precision_float32", "a float32 model", float32, 0.9),
    ):
        ratio = side_by_side(
            what, against, lambda: prefill(widened, ids), lambda other=other: prefill(other, ids), required, notes=notes
        )
        report(name, ratio)


if __name__ == "__main__":
    main()
