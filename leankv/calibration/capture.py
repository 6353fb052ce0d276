"""Capturing: the model runs once over the calibration text, and what its cache would hold is kept."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from leankv.cache.plan import Site
from leankv.calibration.activations import ActivationsInMemory, LayerWriter, StoredActivations, layer_file
from leankv.config.plan_table import PARTS
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.models.loading import LoadedModel
from leankv.models.observers import RecordingCache
from leankv.models.rope import KeyRotation
from leankv.progress import Progress
from leankv.storage.files import cannot_write, usable_bytes, write_json

CAPTURE_REVISION = 1
"""Raised when the vectors captured of one text change: a capture that was kept may be older than the code. What is
fitted to them changes too, so FITTING_REVISION is raised with it."""


def groups_that_fit(loaded: LoadedModel, blocks: Blocks, layers: Sequence[int], folder: Path) -> list[list[int]]:
    """Cut layers into groups whose activations the disk under `folder` holds, a capture pass each; one where it can."""
    left = usable = usable_bytes(folder)
    groups: list[list[int]] = [[]]
    for layer in layers:
        numbers = blocks.tokens.numel() * sum(map(loaded.geometry.layers[layer].width_of, PARTS))
        size = numbers * loaded.model.dtype.itemsize
        if groups[-1] and size > left:
            groups.append([])
            left = usable
        groups[-1].append(layer)
        left -= size
    return groups


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
) -> StoredActivations:
    """Run blocks through the model once and write what its cache would hold.

    Args:
        loaded: the model.
        blocks: calibration text.
        folder: is made anew.
        layers: whose keys and values to write.
        batch_size: blocks in a forward pass.
        depends_on: goes to the manifest.
        progress: shows the pass.
        rotation: given, keys are written pre-RoPE.

    Raises:
        UserError: a key or value is not finite (names layer and part), or the folder cannot be written.
    """
    started = time.monotonic()
    n_blocks, block_length = blocks.tokens.shape
    dtype = loaded.model.dtype
    writers: dict[int, LayerWriter] = {}
    try:
        if folder.exists():
            # An unfinished capture, or one of other layers; what is left of a stopped removal is none.
            (folder / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for layer in layers:
            widths: dict[str, int] = {part: loaded.geometry.layers[layer].width_of(part) for part in PARTS}
            writers[layer] = LayerWriter(layer_file(folder, layer), n_blocks * block_length, widths, dtype)

        def write(layer: int, part: str, rows: torch.Tensor) -> None:
            writers[layer].write(part, rows)

        _observe(loaded, blocks, layers, batch_size, progress, rotation, write)
    except OSError as error:
        for writer in writers.values():
            writer.file.close()
        shutil.rmtree(folder, ignore_errors=True)  # so that there is space for what is written next
        raise cannot_write(folder, error) from error
    finally:
        for writer in writers.values():
            writer.file.close()
    about = _about(loaded, blocks, layers, time.monotonic() - started)
    write_json(folder / "manifest.json", {**about, "depends_on": depends_on})
    return StoredActivations(folder)


@torch.no_grad()
def vectors_in_memory(
    loaded: LoadedModel,
    blocks: Blocks,
    layers: Sequence[int],
    batch_size: int,
    progress: Progress,
    rotation: KeyRotation | None = None,
) -> ActivationsInMemory:
    """As `capture`, with nothing written.

    Raises:
        UserError: a key or value is not finite (names layer and part).
    """
    started = time.monotonic()
    tokens = blocks.tokens.numel()
    vectors = {
        Site(layer, part): torch.empty(tokens, loaded.geometry.layers[layer].width_of(part), dtype=loaded.model.dtype)
        for layer in layers
        for part in PARTS
    }
    filled = dict.fromkeys(vectors, 0)

    def keep(layer: int, part: str, rows: torch.Tensor) -> None:
        site = Site(layer, part)
        vectors[site][filled[site] : filled[site] + len(rows)] = rows
        filled[site] += len(rows)

    _observe(loaded, blocks, layers, batch_size, progress, rotation, keep)
    return ActivationsInMemory(_about(loaded, blocks, layers, time.monotonic() - started), vectors)


def _observe(
    loaded: LoadedModel,
    blocks: Blocks,
    layers: Sequence[int],
    batch_size: int,
    progress: Progress,
    rotation: KeyRotation | None,
    take: Callable[[int, str, torch.Tensor], None],
) -> None:
    """Run blocks through the model; `take` gets layer, part and rows `[N, W]` on the CPU, in the order of the text."""
    wanted = set(layers)
    positions = torch.arange(blocks.tokens.shape[1])[None]

    def record(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer not in wanted:
            return
        if rotation is not None:
            k = rotation.remove(layer, k, positions).to(loaded.model.dtype)
        for part, states in zip(PARTS, (k, v), strict=True):
            if not torch.isfinite(states).all():
                name = {"k": "keys", "v": "values"}[part]
                raise UserError(
                    f"the {name} of layer {layer} are not finite in the calibration text (part {part}); "
                    "try --dtype float32, or check the model's weights"
                )
            take(layer, part, states.transpose(1, 2).flatten(2).flatten(0, 1).cpu())

    body = loaded.model.base_model  # the head's logits are not needed
    with progress.stage(f"capturing {len(layers)} layers", len(blocks)) as step:
        for tokens in blocks.tokens.split(batch_size):
            body(
                input_ids=tokens.to(loaded.model.device),
                past_key_values=RecordingCache(loaded.model.config, record),
                use_cache=True,
            )
            for _ in tokens:
                step()


def _about(loaded: LoadedModel, blocks: Blocks, layers: Sequence[int], seconds: float) -> dict[str, Any]:
    """What a manifest says of a capture."""
    n_blocks, block_length = blocks.tokens.shape
    return {
        "layers": list(layers),
        "widths": [loaded.geometry.layers[layer].width for layer in layers],
        "parts": list(PARTS),
        "blocks": n_blocks,
        "block_length": block_length,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seconds": seconds,
    }
