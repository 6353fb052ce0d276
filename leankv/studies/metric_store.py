"""The error metrics of a workspace's layers: a pass forward and back through the model, made once."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from leankv.cache.plan import Site
from leankv.cache.tensor_file import read_tensors, write_tensors
from leankv.calibration.error_metrics import ErrorMetrics, fit_error_metrics
from leankv.calibration.fit import FITTING_REVISION
from leankv.calibration.metric_sample import MetricSample
from leankv.config.plan_table import PARTS
from leankv.storage.files import hash_of
from leankv.studies.workspace import Workspace


class MetricStore:
    """Estimates error metrics, and keeps them: a file a layer in the workspace's folder, or in memory without one.

    Args:
        workspace: model, text and folder.
    """

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self._at_hand: ErrorMetrics = {}

    def of(self, layers: Iterable[int]) -> ErrorMetrics:
        """What the errors of these layers' vectors count by; nothing where they all count alike.

        Raises:
            UserError: a file is damaged, or the metric cannot be had of this model (`fit_error_metrics`).
        """
        workspace = self.workspace
        kind = workspace.experiment.fit.error_metric
        if kind == "none":
            return {}
        if asked := [layer for layer in layers if not self._find(layer)]:
            sinks, seed = workspace.experiment.protocol.sinks, workspace.experiment.seed
            sample = MetricSample(workspace.blocks("calibration"), asked, workspace.rotation, sinks, seed)
            found = fit_error_metrics(kind, workspace.loaded, sample, workspace.progress)
            self._at_hand |= found
            for layer in asked:
                self._keep(layer)
        return self._at_hand

    def _find(self, layer: int) -> bool:
        """Whether a layer's metrics are there; they are then at hand."""
        if Site(layer, "k") in self._at_hand:
            return True
        if self.workspace.folder is None or not self._path(layer).exists():
            return False
        tensors, _ = read_tensors(self._path(layer), "the error metrics in", "delete it, and run this again")
        self._at_hand |= {Site(layer, part): tensors[part] for part in PARTS}
        return True

    def _keep(self, layer: int) -> None:
        if self.workspace.folder is not None:
            own: dict[str, torch.Tensor] = {part: self._at_hand[Site(layer, part)].contiguous() for part in PARTS}
            write_tensors(self._path(layer), own, self._depends_on(layer))

    def _path(self, layer: int) -> Path:
        assert self.workspace.folder is not None
        name = f"layer-{layer:03d}-{hash_of(self._depends_on(layer))[:16]}.safetensors"
        return self.workspace.folder / "metrics" / name

    def _depends_on(self, layer: int) -> dict[str, Any]:
        experiment = self.workspace.experiment
        return {
            "revision": FITTING_REVISION,
            "model": self.workspace.model_key,
            "calibration": self.workspace.blocks("calibration").hash,
            "kind": experiment.fit.error_metric,
            "key_space": self.workspace.key_space,
            "sinks": experiment.protocol.sinks,
            "seed": experiment.seed,
            "layer": layer,
        }
