"""A fingerprint of a model: what it computes, whatever it is called, wherever its weights lie."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from leankv.errors import UserError
from leankv.models.structure import text_config
from leankv.storage.files import hash_of

SAMPLES_PER_TENSOR = 64  # as well as the sum of all, which sees changes but not permutations


LEFT_OUT = frozenset(
    {
        # Where it came from, and what wrote it.
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version"),
        # How weights are held, which the weights themselves show, and what a run's numerics say.
        *("dtype", "torch_dtype", "quantization_config", "_attn_implementation", "attn_implementation"),
        *("_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal"),
        # What a forward pass hands out, and in how many pieces it is computed.
        *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward"),
        # Where generation begins and ends, and the embedding that gets no gradient; people set them as they go.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        # How training starts and what it drops.
        *("initializer_range", "attention_dropout", "hidden_dropout", "dropout", "activation_dropout"),
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout", "layerdrop", "router_jitter_noise"),
        # Heads for other tasks.
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    }
)
"""Entries of a text model's configuration that do not change the logits of given tokens. All others count, so one that
is not known here makes another fingerprint rather than passing unnoticed."""


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """sha256 (hex) over the configuration, and over a sum and spread-out samples of every weight tensor.

    Of PEFT adapters, also which are active and how strongly.

    Of the text model's configuration all counts but `LEFT_OUT`; null is the same as not there. Floating-point weights
    count as bfloat16, so that a bfloat16 checkpoint has one fingerprint in bfloat16 and float32. Weights that
    accelerate offloaded are read from where it keeps them, a tensor at a time. Buffers that a checkpoint does not hold
    follow from the configuration, and are left out.

    Raises:
        UserError: a weight is nowhere.
    """
    # Not the state dict: bitsandbytes requantizes weights to make one, once a forward pass has repacked them on a CPU.
    weights = [_marks(name, own, stored) for name, own, stored in _weights(model)]
    adapters = {name: own for name, module in model.named_modules() if (own := _adapters(module))}
    known = {"adapters": adapters} if adapters else {}
    return hash_of({"configuration": _configuration(model), "weights": weights, **known})


def _adapters(module: Any) -> list[Any]:
    """Which of a PEFT layer's adapters are at work, and how strongly; nothing of any other module."""
    active, is_off = getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
    if not isinstance(active, list) or not isinstance(is_off, bool):
        return []
    scaling = getattr(module, "scaling", {})
    return [is_off, *([name, scaling.get(name) if isinstance(scaling, dict) else None] for name in active)]


def _configuration(model: Any) -> dict[str, Any]:
    """What of the text model's configuration counts, as it would be read back from JSON."""
    config = text_config(model.config)
    return {
        key: value
        for key, value in json.loads(config.to_json_string(use_diff=False)).items()
        if key not in LEFT_OUT and value is not None
    }


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, the model's own tensor (on `meta` where it is offloaded), and a tensor that holds its numbers.

    Tied weights come under each of their names: offloading unties them.
    """
    modules = dict(model.named_modules())
    for module_name, module in modules.items():
        buffers = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in [*module._parameters.items(), *buffers.items()]:
            if tensor is not None:
                full_name = f"{module_name}.{name}".removeprefix(".")
                yield full_name, tensor, _offloaded(modules, full_name) if tensor.is_meta else tensor


def _offloaded(modules: Mapping[str, Any], name: str) -> torch.Tensor:
    """An offloaded weight, out of the map that a hook on its module, or on one around it, reads it from."""
    around = name
    while around:
        around = around.rpartition(".")[0]
        hook = getattr(modules[around], "_hf_hook", None)
        for own in getattr(hook, "hooks", (hook,)):  # accelerate chains hooks where a module has several
            if (weights := getattr(own, "weights_map", None)) is not None:
                stored: torch.Tensor = weights[name.removeprefix(f"{around}.")]
                return stored
    raise UserError(f"the weight {name} of this model is nowhere (on meta); load the model with its weights")


def _marks(name: str, own: torch.Tensor, stored: torch.Tensor) -> list[Any]:
    """What the fingerprint holds of one weight tensor."""
    quantized = getattr(own, "quant_state", None)
    marks: list[Any] = [name, list(own.shape if quantized is None else quantized.shape)]
    flat = stored.detach().flatten()
    if quantized is not None:  # how often each of the 16 codes stands there is the same however they are packed
        low, high = (torch.bincount(codes, minlength=16) for codes in (flat & 15, flat >> 4))
        return [*marks, (low + high).tolist()]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    at = torch.linspace(0, len(flat) - 1, min(SAMPLES_PER_TENSOR, len(flat)), dtype=torch.float64).long()
    return [*marks, int(flat.sum(dtype=torch.int64)), flat[at.to(flat.device)].tolist()]
