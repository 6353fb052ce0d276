"""The bundle: a plan with its fitted codecs, on disk, checked on load.

leankv_config.json    which codec each layer's K and V get, for which model, measured how; and the hashes
codecs.safetensors    the codecs' tensors, named `LAYER.PART.TENSOR`
README.md             the model card, for people
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from leankv.bundle_checks import Configuration, read_codec_tensors, read_config, shown
from leankv.codec_files import tensors_of
from leankv.codecs import Codec, codec_from_tensors, parse_spec
from leankv.errors import UserError
from leankv.rope import KeyRotation
from leankv.store import hash_of, hash_of_file, write_bytes, write_json, write_text

FORMAT = 3
CONFIG_FILE, CODECS_FILE, CARD_FILE = "leankv_config.json", "codecs.safetensors", "README.md"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        plan: layer -> part -> codec, on the CPU.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
        rotation: takes keys to the key space of their codecs; None for post-rope.
        config: all of `leankv_config.json`.
    """

    plan: dict[int, dict[str, Codec]]
    sinks: int
    window: int
    rotation: KeyRotation | None
    config: dict[str, Any]


def save_bundle(
    folder: Path,
    plan: Mapping[int, Mapping[str, Codec]],
    sinks: int,
    window: int,
    key_space: str,
    model: dict[str, Any],
    experiment: dict[str, Any],
    results: dict[str, Any],
    card: str,
) -> None:
    """Write a bundle; `leankv_config.json` comes last, so a bundle that has it is complete.

    Args:
        folder: where to.
        plan: layer -> part -> fitted codec.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
        key_space: `pre-rope` or `post-rope`.
        model: as `leankv.model.describe` gives it.
        experiment: the resolved experiment.
        results: the run's summary.
        card: text of README.md.
    """
    tensors = {
        f"{layer}.{part}.{name}": tensor
        for layer, codecs in plan.items()
        for part, codec in codecs.items()
        for name, tensor in tensors_of(codec).items()
    }
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_bytes(folder / CODECS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_text(folder / CARD_FILE, card)
    config = {
        "format": FORMAT,
        "model": model,
        "plan": {
            str(layer): {
                part: {
                    "spec": codec.spec,
                    "width": codec.width,
                    "revisions": parse_spec(codec.spec).revisions(),
                }
                for part, codec in codecs.items()
            }
            for layer, codecs in plan.items()
        },
        "sinks": sinks,
        "window": window,
        "key_space": key_space,
        "files": {CODECS_FILE: hash_of_file(folder / CODECS_FILE)},
        "experiment": experiment,
        "results": results,
    }
    write_json(folder / CONFIG_FILE, {**config, "checksum": hash_of(config)})


def read_bundle_config(folder: Path) -> dict[str, Any]:
    """`leankv_config.json` of a bundle, checked against its own checksum and for sense.

    Raises:
        UserError: it is missing, changed, of a format that this version does not read, or asks for what cannot be.
    """
    if not folder.is_dir():
        raise UserError(f"the bundle {folder} does not exist; check --bundle")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle: it has no {CONFIG_FILE}; `leankv select` writes one")
    config = read_config(path)
    if config.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {shown(config.get('format'))}, this version reads {FORMAT}; make the bundle again, or "
            "use the version of leankv that made it"
        )
    Configuration(path, config).check(CODECS_FILE)
    return config


def load_bundle(folder: Path, model: Any) -> Bundle:
    """Load a bundle for a transformers model.

    Raises:
        UserError: a file is missing, changed or not what a bundle can be, or the bundle was made for another model.
    """
    from leankv.fingerprint import fingerprint
    from leankv.model import find_geometry

    config = read_bundle_config(folder)
    path = folder / CODECS_FILE
    if not path.is_file():
        raise UserError(f"the bundle {folder} lacks {CODECS_FILE}; copy it whole")
    if hash_of_file(path) != config["files"][CODECS_FILE]:
        raise UserError(f"{path} was changed since the bundle was written (its sha256 differs); make or copy it again")
    made_for = config["model"]
    configuration = Configuration(folder / CONFIG_FILE, config)
    widths = configuration.widths
    geometry = find_geometry(model)
    if [layer.width for layer in geometry.layers] != widths:
        raise UserError(
            f"the bundle {folder} was made for {made_for['name']} ({len(widths)} layers of width {widths[0]}), but "
            f"this model has {len(geometry.layers)} layers of width {geometry.width}; load the one it was made for"
        )
    if fingerprint(model) != made_for["fingerprint"]:
        raise UserError(
            f"the bundle {folder} was made for {made_for['name']} with other weights than this model's (its "
            "fingerprint differs; a quantized model differs from the unquantized one); load the model it was made for"
        )
    codecs = configuration.codecs()
    plan: dict[int, dict[str, Codec]] = {}
    for (layer, part), tensors in read_codec_tensors(path, codecs).items():
        codec = codecs[layer, part]
        plan.setdefault(layer, {})[part] = codec_from_tensors(codec["spec"], codec["width"], tensors)
    rotation = KeyRotation(model) if config["key_space"] == "pre-rope" else None
    return Bundle(plan, config["sinks"], config["window"], rotation, config)
