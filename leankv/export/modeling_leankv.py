"""A causal LM whose `generate` uses a compressed KV cache by default.

    model = AutoModelForCausalLM.from_pretrained(REPOSITORY, trust_remote_code=True)

What comes back is the base model, of its own class, with codecs attached: `model.new_cache()` makes an empty cache, and
`generate` makes one where it is given none. The files beside this one, `leankv_*.py`, are LeanKV's own.
"""

import logging
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from leankv.cache.bundle import CODECS_FILE, CONFIG_FILE, Bundle, load_bundle, read_bundle
from leankv.cache.code_attention import switch_to_codes
from leankv.cache.default_cache import make_by_default
from leankv.export.configuration_leankv import LeanKVConfig
from leankv.models.fingerprint import fingerprint
from leankv.models.half_precision import multiplies, multiply_in_float32

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LeanKVForCausalLM(PreTrainedModel):
    """Loads a base model and attaches the codecs; there are no models of this class."""

    config_class = LeanKVConfig
    base_model_prefix = "model"

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, config: Any = None, **given: Any) -> Any:
        """The base model, in eval mode, with a compressed cache.

        Args:
            name: folder or hub id of the repository.
            *arguments: handed on to the base model's `from_pretrained`.
            config: of the repository; read unless given.
            **given: handed on likewise (`dtype`, `device_map`, `quantization_config`, ...).

        Raises:
            UserError: the codecs are damaged, or belong to another model.
        """
        hub = {option: given[option] for option in HUB_OPTIONS if option in given}
        if config is None:
            config = LeanKVConfig.from_pretrained(name, **hub)
        files = [cached_file(name, file, **hub) for file in (CONFIG_FILE, CODECS_FILE)]
        given.pop("adapter_kwargs", None)
        if config.base_config is None:
            given.update(revision=config.base_revision or "main")
            model = AutoModelForCausalLM.from_pretrained(config.base_model, *arguments, **given)
        else:
            base = AutoConfig.for_model(**config.base_config)
            model = AutoModelForCausalLM.from_pretrained(name, *arguments, config=base, **given)
        model.eval()
        if model.device.type == "cpu" and not multiplies(model.dtype):
            multiply_in_float32(model)
        folder = Path(files[0]).parent
        if getattr(model, "hf_quantizer", None) is None:
            return attach(model, load_bundle(folder, model))
        bundle = read_bundle(folder, model)
        if fingerprint(model) != bundle.made_for["fingerprint"]:
            logger.warning("the codecs were fitted to other weights than these, which are quantized; see the card")
        return attach(model, bundle)


def attach(model: Any, bundle: Bundle) -> Any:
    """Have a model use a bundle's caches wherever `generate` is given none; it is the same model, changed in place."""

    def new_cache(self: Any, attention_mask: torch.Tensor | None = None) -> Any:
        """An empty compressed cache for one batch; `attention_mask` `[B, T]` where it is padded on the left."""
        return bundle.new_cache(attention_mask)

    model.leankv_bundle = bundle
    model.new_cache = MethodType(new_cache, model)
    make_by_default(model, bundle.new_cache)
    switch_to_codes(model)
    return model
