"""`sweep.json`: in which files each layer's codecs and measurement are, or will be.

It ties the workers of a sweep together: a program that has loaded no model can tell what is finished.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from leankv.config.experiment import Experiment
from leankv.config.notation import parse_layers
from leankv.models.geometry import Width
from leankv.report import run_files
from leankv.storage.files import read_json
from leankv.studies.plan_evaluator import EVERYTHING_EXACT, PlanEvaluator
from leankv.studies.run_folder import write_if_changed


@dataclass(frozen=True)
class Index:
    """Where a sweep's results are, in its folder.

    Attributes:
        folder: the output folder; the other names are relative to it.
        base: the base perplexity's cell.
        cells: each of the model's layers' cell, whether asked for or not.
        codecs: each layer's codec files, by part.
        widths: each layer's width; `[K's, V's]` where they differ.
        key_space: `pre-rope` or `post-rope`.
    """

    folder: Path
    base: str
    cells: tuple[str, ...]
    codecs: tuple[Mapping[str, str], ...]
    widths: tuple[Width, ...]
    key_space: str

    @classmethod
    def of(cls, evaluator: PlanEvaluator) -> "Index":
        """The names under which a sweep of the workspace's plan finds and writes its results."""
        workspace, codecs = evaluator.workspace, evaluator.codecs
        folder = workspace.folder
        assert folder is not None
        alone = [workspace.plan.only([layer]) for layer in range(workspace.n_layers)]
        sites = [plan.sites(workspace.n_layers) for plan in alone]

        def name(path: Path) -> str:
            return path.relative_to(folder).as_posix()

        return cls(
            folder,
            name(evaluator.nats_path(EVERYTHING_EXACT)),
            tuple(name(evaluator.nats_path(plan)) for plan in alone),
            tuple(
                {site.part: name(codecs.path(plan, site)) for site in own}
                for plan, own in zip(alone, sites, strict=True)
            ),
            tuple(layer.width for layer in workspace.loaded.geometry.layers),
            workspace.key_space,
        )

    @classmethod
    def read(cls, folder: Path) -> "Index | None":
        """That of the latest run in `folder`; None where none has begun."""
        path = folder / run_files.SWEEP_INDEX
        return cls(folder, **read_json(path)) if path.is_file() else None

    def write(self) -> None:
        """Write it to its folder; workers that share the sweep write the same."""
        about = {key: value for key, value in vars(self).items() if key != "folder"}
        write_if_changed(self.folder / run_files.SWEEP_INDEX, json.dumps(about, indent=1) + "\n")

    def layers(self, experiment: Experiment) -> tuple[int, ...]:
        """The layers that an experiment asks for."""
        return parse_layers(experiment.layers, len(self.cells))

    def missing(self, experiment: Experiment) -> tuple[int, ...]:
        """The asked-for layers that are not finished; all of them while there is no base perplexity."""

        def finished(layer: int) -> bool:
            return all((self.folder / name).exists() for name in (self.cells[layer], *self.codecs[layer].values()))

        has_base = (self.folder / self.base).exists()
        return tuple(layer for layer in self.layers(experiment) if not (has_base and finished(layer)))
