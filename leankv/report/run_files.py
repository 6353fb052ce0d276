"""What lies in a run's folder, by name: the files that one command writes and another reads."""

EXPERIMENT = "experiment.yaml"
"""All settings, as resolved."""

GIVEN = "given.json"
"""Hashes of the model and the texts that a Python program handed in."""

MANIFEST = "manifest.json"
"""What made the results, with hashes; written last."""

SUMMARY = "summary.json"
"""The figures that one wants first."""

SWEEP, SWEEP_INDEX = "sweep.csv", "sweep.json"
"""A row a layer; and which codec and measurement it is of."""

SELECTION = "selection.json"
"""Every step of a selection by layers."""

PLANS = "plans.json"
"""Every selection of searched plans, with its steps."""

COMPLETION = "completion.json"
"""What base model and bundle say."""

MAP, SPECTRA = "map.csv", "spectra.csv"
"""A row a layer, part and codec; and the variances of components."""

COMPARE = "compare.csv"
"""A row a cache."""

TASKS, AGREEMENT, TASKS_ABOUT = "tasks.csv", "agreement.csv", "tasks.json"
"""Task scores, how often caches agree with the base model, and what both were asked with."""
