"""Writing the repository: configuration, modeling file and what travels with it, codecs, tokenizer, card, weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leankv.cache.bundle import Bundle
from leankv.codecs import Recipe
from leankv.errors import UserError
from leankv.export.card import hub_card
from leankv.export.configuration_leankv import LeanKVConfig
from leankv.export.sources import CONFIGURATION, MODELING, flat, travelling_files
from leankv.models.loading import LoadedModel
from leankv.storage.files import cannot_write, read_json, write_json, write_text
from leankv.version import __version__

CONFIG_FILE = "config.json"

MARK = ".leankv-export"
"""A file that says that a folder was written by this, and may be written again."""

OF_ONE_EXPORT = (CONFIG_FILE, "*.py", "model*.safetensors", "model.safetensors.index.json", "generation_config.json")
"""What an export need not write again: code of the families in use, and weights where they are asked for. And the
configuration, which comes last: a folder without it is no whole export."""


MERGING = (
    "merge it (peft: merge_and_unload, then save_pretrained), and fit and export a bundle of the folder that this gives"
)


def write_repository(
    folder: Path,
    bundle: Bundle,
    loaded: LoadedModel,
    *,
    with_weights: bool = False,
    license: str | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write a Hugging Face repository that loads a bundle's model with its compressed cache, without LeanKV.

    Args:
        folder: where to; a new one, or one that an export wrote.
        bundle: that was made for the model.
        loaded: the model.
        with_weights: whether its weights go into the repository, or only the name that it was loaded by.
        license: of the weights, for the card; unless given, that which the base's own card names.
        on_step: called after each part; there are `STEPS`.

    Returns:
        Names of the files.

    Raises:
        UserError: the folder holds other things, the base cannot be named, or codecs are of families outside LeanKV.
    """
    _refuse_others(folder)
    families = _families(bundle)
    base = None if with_weights else _nameable(loaded)
    if with_weights and getattr(loaded.model, "is_loaded_in_4bit", False):
        raise UserError(
            f"{loaded.name} is loaded in 4 bits, and its weights are not written so; leave --with-weights out: the "
            "repository then names its base, which loads with quantization_config"
        )
    if with_weights and type(loaded.model).__module__.startswith("transformers_modules."):
        raise UserError(
            f"{loaded.name} comes with code of its own, which would not travel with its weights; leave --with-weights "
            "out: the repository then names its base"
        )
    if with_weights and getattr(loaded.model, "_hf_peft_config_loaded", False):
        raise UserError(f"{loaded.name} is an adapter, whose weights do not load without its base's; {MERGING}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MARK, f"{__version__}\n")
        for old in (path for pattern in OF_ONE_EXPORT for path in folder.glob(pattern)):
            old.unlink()
        loaded.tokenizer.save_pretrained(folder)
        on_step()
        if with_weights:
            loaded.model.save_pretrained(folder)
        on_step()
    except OSError as error:
        raise cannot_write(folder, error) from error
    bundle.save(folder, hub_card(bundle, loaded, loaded.name if _is_on_hub(loaded) else None, license))
    for name, text in travelling_files(families).items():
        write_text(folder / name, text)
    configuration = LeanKVConfig(
        base_model=base,
        base_revision=_revision(bundle, loaded) if base else None,
        base_config=_own_config(loaded.model) if with_weights else None,
        leankv_version=__version__,
        architectures=["LeanKVForCausalLM"],
        auto_map={
            "AutoConfig": f"{flat(CONFIGURATION)}.LeanKVConfig",
            "AutoModelForCausalLM": f"{flat(MODELING)}.LeanKVForCausalLM",
        },
    )
    write_json(folder / CONFIG_FILE, configuration.to_diff_dict())
    on_step()
    return sorted(path.name for path in folder.iterdir())


STEPS = 3


def is_whole(folder: Path) -> bool:
    """Whether an export into a folder came to its end: what transformers writes beside weights names no code."""
    path = folder / CONFIG_FILE
    return (folder / MARK).is_file() and path.is_file() and "auto_map" in read_json(path)


def _refuse_others(folder: Path) -> None:
    """Raises: UserError: the folder has something in it that no export put there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder with --to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(f"{folder} holds other files already; name a new folder with --to")


def _families(bundle: Bundle) -> list[str]:
    """The codec families of a bundle; all must be LeanKV's own, whose files travel."""
    recipes = {codec.recipe for codec in bundle.plan.values()}
    found = sorted({family for recipe in recipes for family in recipe.revisions()})
    outside = [recipe.text for recipe in recipes if _is_outside(recipe)]
    if outside:
        raise UserError(
            f"the codec {min(outside)} is not of LeanKV's own families, so its code would not travel; a bundle of it "
            "stays with its module"
        )
    return found


def _is_outside(recipe: Recipe) -> bool:
    return not type(recipe).__module__.startswith("leankv.codecs.")


def _is_on_hub(loaded: LoadedModel) -> bool:
    """Whether a model was loaded by a name of the hub's."""
    return loaded.name.count("/") == 1 and not Path(loaded.name).exists()


def local_base(folder: Path) -> str | None:
    """The folder of this machine that a repository names as its base; None where its base loads anywhere."""
    base = read_json(folder / CONFIG_FILE).get("base_model")
    return base if base is not None and Path(base).is_absolute() else None


def _revision(bundle: Bundle, loaded: LoadedModel) -> str | None:
    """Of a base on the hub: the very commit that was loaded, where the hub told it; else what was asked for."""
    return getattr(loaded.model.config, "_commit_hash", None) or bundle.experiment.get("model", {}).get("revision")


def _nameable(loaded: LoadedModel) -> str:
    """What the base model is loaded by: its name on the hub, or a folder, which other machines do not have."""
    if _is_on_hub(loaded):
        return loaded.name
    if (Path(loaded.name) / CONFIG_FILE).is_file():
        return str(Path(loaded.name).resolve())
    if getattr(loaded.model, "_hf_peft_config_loaded", False):
        raise UserError(f"{loaded.name} is an adapter's folder, which a repository cannot name as its base; {MERGING}")
    raise UserError(
        f"the base model {loaded.name} is neither on the hub nor a folder that transformers loads, so a repository "
        "cannot name it; add --with-weights"
    )


def _own_config(model: Any) -> dict[str, Any]:
    """The base model's configuration, as it is read back."""
    own = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "auto_map"):
        own.pop(key, None)
    return dict(own)
