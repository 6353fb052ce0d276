"""Two texts side by side, with the first place at which they part."""

from itertools import takewhile


def parted(base: str, compressed: str) -> tuple[str, str, str]:
    """What both begin with, in whole words, and what each goes on with."""
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(base, compressed, strict=False))))
    if same < max(len(base), len(compressed)):
        same = base.rfind(" ", 0, same) + 1
    return base[:same], base[same:], compressed[same:]
