"""Loading models and their tokenizers.

`from_pretrained` is called nowhere else. What LeanKV cannot work with is refused here, by name.
"""

import contextlib
import io
import logging
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from leankv.compiled import compiler
from leankv.config.experiment import ModelConfig
from leankv.errors import UserError
from leankv.models import embedded, half_precision
from leankv.models.fingerprint import fingerprint
from leankv.models.geometry import Geometry, LayerGeometry, find_geometry

ADAPTER = "adapter_config.json"
"""In the folder of a PEFT adapter, which names the base model that it belongs to."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode with all that LeanKV needs to know of it.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        name: as asked for.
        geometry: its cache's geometry, as seen in a forward pass.
        fingerprint: see `leankv.models.fingerprint`. The same for one bfloat16 checkpoint loaded in bfloat16 or
            float32, offloaded or not; another for its NF4 quantization.
        numerics: what else its numbers depend on: dtype, device type, library versions.
    """

    model: Any
    tokenizer: Any
    name: str
    geometry: Geometry
    fingerprint: str
    numerics: dict[str, str]


def refuse_training(model: Any) -> None:
    """Refuse a model in training mode.

    Raises:
        UserError: it is.
    """
    if model.training:
        raise UserError(
            "the model is in training mode, where dropout and gradient checkpointing change what it caches; call "
            "model.eval() first"
        )


def look_at(model: Any, tokenizer: Any, name: str | None = None) -> LoadedModel:
    """A model that is loaded already, with all that LeanKV needs to know of it; its weights are hashed.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        name: what results call it; unless given, as its configuration names it.

    Raises:
        UserError: it is in training mode, or has no cache that LeanKV can compress.
    """
    refuse_training(model)
    known_as = name or getattr(model.config, "_name_or_path", "") or model.config.model_type
    return LoadedModel(model, tokenizer, known_as, find_geometry(model), fingerprint(model), numerics(model))


def load_model(config: ModelConfig) -> LoadedModel:
    """Load a model and its tokenizer, and look at its cache.

    Raises:
        UserError: it is unknown, incomplete or corrupt, lacks a package, or has no cache that LeanKV can compress.
    """
    model, tokenizer = _load(config)
    model.eval()
    return look_at(model, tokenizer, config.name)


