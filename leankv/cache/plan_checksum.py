"""What the codes of a cache can be read with, as one number: saved caches and stored pages name their codecs by it."""

import hashlib

from leankv.cache.codec_files import tensors_of
from leankv.cache.plan import Plan
from leankv.cache.tensor_file import update_with


def checksum_of(plan: Plan, key_space: str) -> str:
    """sha256 (hex) of recipes with their revisions, of every number of every codec, and of the key space.

    Raises:
        UserError: a family of one's own has neither a revision nor a source.
    """
    digest = hashlib.sha256(key_space.encode())
    for site, codec in sorted(plan.items()):
        digest.update(f"{site.layer}.{site.part} {codec.recipe.text} {codec.recipe.revisions()}".encode())
        update_with(digest, tensors_of(codec))
    return digest.hexdigest()
