"""Codecs where they are needed: a plan's codecs stay where they are, and caches elsewhere read copies."""

import copy
from weakref import WeakKeyDictionary

import torch

from leankv.codecs import Codec

_copies: WeakKeyDictionary[Codec, dict[torch.device, Codec]] = WeakKeyDictionary()


def codec_on(codec: Codec, device: torch.device) -> Codec:
    """A codec with its tensors on a device: itself where they lie there, else a copy.

    Copies are made once for each device, and live as long as the codec: all caches of a bundle on one device share
    theirs, and those on another device are not disturbed. A fitted codec does not change, so its copies stay true.
    """
    if all(tensor.device == device for tensor in codec.state_dict().values()):
        return codec
    copies = _copies.setdefault(codec, {})
    if device not in copies:
        copies[device] = copy.deepcopy(codec, {id(codec.recipe): codec.recipe}).to(device)
    return copies[device]
