"""The 70B shape on one GPU: capture, fit and sweep of all 80 layers, K and V, `ae:4`; seconds by stage, peak memory.

    python benchmarks/gpu_70b_shape.py [BLOCKS]    of 2,048 tokens, 32 unless given; all passes are in proportion to it

Random weights in NF4 with double quantization: what is timed does not depend on their values. Without a GPU a reduced
shape runs on the CPU, to show that the same code does; its figures say nothing of a GPU.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from side_by_side import RESULTS, machine, say, timed

from leankv.cache.plan import PlanSpec, Site
from leankv.calibration.capture import capture
from leankv.calibration.fit import FittedCodec, Fitting, fit_codecs
from leankv.codecs import Codec
from leankv.config.experiment import FitConfig, ProtocolConfig
from leankv.config.plan_table import PARTS
from leankv.data.blocks import Blocks
from leankv.evaluation.replay import Replay
from leankv.models.geometry import find_geometry
from leankv.models.loading import LoadedModel, numerics
from leankv.progress import Progress
from leankv.storage.memory_budget import MemoryBudget

FULL = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
REDUCED = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}


def random_nf4_llama(shape: dict[str, int], device: torch.device) -> Any:
    """A Llama of `shape` whose linear layers hold random weights in NF4, built one by one on the device."""
    config = transformers.LlamaConfig(
        **shape, vocab_size=128256 if device.type == "cuda" else 4096, num_key_value_heads=8, head_dim=128
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, torch.nn.Linear) or name == "lm_head":
                continue
            shape_of = child.out_features, child.in_features
            weights = torch.randn(shape_of, dtype=torch.bfloat16, device=device) * 0.02
            linear = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            linear.weight = bitsandbytes.nn.Params4bit(
                weights, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(module, name, linear.to(device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fill = torch.ones if parameter.dim() == 1 else torch.randn
                values = fill(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, torch.nn.Parameter(values * (1 if parameter.dim() == 1 else 0.02), False))
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config).to(device)
    return model.eval()


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    shape, n_blocks, length = (FULL, 32, 2048) if on_gpu else (REDUCED, 2, 256)
    n_blocks = int(sys.argv[1]) if len(sys.argv) > 1 else n_blocks
    memory_bytes = (16 if on_gpu else 2) * 10**9
    say(f"{'the 70B shape on a GPU' if on_gpu else 'no GPU here: a REDUCED shape on the CPU'}: {shape}")
    torch.manual_seed(0)
    seconds: dict[str, float] = {}
    seconds["build"], model = timed(lambda: random_nf4_llama(shape, device))
    layers = shape["num_hidden_layers"]
    loaded = LoadedModel(model, None, "random 70B shape", find_geometry(model), "random", numerics(model))
    tokens = torch.randint(0, model.config.vocab_size, (n_blocks, length))
    blocks = Blocks(tokens, "selection", "random")
    sites = PlanSpec.uniform("ae:4").sites(layers)
    plan: dict[Site, Codec] = {}

    def keep(site: Site, fitted: FittedCodec) -> None:
        plan[site] = fitted.codec

    @torch.no_grad()
    def bare() -> None:
        for row in tokens:
            model.base_model(input_ids=row[None].to(device), use_cache=False)

    def stage(name: str, work: Callable[[], Any]) -> Any:
        def finished() -> Any:
            result = work()
            if on_gpu:
                torch.cuda.synchronize()  # so that times are those of finished work
            return result

        seconds[name], result = timed(finished)
        return result

    with tempfile.TemporaryDirectory(dir=".") as folder:
        stage("warm-up", bare)
        stage("bare forward", bare)
        path, every = Path(folder) / "activations", list(range(layers))
        fitting = Fitting(FitConfig(), torch.float32, 0, 0, device, memory_bytes)
        activations = stage("capture", lambda: capture(loaded, blocks, path, every, 1, {}, Progress()))
        stage(
            "fit",
            lambda: fit_codecs(activations, sites, fitting, {}, keep, Progress()),
        )
        replay = Replay(model, blocks, ProtocolConfig(), MemoryBudget(memory_bytes), Path(folder))
        stage("base", lambda: replay.measure({}))
        alone = [{site: plan[site] for site in (Site(layer, part) for part in PARTS)} for layer in every]
        stage("sweep", lambda: [replay.measure(own) for own in alone])
    total = sum(seconds[stage] for stage in ("capture", "fit", "base", "sweep"))
    # What the recipe needs at least: a pass to capture, one for the base, and half of one for each layer.
    needed = seconds["bare forward"] * (2 + layers / 2)
    result = {
        "what": "70B shape, capture, fit and sweep of all layers" if on_gpu else "REDUCED shape on a CPU",
        "shape": shape,
        "blocks": n_blocks,
        "block_length": length,
        "seconds": seconds,
        "tokens_per_second_of_the_sweep": n_blocks * length * layers / seconds["sweep"],
        "share_of_bare_forward_passes": needed / total,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "codecs": len(plan),
        "machine": machine(),
    }
    say(json.dumps(result, indent=2))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / ("gpu_70b_shape.json" if on_gpu else "gpu_70b_shape_reduced_cpu.json")).write_text(
        json.dumps(result, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
