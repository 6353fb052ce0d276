"""What a bundle must be before memory is taken for it: nothing that stands in its files is believed unseen."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch

from leankv.cache.plan import Site
from leankv.codecs.registry import known_recipe, unfitted
from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.models.geometry import LayerGeometry, Width, part_of_width
from leankv.storage.files import hash_of

MOST_BYTES = 16 * 1024**2  # assumption: of a configuration; those of 80 layers take 0.1 MB

DEEPEST = 32  # assumption: lists and tables in each other; bundles have 6

LARGEST = 2**31 - 1  # assumption: of any count of tokens, heads or layers

SHOWN = 60  # characters of a value that a sentence shows

FOUND_KEY_SPACES = ("post-rope", "pre-rope")  # `auto` is one of them once a model was seen

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})

OTHERS = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
"""Kinds of tensors that codecs have, as safetensors names them."""


def read_config(path: Path) -> dict[str, Any]:
    """A bundle's configuration, whose checksum agrees, without the checksum.

    Raises:
        UserError: it is too large, is not JSON of finite numbers, is nested too deep, or was changed.
    """
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES} bytes, so it is no bundle's; make the bundle again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is not valid JSON ({reason}); make the bundle again") from error
    if _deeper_than(config, DEEPEST):
        raise UserError(f"{path} is nested more than {DEEPEST} deep, so it is no bundle's; make the bundle again")
    try:
        whole = isinstance(config, dict) and config.pop("checksum", None) == hash_of(config)
    except ValueError as error:  # 1e999 is read as infinity
        raise UserError(f"{path} has a number that is not finite; make the bundle again") from error
    if not whole:
        raise UserError(f"{path} was changed since it was written (its checksum differs); make the bundle again")
    assert isinstance(config, dict)
    return config


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether lists and tables stand in each other more than `depth` deep."""
    level = [value]
    for _ in range(depth + 1):
        inner = [own.values() if isinstance(own, dict) else own for own in level if isinstance(own, dict | list)]
        level = [each for own in inner for each in own]
    return bool(level)


