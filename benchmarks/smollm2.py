"""What the benchmarks on SmolLM2-135M share: the model, text, and codecs for all layers."""

import sys
from pathlib import Path
from typing import Any

from leankv.experiment import load_experiment
from leankv.progress import Progress
from leankv.run import Run


def prepared(folder: Path, **changes: Any) -> Run:
    """A run on SmolLM2-135M, without sinks unless `changes` say so; WikiText-2 from the folder on the command line,
    else gensim's Wikipedia sample.
    """
    data = {"data.dataset": "wikitext-2", "data.data_dir": sys.argv[1]} if len(sys.argv) > 1 else {}
    dataset = data or {"data.dataset": "wikipedia-sample"}
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    return Run(
        load_experiment(None, {**dataset, "output_dir": str(folder), "protocol.sinks": 0, **settings}), Progress()
    )
