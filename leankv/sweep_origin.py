"""Whether a finished sweep was made by what a run would make it with: the same model, text, machine and code."""

import math
from typing import Any

from leankv.run import Run, nats_of
from leankv.store import read_json
from leankv.sweep_index import Index


def difference(run: Run, base_ppl: float) -> str | None:
    """What the sweep in the folder of `run` was made with that the run is without, in words; None where all agrees.

    Args:
        run: what asks for the sweep.
        base_ppl: the base perplexity in the sweep's table, which an unfinished later sweep does not have.
    """
    found, wanted = Index.read(run.folder), Index.of(run)
    if found is None or not (run.folder / found.base).is_file():
        return "does not say what it was made with"
    base = read_json(run.folder / found.base)
    model: dict[str, Any] = base["depends_on"]["model"]
    for name, value in run.model_key.items():
        if model.get(name) != value:
            return f"was made with {name} {model.get(name)}, not {value}"
    if base["depends_on"]["blocks"] != run.blocks("selection").hash:
        return "was made with other selection text than is here now"
    if any(found.codecs[layer] != wanted.codecs[layer] for layer in run.layers):
        return "has codecs that were fitted to other text, or by another version of leankv"
    if (found.base, *found.cells) != (wanted.base, *wanted.cells):
        return "was measured by another version of leankv"
    # A CSV file holds a number to its last digit but one.
    if not math.isclose(nats_of(base["result"]).perplexity, base_ppl, rel_tol=1e-12):
        return "was begun again and not finished"
    return None
