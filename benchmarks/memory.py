"""Peak memory of a sweep's capture and fit at 80 layers x width 1024 x 50,000 tokens, against the stated budget.

The model has that cache shape and a tiny hidden size; the activations are 16 GB, on disk. Peak resident memory must
stay within `--memory-budget`, plus the model and 500 MB.
"""

import json
import resource
import tempfile
from pathlib import Path

import torch
import transformers
from side_by_side import RESULTS, machine, say

from leankv.cache.plan import PlanSpec
from leankv.calibration.capture import capture
from leankv.calibration.fit import Fitting, fit_codecs
from leankv.config.experiment import FitConfig
from leankv.data.blocks import Blocks
from leankv.models.geometry import find_geometry
from leankv.models.half_precision import multiplies, multiply_in_float32
from leankv.models.loading import LoadedModel
from leankv.progress import Progress

LAYERS, BLOCKS, BLOCK_LENGTH = 80, 98, 512  # 50,176 tokens
BUDGET, ALLOWANCE = 2.0, 0.5  # GB


def peak() -> float:
    """Highest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if not multiplies(torch.bfloat16):
        multiply_in_float32(model)
    with_model = peak()
    loaded = LoadedModel(model, None, "made up", find_geometry(model), "", {})
    tokens = torch.randint(0, 1024, (BLOCKS, BLOCK_LENGTH), generator=torch.Generator().manual_seed(0))
    sites = PlanSpec.uniform("ae:4").sites(LAYERS)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, layers = Path(folder) / "activations", list(range(LAYERS))
        activations = capture(loaded, Blocks(tokens, "calibration", "random"), path, layers, 1, {}, Progress())
        after_capture = peak()
        fitting = Fitting(FitConfig(epochs=1), torch.float32, 0, 0, torch.device("cpu"), round(BUDGET * 1e9))
        fit_codecs(activations, sites, fitting, {}, lambda site, fitted: None, Progress())
    limit = with_model + BUDGET + ALLOWANCE
    say(
        f"with the model {with_model:.2f} GB, after capturing {after_capture:.2f} GB, after fitting {peak():.2f} GB; "
        f"the limit is {limit:.2f} GB"
    )
    result = {
        "what": "peak memory of capture and fit at 80 x 1024 x 50,176 tokens, GB",
        "against": f"a memory budget of {BUDGET} GB plus the model and {ALLOWANCE} GB",
        "ratio": limit / peak(),
        "required": 1,
        "peak_gb": peak(),
        "limit_gb": limit,
        "after_capture_gb": after_capture,
        "with_model_gb": with_model,
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
