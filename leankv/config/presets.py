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

USUAL_WINDOW = 128  # assumption: tokens; long enough for local attention, 3 % of a context of 4,096
"""Latest tokens kept exact where a cache is compressed as one would use it."""

COMPARE_SETTINGS = {
    "codec.key_space": "auto",
    "fit.error_metric": "gradient",
    "protocol.kind": "stream",
    "protocol.window": USUAL_WINDOW,
}
"""What `leankv compare` starts from where no experiment is named: a cache as one would really use it."""
