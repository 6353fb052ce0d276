"""Capturing: the keys and values of every token in chosen layers, streamed to a folder.

One safetensors file a layer, with `k` and `v` `[tokens, W]` in the model's dtype; `manifest.json` is written last, so
its presence means that the capture is complete. Only one batch of blocks is in memory at a time.
"""

import json
import shutil
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from leankv.data import Blocks
from leankv.errors import UserError
from leankv.experiment import PARTS
from leankv.model import LoadedModel
from leankv.observers import RecordingCache
from leankv.progress import Progress
from leankv.rope import KeyRotation
from leankv.store import cannot_write, read_json, write_json

CAPTURE_REVISION = 1
"""Raised when the vectors captured of one text change: a capture that was kept may be older than the code."""
DISK_SHARE = 0.9  # of what is free; the rest is for results, and for others
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Activations:
    """A finished capture in a folder."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """`layers`, `widths`, `parts`, `blocks`, `block_length`, `dtype`, `seconds`, and what it all depends on."""
        manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        return manifest

    def read(self, layer: int, part: str) -> torch.Tensor:
        """One layer's keys or values, `[tokens, W]`, block after block."""
        with safe_open(_file(self.folder, layer), framework="pt") as file:
            return file.get_tensor(part)

    def delete(self) -> None:
        """Remove the folder, its manifest first: what is left of a stopped removal is no capture."""
        (self.folder / "manifest.json").unlink()
        shutil.rmtree(self.folder)


def groups_that_fit(loaded: LoadedModel, blocks: Blocks, layers: Sequence[int], folder: Path) -> list[list[int]]:
    """Cut layers into groups whose activations the disk under `folder` holds, a capture pass each; one where it can."""
    left = room = DISK_SHARE * shutil.disk_usage(folder).free
    groups: list[list[int]] = [[]]
    for layer in layers:
        vectors = len(PARTS) * blocks.tokens.numel()
        size = vectors * loaded.geometry.layers[layer].width * loaded.model.dtype.itemsize
        if groups[-1] and size > left:
            groups.append([])
            left = room
        groups[-1].append(layer)
        left -= size
    return groups


def find_activations(folder: Path) -> Activations | None:
    """The finished capture in `folder`, if there is one."""
    return Activations(folder) if (folder / "manifest.json").is_file() else None


@torch.no_grad()
def capture(
    loaded: LoadedModel,
    blocks: Blocks,
    folder: Path,
    layers: Sequence[int],
    batch_size: int,
    depends_on: dict[str, Any],
    progress: Progress,
    rotation: KeyRotation | None = None,
) -> Activations:
    """Run `blocks` through the model once and write what its cache would hold; with `rotation`, keys un-rotated.

    Raises:
        UserError: a key or value is not finite (names layer and part), or the folder cannot be written.
    """
    started = time.monotonic()
    wanted = set(layers)
    dtype = loaded.model.dtype
    n_blocks, block_length = blocks.tokens.shape
    positions = torch.arange(block_length)[None]

    def record(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer not in wanted:
            return
        if rotation is not None:
            k = rotation.remove(layer, k, positions).to(dtype)
        for part, states in zip(PARTS, (k, v), strict=True):
            if not torch.isfinite(states).all():
                name = {"k": "keys", "v": "values"}[part]
                raise UserError(
                    f"the {name} of layer {layer} are not finite in the calibration text (part {part}); "
                    "try --dtype float32, or check the model's weights"
                )
            writers[layer].write(part, states.transpose(1, 2).flatten(2).flatten(0, 1).cpu())

    body = loaded.model.base_model  # the head's logits are not needed
    writers: dict[int, _LayerWriter] = {}
    try:
        if folder.exists():
            shutil.rmtree(folder)  # an unfinished capture of a run that was stopped
        folder.mkdir(parents=True)
        for layer in layers:
            width = loaded.geometry.layers[layer].width
            writers[layer] = _LayerWriter(_file(folder, layer), n_blocks * block_length, width, dtype)
        with progress.stage(f"capturing {len(layers)} layers", n_blocks) as step:
            for tokens in blocks.tokens.split(batch_size):
                body(
                    input_ids=tokens.to(loaded.model.device),
                    past_key_values=RecordingCache(loaded.model.config, record),
                    use_cache=True,
                )
                for _ in tokens:
                    step()
    except OSError as error:
        for writer in writers.values():
            writer.file.close()
        shutil.rmtree(folder, ignore_errors=True)  # so that there is room to write what comes next
        raise cannot_write(folder, error) from error
    finally:
        for writer in writers.values():
            writer.file.close()
    manifest = {
        "layers": list(layers),
        "widths": [loaded.geometry.layers[layer].width for layer in layers],
        "parts": list(PARTS),
        "blocks": n_blocks,
        "block_length": block_length,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": time.monotonic() - started,
        "depends_on": depends_on,
    }
    write_json(folder / "manifest.json", manifest)
    return Activations(folder)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


class _LayerWriter:
    """A safetensors file with `k` and `v` `[tokens, W]` that is filled as rows come.

    The format (a length, a JSON header, then the tensors' bytes) is written by hand because the library can only save
    tensors that are whole in memory.
    """

    file: BinaryIO

    def __init__(self, path: Path, tokens: int, width: int, dtype: torch.dtype):
        part_bytes = tokens * width * dtype.itemsize
        header: dict[str, Any] = {
            part: {
                "dtype": SAFETENSORS_DTYPES[dtype],
                "shape": [tokens, width],
                "data_offsets": [index * part_bytes, (index + 1) * part_bytes],
            }
            for index, part in enumerate(PARTS)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        first = path.stat().st_size
        self.file = path.open("r+b", buffering=0)
        self.at: dict[str, int] = {part: first + index * part_bytes for index, part in enumerate(PARTS)}

    def write(self, part: str, rows: torch.Tensor) -> None:
        """Append rows `[N, W]` (CPU)."""
        data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
        self.file.seek(self.at[part])
        written = 0
        while written < len(data):  # an unbuffered file may take less than it is given
            written += self.file.write(data[written:])
        self.at[part] += len(data)