class Configuration:
    """Reads a configuration's entries, each of the kind that it must be.

    Args:
        path: its file, for the sentences.
        config: as `read_config` gives it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        self.path = path
        self.config = config

    def check(self, codecs_file: str) -> None:
        """Everything that can be told without the model.

        Raises:
            UserError: an entry is missing, of the wrong type or out of range; names it.
        """
        for key in ("model", "plan", "files", "experiment", "results"):
            self._entry(self.config, key, dict, "a table")
        model = self.config["model"]
        for key in ("name", "fingerprint"):
            self._entry(model, key, str, "a line of text", "model.")
        if not self._entry(model, "layers", list, "a list", "model."):
            raise self._refusal("model.layers", [], "a list of layers")
        for number, layer in enumerate(model["layers"]):
            where = f"model.layers[{number}]"
            if not isinstance(layer, dict):
                raise self._refusal(where, layer, "a table")
            for key in ("kv_heads", "head_dim", *({"v_head_dim"} & layer.keys())):
                self._whole(layer, key, f"{where}.", least=1)
        for key in ("sinks", "window"):
            self._whole(self.config, key)
        if self._entry(self.config, "key_space", str, "a line of text") not in FOUND_KEY_SPACES:
            raise self._refusal("key_space", self.config["key_space"], " or ".join(FOUND_KEY_SPACES))
        self._entry(self.config["files"], codecs_file, str, "a line of text", "files.")
        self._check_plan()

    @property
    def widths(self) -> list[Width]:
        """Of the layers of the model that it was made for."""
        return [
            LayerGeometry(layer["kv_heads"], layer["head_dim"], None, layer.get("v_head_dim")).width
            for layer in self.config["model"]["layers"]
        ]

    def codecs(self) -> dict[Site, Mapping[str, Any]]:
        """Each codec's `spec` and `width`, by layer and part."""
        plan = self.config["plan"]
        return {Site(int(layer), part): codec for layer, parts in plan.items() for part, codec in parts.items()}

    def _check_plan(self) -> None:
        widths = self.widths
        for layer, parts in self.config["plan"].items():
            if re.fullmatch(r"0|[1-9][0-9]{0,8}", layer) is None or int(layer) >= len(widths):
                raise self._refusal("plan: layer", layer, f"a layer from 0 to {len(widths) - 1}")
            if not isinstance(parts, dict):
                raise self._refusal(f"plan: layer {layer}", parts, "a table of parts")
            for part, codec in parts.items():
                where = f"plan: layer {layer}, part"
                if part not in PARTS:
                    raise self._refusal(where, part, " or ".join(PARTS))
                if not isinstance(codec, dict):
                    raise self._refusal(f"{where} {part}", codec, "a table of spec and width")
                self._entry(codec, "spec", str, "a line of text", f"{where} {part}: ")
                self._whole(codec, "width", f"{where} {part}: ")
                self._entry(codec, "revisions", dict, "a table of families and revisions", f"{where} {part}: ")
                width = part_of_width(widths[int(layer)], part)
                if codec["width"] != width:
                    raise self._refusal(f"{where} {part}: width", codec["width"], f"the model's {width}")

    def _entry(self, table: Mapping[str, Any], key: str, kind: type, words: str, where: str = "") -> Any:
        if key not in table:
            raise UserError(f"{self.path} lacks {where}{key}; make the bundle again")
        if not isinstance(table[key], kind) or (kind is str and not table[key].isprintable()):
            raise self._refusal(f"{where}{key}", table[key], words)
        return table[key]

    def _whole(self, table: Mapping[str, Any], key: str, where: str = "", least: int = 0) -> None:
        words = f"a whole number from {least} to {LARGEST}"
        value = self._entry(table, key, int, words, where)
        if isinstance(value, bool) or not least <= value <= LARGEST:
            raise self._refusal(f"{where}{key}", value, words)

    def _refusal(self, name: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{self.path}: {name} is {shown(value)}, not {wanted}; make the bundle again")


def read_codec_tensors(path: Path, codecs: Mapping[Site, Mapping[str, Any]]) -> dict[Site, dict[str, torch.Tensor]]:
    """The tensors of every codec, read only when the file's header has all that the recipes ask for, and no more.

    Args:
        path: a safetensors file of tensors named `LAYER.PART.TENSOR`.
        codecs: as `Configuration.codecs` gives them.

    Raises:
        UserError: a recipe is not understood or does not suit its width; the file is damaged; a tensor is missing, left
            over, of another shape or kind, or not finite. Names it.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            wanted = {site: _unfitted_tensors(path, site, codec, found) for site, codec in codecs.items()}
            names = {f"{layer}.{part}.{name}": t for (layer, part), own in wanted.items() for name, t in own.items()}
            _check_revisions(path, codecs)  # first: what another revision kept may have other names
            _check_header(path, names, found)
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); make or copy the bundle again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} has numbers that are not finite; make the bundle again")
    return {site: {name: tensors[f"{site.layer}.{site.part}.{name}"] for name in own} for site, own in wanted.items()}


def _unfitted_tensors(
    path: Path, site: Site, codec: Mapping[str, Any], found: Mapping[str, Any]
) -> Mapping[str, torch.Tensor]:
    """Names, shapes and kinds of the tensors that a codec must have, on the `meta` device; `found` is the header."""
    layer, part = site
    own = f"{layer}.{part}."
    shapes = {name.removeprefix(own): found[name].get_shape() for name in found if name.startswith(own)}
    try:
        tensors: Mapping[str, torch.Tensor] = unfitted(known_recipe(codec["spec"]), codec["width"], shapes).state_dict()
    except ValueError as error:
        way_out = ""
        if isinstance(error, UserError):  # of the recipe's text
            way_out = "; a family of your own is known after --register module:Recipe, or leankv.register"
        raise UserError(
            f"the plan of {path.parent} has for {part} of layer {layer} what cannot be: {error}{way_out}"
        ) from error
    return tensors


def _check_revisions(path: Path, codecs: Mapping[Site, Mapping[str, Any]]) -> None:
    for (layer, part), codec in codecs.items():
        revisions = known_recipe(codec["spec"]).revisions()
        if codec["revisions"] != revisions:
            raise UserError(
                f"the {part} codec of layer {layer} in {path} was fitted as revision {shown(codec['revisions'])}, and "
                f"this version decodes {shown(revisions)}; make the bundle again"
            )


def _check_header(path: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, Any]) -> None:
    def refusal(words: str) -> UserError:
        return UserError(f"{path} does not fit the plan: {words}; make the bundle again")

    if missing := sorted(set(wanted) - set(found)):
        raise refusal(f"{missing[0]} is missing")
    if extra := sorted(set(found) - set(wanted)):
        raise refusal(f"{shown(extra[0])} belongs to no codec")
    for name, like in wanted.items():
        shape: Sequence[int] = found[name].get_shape()
        if list(shape) != list(like.shape):
            raise refusal(f"{name} has shape {list(shape)}, not {list(like.shape)}")
        kind = found[name].get_dtype()
        if not (kind in FLOATS if like.is_floating_point() else OTHERS.get(kind) == like.dtype):
            raise refusal(f"{name} is of kind {kind}, not {str(like.dtype).removeprefix('torch.')}")


def shown(value: Any) -> str:
    """A value as a sentence shows it: on one line, and not for long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
