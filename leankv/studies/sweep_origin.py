"""Whether a finished sweep was made by what would make it now: the same model, text, machine and code."""

import math
from typing import Any

from leankv.evaluation.perplexity import BlockNats
from leankv.storage.files import read_json
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.sweep_index import Index


def difference(evaluator: PlanEvaluator, base_ppl: float) -> str | None:
    """What the sweep in the workspace's folder was made with that is not there now, in words; None where all agrees.

    Args:
        evaluator: of the workspace that asks for the sweep.
        base_ppl: the base perplexity in the sweep's table, which an unfinished later sweep does not have.
    """
    workspace = evaluator.workspace
    assert workspace.folder is not None
    found, wanted = Index.read(workspace.folder), Index.of(evaluator)
    if found is None or not (workspace.folder / found.base).is_file():
        return "does not say what it was made with"
    base = read_json(workspace.folder / found.base)
    model: dict[str, Any] = base["depends_on"]["model"]
    for name, value in workspace.model_key.items():
        if model.get(name) != value:
            return f"was made with {name} {model.get(name)}, not {value}"
    if base["depends_on"]["blocks"] != workspace.blocks("selection").hash:
        return "was made with other selection text than is here now"
    if any(found.codecs[layer] != wanted.codecs[layer] for layer in workspace.layers):
        return "has codecs that were fitted to other text, or by another version of leankv"
    if (found.base, *found.cells) != (wanted.base, *wanted.cells):
        return "was measured by another version of leankv"
    # A CSV file holds a number to its last digit but one.
    if not math.isclose(BlockNats.from_cell(base["result"]).perplexity, base_ppl, rel_tol=1e-12):
        return "was begun again and not finished"
    return None
