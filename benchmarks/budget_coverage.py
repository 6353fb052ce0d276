"""Do certified budgets hold? Plans measured once on 200 documents and more, then thousands of selections from them.

    python benchmarks/budget_coverage.py measure FOLDER [SECONDS]    writes results/budget-coverage/nats.json
    python benchmarks/budget_coverage.py                             draws from it: coverage.json and coverage.md

FOLDER holds WikiText-2. Measuring takes half an hour on 2 cores; every document's nats are kept in
`results/budget-coverage/work`, so it may be killed, or told to stop after SECONDS, and goes on where it was. Drawing
takes a minute.

The documents are the first 512 tokens of each article of WikiText-2 that no codec was fitted on, and of each article
of the Wikipedia sample: 256 are coded, and 256 read behind them (protocol `prefix`). All of them together are the
source: a plan's true cost is what they give. A draw parts them at random: `SELECTION` documents order the plans and
choose their bounds, the others certify. A second kind of draw takes certification documents with replacement, so that
they are independent draws, as the test supposes.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from budget_draws import draw_all, table
from side_by_side import machine, say

RESULTS = Path(__file__).parent.parent / "results" / "budget-coverage"

PLANS: dict[str, Any] = {
    "transform:s0.014": "transform:s0.014",
    "transform:s0.02": "transform:s0.02",
    "transform:s0.028": "transform:s0.028",
    "transform:s0.04": "transform:s0.04",
    "transform:s0.056": "transform:s0.056",
    "resid(share:-2,transform:s0.04)": "resid(share:-2,transform:s0.04)",
}
"""Families and rates whose costs lie around the budgets."""

PREFIX, CONTINUATION = 256, 256

SETTINGS: dict[str, Any] = {
    "data.block_length": PREFIX + CONTINUATION,
    "data.calibration_blocks": 32,
    "codec.key_space": "pre-rope",
    "fit.error_metric": "gradient",
    "protocol.kind": "prefix",
    "protocol.prefix_length": PREFIX,
    "protocol.continuation": CONTINUATION,
    "protocol.sinks": 4,
    "protocol.window": 0,
}
"""Whether budgets hold does not depend on the protocol; under this one all plans share the pass over a prefix."""


def measure(wikitext: str, seconds: float) -> None:
    """Measure what is not measured yet, plan by plan, and write the plans that are complete."""
    from leankv.cache.plan import PlanSpec
    from leankv.config.experiment import DataConfig
    from leankv.config.loading import load_experiment
    from leankv.data.documents import documents_of
    from leankv.data.splits import TextSource
    from leankv.progress import Progress
    from leankv.studies.plan_evaluator import EVERYTHING_EXACT, PlanEvaluator
    from leankv.studies.workspace import Workspace

    started = time.monotonic()
    data = {"data.dataset": "wikitext-2", "data.data_dir": wikitext, "output_dir": str(RESULTS / "work")}
    experiment = load_experiment(None, {**data, **SETTINGS})
    evaluator = PlanEvaluator(Workspace.open(experiment, Progress()))
    workspace = evaluator.workspace
    tokenizer, length = workspace.loaded.tokenizer, experiment.data.block_length

    source = TextSource(experiment.data)
    fitted_on = len(source.documents("calibration", tokenizer))
    texts = {"wikitext-2": source.documents("all", tokenizer)[fitted_on:]}
    texts["wikipedia-sample"] = TextSource(DataConfig(dataset="wikipedia-sample")).documents("all", tokenizer)
    documents = [documents_of(own, tokenizer, length, length, name, name) for name, own in texts.items()]
    blocks = [block for own in documents for block in own.blocks]
    say(f"{len(blocks)} documents, {sum(own.left_out for own in documents)} shorter than {length} left out")

    specs = {name: PlanSpec.parse(written) for name, written in PLANS.items()}
    evaluator.codecs.fit(specs.values())  # at once, so that the calibration text runs through the model once
    evaluator.codecs.forget()
    rows: dict[str, list[float]] = {}
    plans: list[dict[str, Any]] = []
    for name, spec in {"base": EVERYTHING_EXACT, **specs}.items():
        nats: list[float] = []
        with workspace.progress.stage(name, len(blocks)) as step:
            for (own,) in evaluator.documents_nats([spec], blocks):
                nats.append(own.nats[0])
                step()
                if time.monotonic() - started > seconds:
                    break
        if len(nats) < len(blocks):
            break
        rows[name] = nats
        if spec != EVERYTHING_EXACT:
            codecs = evaluator.codecs.plan(spec)
            exact = sum(16 * workspace.loaded.geometry.layers[site.layer].width for site in codecs)
            stored = sum(codec.stored_bits_per_token for codec in codecs.values())
            plans.append({"name": name, "stored_code_ratio": round(exact / stored, 3)})
        evaluator.codecs.forget()
    say(f"{len(plans)} of {len(PLANS)} plans measured")
    if not plans:
        return
    result = {
        "what": "nats of documents, of the base model and under plans",
        "model": experiment.model.name,
        "model_fingerprint": workspace.loaded.fingerprint,
        "numerics": workspace.loaded.numerics,
        "settings": SETTINGS,
        "least_tokens": length,
        "plans": plans,
        "columns": ["source", "predicted tokens", *rows],
        "documents": [
            [block.source, CONTINUATION - 1, *(round(own[place], 4) for own in rows.values())]
            for place, block in enumerate(blocks)
        ],
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    head, _, body = json.dumps(result).partition('"documents": ')
    (RESULTS / "nats.json").write_text(f'{head}"documents": {body}'.replace("], [", "],\n[") + "\n")


def draw() -> None:
    """Draw from the measured documents, and write what came of it."""
    if not (RESULTS / "nats.json").exists():
        raise SystemExit("nothing is measured yet: run it with `measure` and the folder with WikiText-2")
    stored = json.loads((RESULTS / "nats.json").read_text())
    ratios = [plan["stored_code_ratio"] for plan in stored["plans"]]
    tokens = numpy.array([row[1] for row in stored["documents"]], dtype=float)
    nats = numpy.array([row[2:] for row in stored["documents"]], dtype=float)
    names = [plan["name"] for plan in stored["plans"]]
    result = draw_all(nats[:, 1:] - nats[:, :1], tokens, ratios, names)
    (RESULTS / "coverage.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "coverage.md").write_text(table(result))
    say(table(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else float("inf"))
    else:
        draw()
