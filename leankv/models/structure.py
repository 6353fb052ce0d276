"""What is known of the inside of a model: its layers, rotary modules, output projections, attention's kind.

All that depends on how an architecture is built is asked here, and each question has "not known" (None, or an empty
collection) as an answer; callers make their sentences of it. Two things are read off the caches of a model instead of
its modules: sliding windows (`leankv.models.observers.attention_windows`) and widths (`leankv.models.geometry`).
"""

from collections.abc import Sequence
from typing import Any

import torch

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What models call the linear map behind attention."""

ROTARY_MODULE = "rotary_emb"
"""How the names of modules end that make the cos and sin tables of rotary embedding."""


def text_config(config: Any) -> Any:
    """The configuration of the decoder, which models that also see or hear hold inside of theirs."""
    return config.get_text_config(decoder=True)


def find_decoder_layers(model: Any) -> torch.nn.ModuleList | None:
    """The list of a model's decoder layers; None where there is no single one of the right length."""
    length = text_config(model.config).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == length]
    # Lists inside a layer (experts, say) may happen to be as long; the decoder's is the outermost.
    return lists[0] if lists else None


def rotary_modules(model: Any) -> list[torch.nn.Module]:
    """The modules that make rotary tables; empty where none has a known name."""
    return [module for name, module in model.named_modules() if name.endswith(ROTARY_MODULE)]


def rope_types(config: Any) -> set[str]:
    """All kinds of rotary scaling (`rope_type`) in a configuration; kinds of layers may differ. Empty where none is."""
    parameters = getattr(text_config(config), "rope_parameters", None) or {}
    entries = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in entries if "rope_type" in entry}


def output_projection(attention: torch.nn.Module) -> torch.nn.Module | None:
    """The linear map behind attention in one of a model's attention modules; None where it has no known name."""
    found = [getattr(attention, name) for name in OUTPUT_PROJECTIONS if hasattr(attention, name)]
    return found[0] if found else None


def attention_heads(config: Any) -> int | None:
    """Query heads of a layer; None where the configuration does not say."""
    heads: int | None = getattr(text_config(config), "num_attention_heads", None)
    return heads


def has_latent_attention(config: Any) -> bool:
    """Whether keys and values come from latents of low rank (DeepSeek-V2, arXiv 2405.04434)."""
    return getattr(text_config(config), "kv_lora_rank", None) is not None


def max_positions(config: Any) -> int | None:
    """Tokens that the model's positions reach; None where the configuration does not say."""
    positions: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return positions


def earlier_layers(windows: Sequence[int | None], layer: int, count: int) -> list[int]:
    """The layers that a codec of `layer` may predict from: the nearest `count` before it that hold the same tokens."""
    alike = [other for other in range(layer) if windows[other] == windows[layer]]
    return alike[::-1][:count]
