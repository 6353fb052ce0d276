"""A screened sweep against the exact one: evaluation time, agreement of ranks, and the layers that are chosen.

Give a folder with WikiText-2. Both use the same codecs; measurements of whole plans are shared between the two where
they choose alike.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from side_by_side import report, say, side_by_side, timed
from smollm2 import prepared

from leankv.config.experiment import SelectionConfig
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.select import select
from leankv.studies.sweep import sweep

SETTINGS: dict[str, Any] = {
    "data__calibration_blocks": 32,
    "data__block_length": 512,
    "data__selection_blocks": 24,
    "data__report_blocks": 2,
}
BUDGETS = ("2.5", "7%")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exact, screened = (
            prepared(folder / kind, **SETTINGS, sweep__screen=kind == "screened") for kind in ("exact", "screened")
        )
        exact.codecs.fit([exact.workspace.plan])
        (folder / "screened" / "codecs").symlink_to(folder / "exact" / "codecs")
        tables: dict[str, pd.DataFrame] = {}

        def evaluated(kind: str, evaluator: PlanEvaluator) -> float:
            # Common to both: reading the codecs, and the base with the pass that records hidden states.
            evaluator.codecs.fit([evaluator.workspace.plan])
            evaluator.base()
            seconds, tables[kind] = timed(lambda: sweep(evaluator))
            return seconds

        ratio = side_by_side(
            "screened sweep of SmolLM2-135M, evaluation only",
            "the exact sweep's evaluation",
            lambda: evaluated("screened", screened),
            lambda: evaluated("exact", exact),
            required=4,
            repeats=1,
            notes=dict(SETTINGS),
        )
        both = tables["exact"].merge(tables["screened"], on="layer", suffixes=("", "_screened"))
        ratio.notes["spearman"] = both["delta_ppl"].corr(both["delta_ppl_screened"], method="spearman")
        say(f"Spearman {ratio.notes['spearman']:.3f}")
        report("screening", ratio)  # choosing takes as long again, and may be stopped
        for budget in BUDGETS:
            chosen = {}
            for kind, evaluator in (("exact", exact), ("screened", screened)):
                workspace = evaluator.workspace
                workspace.experiment = replace(workspace.experiment, selection=SelectionConfig(budget=budget))
                chosen[kind] = select(evaluator).selected_layers
                for cell in (folder / "exact" / "cells").glob("*.json"):  # plans that both try are measured once
                    shutil.copy(cell, folder / "screened" / "cells")
            say(f"under {budget}: exact {chosen['exact']}, screened {chosen['screened']}")
            ratio.notes[f"chosen under {budget}"] = chosen
        report("screening", ratio)


if __name__ == "__main__":
    main()
