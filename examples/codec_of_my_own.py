"""A codec of one's own, defined here and compared with the built-in ones.

    python examples/codec_of_my_own.py MODEL TEXT_FILE

It keeps of each number only on which side of its channel's mean it lies. The command line can use it too, from this
folder: leankv compare codec_of_my_own:SignRecipe int:2 -m MODEL --dataset TEXT_FILE
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import leankv
from leankv.codecs import Code
from leankv.codecs.coding.packing import pack, packed_bytes, unpack
from leankv.codecs.statistics import mean_of


@leankv.register
@dataclass(frozen=True)
class SignRecipe(leankv.Recipe):
    family = grammar = "sign"

    def fit(self, data: leankv.FitData) -> list[leankv.Codec]:
        return [Sign(self, mean_of(x), (x.float() - mean_of(x)).abs().mean(dim=0)) for x in data.train]

    def unfitted(self, width: int) -> leankv.Codec:
        return Sign(self, torch.zeros(width), torch.zeros(width))


class Sign(leankv.Codec):
    """Each number as its channel's mean plus or minus the mean distance from it. Storage: a bit a number."""

    def __init__(self, recipe: SignRecipe, mean: torch.Tensor, distance: torch.Tensor):
        super().__init__(recipe, width=len(mean))
        self.register_buffer("mean", mean)
        self.register_buffer("distance", distance)

    @property
    def bits_per_token(self) -> float:
        return 8 * packed_bytes(self.width, 1)

    def encode(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Code:
        return Code({"signs": pack(x.float() > self.mean, 1)})

    def decode(self, code: Code, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.mean + self.distance * (2 * unpack(code["signs"], 1, self.width).float() - 1)


def main(name: str, text_file: str, block_length: int = 512) -> None:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = Path(text_file).read_text(encoding="utf-8")
    fitted_to, measured_on = text[: len(text) // 2], text[len(text) // 2 :]
    for recipe in ("sign", "resid(pca:8,sign)", "int:2", "mean"):
        bundle = leankv.fit(recipe, model, tokenizer, fitted_to, block_length=block_length, error_metric="none")
        report = leankv.perplexity(model, tokenizer, measured_on, bundle=bundle, block_length=block_length)
        bits = sum(codec.bits_per_token for codec in bundle.plan.values()) / len(bundle.plan)
        print(f"{recipe:20} {bits:6.0f} bits a vector   {report.delta_percent:+.1f} % perplexity   KL {report.kl:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
