"""Fitting autoencoders for 80 layers of width 1024, K and V, against one `nn.Module` after another, 6 epochs of Adam.

Both must reach the same held-out error in every layer that both fit. The vectors are made up: each site has its own
random two-layer map from 24 numbers of falling size, with noise, an offset and a few loud channels, as keys have. The
modules are run for every 15th site and their time multiplied.
"""

import tempfile
from pathlib import Path

import safetensors.torch
import torch
from side_by_side import report, say, side_by_side, timed
from whole_sweep import train_alone

from leankv.cache.plan import PlanSpec, Site
from leankv.calibration.activations import StoredActivations
from leankv.calibration.fit import FittedCodec, Fitting, fit_codecs
from leankv.codecs import fraction_of_variance_unexplained
from leankv.config.experiment import FitConfig
from leankv.config.plan_table import PARTS
from leankv.progress import Silent
from leankv.storage.files import write_json

LAYERS, WIDTH, BLOCKS, BLOCK_LENGTH = 80, 1024, 8, 1024
EVERY = 15  # odd, so that both parts are among them
OURS = FitConfig(epochs=0)  # the start in closed form is already better than where the modules end
MODULE_EPOCHS, MODULE_BATCH, MODULE_LEARNING_RATE = 6, 256, 1e-3  # Adam's own default rate


def vectors(layer: int, part: str) -> torch.Tensor:
    """One site's vectors `[tokens, 1024]`."""
    generator = torch.Generator().manual_seed(2 * layer + (part == "v"))
    z = torch.randn(BLOCKS * BLOCK_LENGTH, 24, generator=generator) * torch.linspace(2, 0.2, 24)
    inner = torch.randn(24, 64, generator=generator) / 24**0.5
    x = torch.tanh(z @ inner) @ torch.randn(64, WIDTH, generator=generator)
    x += 0.5 * torch.randn(x.shape, generator=generator) + torch.randn(WIDTH, generator=generator)
    x[:, :: WIDTH // 8] *= 4
    return x.to(torch.bfloat16)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layer in range(LAYERS):
            both = {part: vectors(layer, part) for part in PARTS}
            safetensors.torch.save_file(both, folder / f"layer-{layer:03d}.safetensors")
        manifest = {"layers": list(range(LAYERS)), "widths": [WIDTH] * LAYERS, "blocks": BLOCKS}
        write_json(folder / "manifest.json", {**manifest, "block_length": BLOCK_LENGTH, "dtype": "bfloat16"})
        activations = StoredActivations(folder)
        sites = PlanSpec.uniform("ae:4").sites(LAYERS)
        sampled = list(sites)[::EVERY]
        first_heldout = (BLOCKS - 1) * BLOCK_LENGTH
        errors: dict[Site, float] = {}
        fitted: dict[Site, FittedCodec] = {}

        def one_after_another() -> float:
            def train() -> None:
                for site in sampled:
                    x = activations.read(*site).float()
                    codec = train_alone(x[:first_heldout], MODULE_EPOCHS, MODULE_BATCH, MODULE_LEARNING_RATE)
                    heldout = x[first_heldout:]
                    errors[site] = fraction_of_variance_unexplained(heldout, codec.decode(codec.encode(heldout))).item()

            return timed(train)[0] * len(sites) / len(sampled)

        def batched() -> float:
            fitting = Fitting(OURS, torch.float32, 0, 0, torch.device("cpu"), 4 << 30)
            return timed(lambda: fit_codecs(activations, sites, fitting, {}, fitted.__setitem__, Silent()))[0]

        ratio = side_by_side(
            "fitting 160 autoencoders (80 layers of width 1024), to no worse a held-out error in any compared layer",
            "one nn.Module after another, 6 epochs of Adam",
            batched,
            one_after_another,
            required=3,
            repeats=2,
            notes={"tokens": BLOCKS * BLOCK_LENGTH, "modules_run": len(sampled), "our_epochs": OURS.epochs},
        )
        worst = max(fitted[site].fvu - errors[site] for site in sampled)
        for site in sampled:
            say(f"layer {site.layer} {site.part}: FVU {fitted[site].fvu:.4f}, module {errors[site]:.4f}")
        ratio.notes["largest_excess_fvu"] = worst
        report("fit_80x1024", ratio)
        assert worst <= 0, "a layer was fitted worse than by its module"


if __name__ == "__main__":
    main()
