"""Two texts side by side, with the first place at which they part."""

from itertools import takewhile


def parted(base: str, compressed: str) -> tuple[str, str, str]:
    """What both begin with, in whole words, and what each goes on with."""
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(base, compressed, strict=False))))
    words_end = all(text[same : same + 1] in ("", " ") for text in (base, compressed))
    if not words_end:
        same = base.rfind(" ", 0, same) + 1
    return base[:same], base[same:], compressed[same:]
