"""The bundle: a plan with its fitted codecs, on disk, checked on load.

leankv_config.json    which codec each layer's K and V get, for which model, measured how; and the hashes
codecs.safetensors    the codecs' tensors, named `LAYER.PART.TENSOR`
README.md             the model card, for people
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Int

from leankv.cache.bundle_checks import Configuration, read_codec_tensors, read_config, shown
from leankv.cache.codec_files import tensors_of
from leankv.cache.lean_cache import ENCODE_EVERY, LeanCache, Origin
from leankv.cache.plan import Plan, PlanSpec
from leankv.cache.plan_checksum import checksum_of
from leankv.codecs.registry import codec_from_tensors
from leankv.errors import UserError
from leankv.models.fingerprint import fingerprint
from leankv.models.geometry import find_geometry
from leankv.models.rope import KeyRotation
from leankv.storage.files import hash_of, hash_of_file, json_bytes, write_together

FORMAT = 3

CONFIG_FILE, CODECS_FILE, CARD_FILE = "leankv_config.json", "codecs.safetensors", "README.md"


@dataclass(frozen=True)
class Bundle:
    """A fitted plan with all that a cache of it needs, in memory.

    Attributes:
        plan: site -> codec.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
        rotation: takes keys to the key space of their codecs; None for post-rope.
        config: the transformers configuration of the model that it was made for.
        made_for: what is known of that model, as `leankv.models.loading.describe` gives it.
        experiment: the settings that it was made with.
        results: what was measured of it; empty where nothing was.
    """

    plan: Plan
    sinks: int
    window: int
    rotation: KeyRotation | None
    config: Any = field(repr=False)
    made_for: Mapping[str, Any] = field(repr=False)
    experiment: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, Any] = field(repr=False)

    @property
    def spec(self) -> PlanSpec:
        """Its plan as recipes."""
        return PlanSpec().with_sites({site: codec.recipe for site, codec in self.plan.items()})

    @property
    def key_space(self) -> str:
        """`pre-rope` or `post-rope`."""
        return "post-rope" if self.rotation is None else "pre-rope"

    @cached_property
    def checksum(self) -> str:
        """Of its codecs and their key space, as saved caches name them; hashed once."""
        return checksum_of(self.plan, self.key_space)

    def new_cache(
        self,
        attention_mask: torch.Tensor | None = None,
        sinks: int | None = None,
        window: int | None = None,
        decode_once: bool = False,
        encode_every: int = ENCODE_EVERY,
        padding: Int[torch.Tensor, " batch"] | None = None,
    ) -> LeanCache:
        """An empty cache for one batch of sequences: `model.generate(**inputs, past_key_values=bundle.new_cache())`.

        Args:
            attention_mask: `[B, T]` of the prompt where it is padded on the left.
            sinks: in place of the bundle's.
            window: in place of the bundle's.
            decode_once: for measuring, which is faster then; such a cache saves no memory.
            encode_every: tokens that left the window are encoded once there are so many; 1 to measure.
            padding: left padding of each row, in place of the mask.
        """
        return LeanCache(
            self.config,
            self.plan,
            sinks=self.sinks if sinks is None else sinks,
            window=self.window if window is None else window,
            encode_every=encode_every,
            attention_mask=attention_mask,
            padding=padding,
            rotation=self.rotation,
            origin=Origin(self.made_for["fingerprint"], lambda: self.checksum),
            decode_once=decode_once,
        )

    def save(self, folder: str | Path, card: str | None = None) -> None:
        """Write the bundle; `leankv_config.json` comes last, so a folder that has it is complete.

        Args:
            folder: where to; a bundle that is there is replaced once the new one is written.
            card: text of README.md; a short one unless given.

        Raises:
            UserError: the folder is a file, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder for the bundle")
        tensors = {
            f"{site.layer}.{site.part}.{name}": tensor
            for site, codec in self.plan.items()
            for name, tensor in tensors_of(codec).items()
        }
        codecs = safetensors.torch.save(tensors, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "model": dict(self.made_for),
            "plan": self._written_plan(),
            "sinks": self.sinks,
            "window": self.window,
            "key_space": self.key_space,
            "files": {CODECS_FILE: hashlib.sha256(codecs).hexdigest()},
            "experiment": dict(self.experiment),
            "results": dict(self.results),
        }
        texts = {
            CONFIG_FILE: json_bytes({**config, "checksum": hash_of(config)}),
            CARD_FILE: (self._short_card() if card is None else card).encode(),
        }
        write_together({folder / name: data for name, data in {**texts, CODECS_FILE: codecs}.items()})

    def _written_plan(self) -> dict[str, dict[str, Any]]:
        """layer -> part -> spec, width and revisions, as the configuration has it."""
        written: dict[str, dict[str, Any]] = {}
        for site, codec in self.plan.items():
            entry = {"spec": codec.recipe.text, "width": codec.width, "revisions": codec.recipe.revisions()}
            written.setdefault(str(site.layer), {})[site.part] = entry
        return written

    def _short_card(self) -> str:
        measured = f"What was measured of it stands in `{CONFIG_FILE}`" if self.results else "Nothing was measured yet"
        return f"""---
library_name: leankv
tags:
- kv-cache
- compression
---

# A compressed KV cache for {self.made_for["name"]}

Codecs: {self.spec}. The first {self.sinks} and the latest {self.window} tokens are kept exact; key space
{self.key_space}. {measured}; `leankv eval-ppl --bundle FOLDER --model MODEL --dataset TEXT` measures it.

```python
import leankv

out = model.generate(**inputs, past_key_values=leankv.load("FOLDER", model).new_cache())
```
"""


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


def load_bundle(folder: str | Path, model: Any) -> Bundle:
    """Load a bundle for a transformers model. The model's weights are looked at once, here.

    Raises:
        UserError: a file is missing, changed or not what a bundle can be, or the bundle was made for another model.
    """
    bundle = read_bundle(folder, model)
    if fingerprint(model) != bundle.made_for["fingerprint"]:
        raise UserError(
            f"the bundle {folder} was made for {bundle.made_for['name']} with other weights than this model's (its "
            "fingerprint differs; a quantized model differs from the unquantized one); load the model it was made for"
        )
    return bundle


def read_bundle(folder: str | Path, model: Any) -> Bundle:
    """As `load_bundle`, for a model of the right layers and widths whose weights are not looked at.

    Raises:
        UserError: as there.
    """
    folder = Path(folder)
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
    codecs = configuration.codecs()
    tensors = read_codec_tensors(path, codecs)
    plan = {site: codec_from_tensors(codecs[site]["spec"], codecs[site]["width"], own) for site, own in tensors.items()}
    rotation = KeyRotation(model) if config["key_space"] == "pre-rope" else None
    kept = config["sinks"], config["window"]
    return Bundle(plan, *kept, rotation, model.config, made_for, config["experiment"], config["results"])
