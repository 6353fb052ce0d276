"""What the benchmarks on SmolLM2-135M share: the model, its text, and a folder."""

import sys
from pathlib import Path
from typing import Any

from leankv.config.loading import load_experiment
from leankv.progress import Progress
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace


def prepared(folder: Path, **changes: Any) -> PlanEvaluator:
    """SmolLM2-135M in a folder, without sinks unless `changes` say so; WikiText-2 from the folder on the command line,
    else gensim's Wikipedia sample.
    """
    data = {"data.dataset": "wikitext-2", "data.data_dir": sys.argv[1]} if len(sys.argv) > 1 else {}
    dataset = data or {"data.dataset": "wikipedia-sample"}
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    experiment = load_experiment(None, {**dataset, "output_dir": str(folder), "protocol.sinks": 0, **settings})
    return PlanEvaluator(Workspace.open(experiment, Progress()))
