"""What `leankv map` and `leankv compare` go through and start from unless they are told."""

MAP_SPECS = ("transform:0.5", "transform:1", "transform:2", "int:2", "int:4", "pca:8", "ae:4", "rot:2")
"""What `leankv map` goes through unless it is told."""

COMPARE_SPECS = (
    "ae:4",
    "pca:16",
    "int:4",
    "int:2",
    "nuq:3+1",
    "rot:3",
    "transform:s0.01",
    "transform:s0.03",
    "resid(share:-2,transform:s0.02)",
    "resid(share:-2,transform:s0.06)",
)
"""What `leankv compare` goes through unless it is told."""

RULER_OFFLINE = "ruler-offline"
"""What `leankv eval-tasks` asks unless it is told: those tasks of RULER (Hsieh et al., 2024, arXiv 2404.06654) that
need no hub."""

USUAL_WINDOW = 128  # assumption: tokens; long enough for local attention, 3 % of a context of 4,096
"""Latest tokens kept exact where a cache is compressed as one would use it."""

COMPARE_SETTINGS = {
    "codec.key_space": "auto",
    "fit.error_metric": "gradient",
    "protocol.kind": "stream",
    "protocol.window": USUAL_WINDOW,
}
"""What `leankv compare` starts from where no experiment is named: a cache as one would really use it."""

SEARCH_SETTINGS = {**COMPARE_SETTINGS, "data.selection_blocks": 16}
"""What `leankv select` searches with where no experiment is named and none was begun in the folder."""

_STEPS = tuple(f"s{0.005 * 2 ** (half / 2):.3g}" for half in range(9))
_RATES = tuple(f"{4 / 2 ** (half / 2):.3g}" for half in range(9))

LADDERS = {
    "transform": tuple(f"transform:{step}" for step in _STEPS),
    "resid(share,transform)": tuple(f"resid(share:-2q8,transform:{step})" for step in _STEPS),
    "nuq": ("nuq:4+1", "nuq:3+1", "nuq:2+1"),
    "int": ("int:8", "int:4", "int:3", "int:2"),
    "rot": ("rot:4", "rot:3", "rot:2"),
    "pca": ("pca:64", "pca:32", "pca:16", "pca:8"),
    "ae": ("ae:16", "ae:8", "ae:4"),
}
"""What a family's name alone stands for in a search. Steps of `transform` are half an octave apart, so that the energy
of errors doubles from one to the next; they end where `share` breaks down (log of 2026-11-24)."""

RATE_LADDERS = {
    "transform": tuple(f"transform:{rate}" for rate in _RATES),
    "resid(share,transform)": tuple(f"resid(share:-2q8,transform:{rate})" for rate in _RATES),
}
"""The same where errors are not weighted by gradients: a step is then in the units of each site's own vectors, so that
rates, in bits a value, stand in their place."""
