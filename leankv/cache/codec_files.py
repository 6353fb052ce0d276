"""Fitted codecs on disk: one safetensors file each, with what is known of the codec in its header."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch

from leankv.codecs import Codec, codec_from_tensors
from leankv.errors import UserError
from leankv.storage.files import write_bytes


def tensors_of(codec: Codec) -> dict[str, torch.Tensor]:
    """Parameters and statistics of a codec as they are saved: contiguous, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in codec.state_dict().items()}


def save_codec(path: Path, codec: Codec, about: dict[str, str]) -> None:
    """Write a codec, and strings about it, atomically."""
    metadata = {"spec": codec.recipe.text, "width": str(codec.width), **about}
    write_bytes(path, safetensors.torch.save(tensors_of(codec), metadata=metadata))


def load_codec(path: Path) -> tuple[Codec, dict[str, str]]:
    """A codec and what is said about it in its header.

    Raises:
        UserError: the file is damaged, or its family is not known here.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return codec_from_tensors(about["spec"], int(about["width"]), tensors), about
    except UserError as error:
        raise UserError(f"the codec file {path} cannot be read: {error}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"the codec file {path} is damaged ({error}); delete it and run again") from error
