"""Fixtures that several test files use."""

import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The tensors of tiny models gain nothing from more threads, and the numbers are the same on every machine. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import jaxtyping
import pytest
import torch
import yaml

from tests import tiny, type_checker  # noqa: F401 - before the first module that is checked

# What imports LeanKV is imported inside fixtures: a hook that checks shapes has to be in place before, and pytest sets
# hooks up after it has read this file.
if TYPE_CHECKING:
    from tests.run_folders import Sweep

# A file that was renamed outlives the process that wrote it, however it ends; waiting for the disk, 20 ms a file, would
# only tell what a power cut leaves.
os.fsync = lambda handle: None  # type: ignore[assignment]

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile(
    "leankv",
    parent=hypothesis.settings.default,  # on CI hypothesis has chosen one that draws the same every time
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("leankv")

FIRST_ARCHITECTURE = next(iter(tiny.ARCHITECTURES))


SLOW_FILES = (
    "test_executors.py",
    "test_export.py",
    "test_sharding.py",
    "test_resume.py",
    "test_seventy_b_shape.py",
    "test_eval_tasks.py",
    "test_replay.py",
    "test_select_plan.py",
    "test_model.py",
    "test_api.py",
)
"""Few tests, but long ones: whole runs and real processes. They come first, so that no process is left alone with one
at the end (xdist, left to itself, begins with the files of many tests)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes at every call, a million of them at 50 microseconds each, only where that can find something new.

    Not in tests marked `whole_runs`, which take a model through whole texts, some a token at a time: the tests of the
    functions themselves check them. And once of each test that goes through all architectures.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    architecture = parameters.get("architecture", parameters.get("name"))
    another = architecture in tiny.ARCHITECTURES and architecture != FIRST_ARCHITECTURE
    unchecked = item.get_closest_marker("whole_runs") is not None or another
    jaxtyping.config.update("jaxtyping_disable", unchecked)


@pytest.fixture
def drawn_whole() -> None:
    """Asked for by tests that look at a figure."""


@pytest.fixture(autouse=True)
def sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests draw is small and not laid out, in a fifth of the time.

    Fixtures of a module or of all draw before, so whole.
    """
    figure = sys.modules.get("matplotlib.figure")
    if figure is None or "drawn_whole" in request.fixturenames:
        return
    save = figure.Figure.savefig

    def sketch(self: Any, path: Any, **given: Any) -> None:
        self.set_layout_engine("none")
        save(self, path, **{**given, "dpi": 40})

    monkeypatch.setattr(figure.Figure, "savefig", sketch)


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> Any:
    """A tiny model of each architecture in turn."""
    return tiny.build(architecture)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    return tiny.save(tmp_path_factory.mktemp("llama"), tiny.build("llama"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text long enough for four splits of short blocks."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text(60_000), encoding="utf-8")
    return path


@pytest.fixture
def settings(llama_folder: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides of a whole experiment that takes a second or two."""
    return {
        "model.name": str(llama_folder),
        "model.device": "cpu",
        "model.dtype": "float32",  # else some processors take 16 bits, and have other last bits
        "data.dataset": str(text_file),
        "data.block_length": 48,
        "data.calibration_blocks": 12,
        "data.selection_blocks": 3,
        "data.report_blocks": 4,
        "plan": "ae:4x16",
        "fit.epochs": 2,
        "protocol.sinks": 0,
        "selection.budget": "50%",
        "selection.strategy": "greedy",
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture(scope="session")
def experiment(llama_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file that takes a second or two; `BLOCKS` blocks of every split."""
    from tests.run_folders import BLOCKS

    path = tmp_path_factory.mktemp("experiment") / "tiny.yaml"
    values = {
        "model": {"name": str(llama_folder), "device": "cpu", "dtype": "float32"},
        "data": {
            "dataset": str(text_file),
            "block_length": 48,
            "calibration_blocks": 8,
            "selection_blocks": BLOCKS,
            "report_blocks": BLOCKS,
        },
        "plan": "ae:4x16",
        "fit": {"epochs": 1},
        "selection": {"budget": "80%", "strategy": "greedy"},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `leankv run` of `experiment`."""
    from tests.run_folders import succeed

    folder = tmp_path_factory.mktemp("finished") / "run"
    succeed("run", experiment, "-o", folder, "--prompt", "once there was")
    return folder


@pytest.fixture
def bundle(finished: Path) -> Path:
    """The bundle of that run."""
    return finished / "bundle"


@pytest.fixture(scope="session")
def serial(tmp_path_factory: pytest.TempPathFactory) -> "Sweep":
    """An experiment with a model of `LAYERS` layers, swept by one process alone."""
    from tests.run_folders import swept_by_one

    return swept_by_one(tmp_path_factory.mktemp("serial"))


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of different lengths."""
    rng = random.Random(0)
    texts = [tiny.text(rng.randrange(60, 160), seed=number) for number in range(160)]
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has read the documents for two seconds: in an untrained one, errors cost nothing."""
    model, texts = tiny.build("llama"), [json.loads(line)["text"] for line in documents.read_text().split("\n")]
    ids = torch.tensor(tiny.tokenizer()("\n".join(texts))["input_ids"])
    blocks = ids[: len(ids) // 48 * 48].reshape(-1, 48)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(120):
        batch = blocks[step * 8 % (len(blocks) - 8) :][:8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny.save(tmp_path_factory.mktemp("trained"), model.eval())


@pytest.fixture(scope="session")
def search_config(trained: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment whose plans are searched: a model that errors hurt, and documents to certify on."""
    values = {
        "model": {"name": str(trained), "device": "cpu", "dtype": "float32"},
        "data": {
            "dataset": str(documents),
            "block_length": 48,
            "selection_block_length": 24,
            "calibration_blocks": 16,
            "selection_blocks": 8,
            "report_blocks": 4,
        },
        "codec": {"key_space": "pre-rope"},
        "fit": {"error_metric": "gradient"},
        "protocol": {"kind": "stream", "sinks": 2, "window": 4, "chunk": 8},
        "selection": {"recipes": "int:4,int:3,resid(share:-1,int:4),resid(share:-1,int:2)"},
        "certification": {"least_tokens": 24, "clip": 0.3},
    }
    path = tmp_path_factory.mktemp("config") / "plan.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
