"""Captured activations: the keys and values of every token in chosen layers, on disk or in memory.

On disk they are one safetensors file a layer, with `k` and `v` `[tokens, W]` in the model's dtype; `manifest.json` is
written last, so its presence means that the capture is complete.
"""

import json
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float
from safetensors import safe_open

from leankv.cache.plan import Site
from leankv.config.plan_table import PARTS
from leankv.models.geometry import part_of_width
from leankv.storage.files import read_json

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Activations(ABC):
    """A finished capture."""

    @property
    @abstractmethod
    def manifest(self) -> Mapping[str, Any]:
        """`layers`, `widths`, `parts`, `blocks`, `block_length`, `dtype`, `seconds`, and what it all depends on.

        `widths` has a `leankv.models.geometry.Width` for each of `layers`.
        """

    @abstractmethod
    def read(self, layer: int, part: str) -> Float[torch.Tensor, "tokens W"]:
        """One layer's keys or values, block after block, in the model's dtype."""

    def widths(self) -> dict[Site, int]:
        """Site -> W."""
        widths = zip(self.manifest["layers"], self.manifest["widths"], strict=True)
        return {Site(layer, part): part_of_width(width, part) for layer, width in widths for part in PARTS}


@dataclass(frozen=True)
class StoredActivations(Activations):
    """A finished capture in a folder."""

    folder: Path

    @property
    def manifest(self) -> Mapping[str, Any]:
        """As it was written."""
        manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        return manifest

    def read(self, layer: int, part: str) -> Float[torch.Tensor, "tokens W"]:
        """From the layer's file."""
        with safe_open(layer_file(self.folder, layer), framework="pt") as file:
            return file.get_tensor(part)

    def delete(self) -> None:
        """Remove the folder, its manifest first: what is left of a stopped removal is no capture."""
        (self.folder / "manifest.json").unlink()
        shutil.rmtree(self.folder)


class ActivationsInMemory(Activations):
    """A capture in memory, filled by whoever runs the model."""

    def __init__(self, manifest: Mapping[str, Any], vectors: Mapping[Site, torch.Tensor]):
        """
        Args:
            manifest: what is to be said of them.
            vectors: site -> `[tokens, W]`.
        """
        self._manifest, self._vectors = manifest, vectors

    @property
    def manifest(self) -> Mapping[str, Any]:
        """As it was given."""
        return self._manifest

    def read(self, layer: int, part: str) -> Float[torch.Tensor, "tokens W"]:
        """The tensor itself, no copy."""
        return self._vectors[Site(layer, part)]


def find_activations(folder: Path) -> StoredActivations | None:
    """The finished capture in `folder`, if there is one."""
    return StoredActivations(folder) if (folder / "manifest.json").is_file() else None


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


class LayerWriter:
    """A safetensors file with `k` and `v` `[tokens, W]` that is filled as rows come.

    The format (a length, a JSON header, then the tensors' bytes) is written by hand because the library can only save
    tensors that are whole in memory.
    """

    file: BinaryIO

    def __init__(self, path: Path, tokens: int, widths: Mapping[str, int], dtype: torch.dtype):
        header: dict[str, Any] = {}
        begin = 0
        for part in PARTS:
            end = begin + tokens * widths[part] * dtype.itemsize
            header[part] = {
                "dtype": SAFETENSORS_DTYPES[dtype],
                "shape": [tokens, widths[part]],
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        first = path.stat().st_size
        self.file = path.open("r+b", buffering=0)
        self.at: dict[str, int] = {part: first + header[part]["data_offsets"][0] for part in PARTS}

    def write(self, part: str, rows: Float[torch.Tensor, "tokens W"]) -> None:
        """Append some tokens' vectors (CPU)."""
        data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
        self.file.seek(self.at[part])
        written = 0
        while written < len(data):  # an unbuffered file may take less than it is given
            written += self.file.write(data[written:])
        self.at[part] += len(data)