def numerics(model: Any) -> dict[str, str]:
    """What a measured number depends on besides the weights: dtype, device type, attention, versions."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(model.config._attn_implementation),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compiler": compiler(),
    }


def _load(config: ModelConfig) -> tuple[Any, Any]:
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for library in ("accelerate", "huggingface_hub"):  # what goes wrong is said in one sentence, below
        logging.getLogger(library).setLevel(logging.ERROR)

    source, gguf_file = _locate(config.name)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if gguf_file is not None:
        if find_spec("gguf") is None:
            raise UserError(f"{config.name} is a GGUF file, which needs gguf; run: pip install 'leankv[gguf]'")
        if config.load_in_4bit:
            raise UserError(f"{config.name} is a GGUF file and cannot be loaded in NF4; leave --load-in-4bit out")
        common["gguf_file"] = gguf_file
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    kept = embedded.kept_folder(dtype) if config.name == embedded.NAME and config.device_map is None else None
    if kept is not None and kept.is_dir():
        source = str(kept)
        del common["gguf_file"]
    weights: dict[str, Any] = {"dtype": dtype, **common}
    multiplied = isinstance(dtype, str) or device.type != "cpu" or half_precision.multiplies(dtype)
    if config.load_in_4bit:
        weights["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_products_of_nf4(dtype, multiplied),
        )
        weights["device_map"] = config.device_map or {"": device}
    elif "gguf_file" in common:
        # Ordinary Linear layers, whether or not packed GGUF kernels happen to be installed.
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if config.device_map is not None:
        weights["device_map"] = config.device_map
    # The GGUF reader draws its bar on standard error whether or not that is a terminal.
    quiet = contextlib.redirect_stderr(io.StringIO()) if not sys.stderr.isatty() else contextlib.nullcontext()
    try:
        with quiet:
            loading = transformers.AutoModelForCausalLM.from_pretrained
            model, info = loading(source, output_loading_info=True, **weights)
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_of(source, model), **common)
        if "device_map" not in weights:
            model.to(device)
        if not multiplied:
            half_precision.multiply_in_float32(model)
    except Exception as error:  # every library under `from_pretrained` raises types of its own
        raise UserError(_why_not_loaded(config, error, Path(source))) from error
    if gguf_file is not None:
        model.config.name_or_path = config.name  # a bundle made of it says where to get it from, not in which folder
    if absent := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise UserError(
            f"the model {config.name} lacks {len(absent)} of its weights ({absent[0]} first), which would be random; "
            "get its files again"
        )
    if kept is not None and not kept.is_dir():
        embedded.keep(model, tokenizer, kept)
    return model, tokenizer


def _locate(name: str) -> tuple[str, str | None]:
    """Where `from_pretrained` finds a model: folder or hub id, and the GGUF file in it if it is one."""
    if name == embedded.NAME:
        return str(embedded.package_folder()), embedded.FILE
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"the GGUF file {name} does not exist; check --model")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / ADAPTER).is_file() and find_spec("peft") is None:
            raise UserError(f"the folder {name} holds an adapter, which needs peft; run: pip install 'leankv[peft]'")
        if not (path / "config.json").is_file() and not (path / ADAPTER).is_file():
            raise UserError(f"the folder {name} has no config.json, so it holds no model; check --model")
        return name, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"the model folder {name} does not exist; check --model")
    return name, None


def _tokenizer_of(source: str, model: Any) -> str:
    """Where a model's tokenizer lies: an adapter's folder often has none, and its base has."""
    folder = Path(source)
    is_adapter = (folder / ADAPTER).is_file() and not (folder / "tokenizer_config.json").is_file()
    return str(model.config.name_or_path) if is_adapter else source


def _why_not_loaded(config: ModelConfig, error: Exception, source: Path) -> str:
    """One sentence for whatever `from_pretrained` raised, given what it was to load."""
    reason = str(error).strip().split("\n")[0][:200]
    path = Path(config.name)
    if "trust_remote_code" in str(error) and not config.trust_remote_code:
        return f"the model {config.name} comes with code of its own, which runs with --trust-remote-code only"
    if path.exists() or config.name == embedded.NAME:
        return (
            f"the model in {source} could not be loaded ({type(error).__name__}: {reason}); its files may be "
            "damaged or incomplete, or --device, --device-map or --dtype does not suit it"
        )
    return (
        f"the model {config.name!r} is not a folder here and could not be had from the hub ({type(error).__name__}: "
        f"{reason}); check the name, --revision, your access rights and the network"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a device; write auto, cpu, cuda or cuda:1") from error
    if device.type == "meta":
        raise UserError("--device meta holds no weights; write auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if device.type == "cpu" else "auto"


def _products_of_nf4(dtype: torch.dtype | str, multiplied: bool) -> torch.dtype:
    if not multiplied:
        return torch.float32
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """What results say of the model that made them."""
    return {
        "name": loaded.name,
        "model_type": loaded.model.config.model_type,
        "fingerprint": loaded.fingerprint,
        **loaded.numerics,
        "layers": [_described(layer) for layer in loaded.geometry.layers],
    }


def _described(layer: LayerGeometry) -> dict[str, int | None]:
    """One layer's geometry as bundles have it: the sliding window is `window` there, and `v_head_dim` stands only where
    the values have one of their own."""
    described = {"kv_heads": layer.kv_heads, "head_dim": layer.head_dim, "window": layer.sliding_window}
    return described if layer.v_head_dim is None else {**described, "v_head_dim": layer.v_head_dim}
