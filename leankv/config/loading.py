"""Experiments from YAML, flags and `--set`: read, checked, and refused with the line that is wrong."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from leankv.config.experiment import Experiment
from leankv.config.plan_table import PARTS, plan_table, with_part
from leankv.errors import UserError

RENAMED = {"codec.k": "plan.k", "codec.v": "plan.v", "fit.weighting": "fit.error_metric"}
"""Settings of version 0.1 and what they are called now: experiments and bundles written by it are read."""
PLAN_PARTS = {f"plan.{part}": part for part in PARTS}
"""Not settings of their own: they change one part of the plan."""


def load_experiment(path: Path | None, overrides: dict[str, Any]) -> Experiment:
    """The experiment in a YAML file (or all defaults), with `overrides` (dotted key -> value) on top.

    Raises:
        UserError: the file is missing or malformed, or a key or value is wrong; names the line where there is one.
    """
    return _build(_named(path, overrides))


def settings_named(path: Path | None, overrides: dict[str, Any]) -> frozenset[str]:
    """The dotted keys that a YAML file and overrides name, whether or not with the values that are the defaults.

    Raises:
        UserError: as `load_experiment`.
    """
    return frozenset(_named(path, overrides))


def _named(path: Path | None, overrides: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if path is not None:
        values = _flatten_yaml(path)
    known = _fields_by_key()
    for given, value in overrides.items():
        key = RENAMED.get(given, given)
        if key not in known and key not in PLAN_PARTS:
            raise UserError(f"there is no setting {given!r}; the settings are {', '.join(known)}")
        _set(values, key, value, known, given)
    return values


def _set(values: dict[str, Any], key: str, value: Any, known: dict[str, Any], where: str) -> None:
    """Note a value under its key, as the type that the setting has."""
    if key == "plan":
        values["plan"] = plan_table(value, where)
    elif key in PLAN_PARTS:  # of a plan that is written whole before, or of the default
        values["plan"] = with_part(values.get("plan", Experiment.plan), PLAN_PARTS[key], value)
    else:
        values[key] = _convert(value, known[key], where)


def flatten(experiment: dict[str, Any]) -> dict[str, Any]:
    """An experiment as nested dicts (`asdict`) -> dotted key -> value, as `load_experiment` takes overrides."""
    flat: dict[str, Any] = {}
    for name, value in experiment.items():
        is_section = isinstance(value, dict) and name != "plan"
        flat.update({f"{name}.{key}": own for key, own in value.items()} if is_section else {name: value})
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """Read one `--set key=value`; the value is YAML.

    Raises:
        UserError: there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not key=value, e.g. --set data.block_length=512")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {text!r}: the value is not YAML") from error


def _build(values: dict[str, Any]) -> Experiment:
    sections: dict[str, Any] = {}
    for entry in dataclasses.fields(Experiment):
        if dataclasses.is_dataclass(entry.type):
            prefix = entry.name + "."
            own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            sections[entry.name] = typing.cast(Any, entry.type)(**own)
        elif entry.name in values:
            sections[entry.name] = values[entry.name]
    return Experiment(**sections)


def _fields_by_key() -> dict[str, Any]:
    """Dotted key -> type, of every setting."""
    known: dict[str, Any] = {}
    for entry in dataclasses.fields(Experiment):
        if dataclasses.is_dataclass(entry.type):
            hints = typing.get_type_hints(entry.type)
            known.update({f"{entry.name}.{name}": hint for name, hint in hints.items()})
        else:
            known[entry.name] = entry.type
    return known


def _flatten_yaml(path: Path) -> dict[str, Any]:
    """Dotted key -> value, of a YAML file; wrong keys and values are refused with their line."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the experiment {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the experiment {path} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise UserError(f"the experiment {path} is not valid YAML: it has characters that no text has") from error
    known = _fields_by_key()
    sections = {key.partition(".")[0] for key in known if "." in key}
    values: dict[str, Any] = {}
    seen: set[str] = set()
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line 1: an experiment is a mapping of settings, such as 'seed: 0'")

    def read(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            written, where = prefix + str(key_node.value), f"{path}, line {key_node.start_mark.line + 1}"
            key = RENAMED.get(written, written)
            if key in sections and isinstance(value_node, yaml.MappingNode):
                if any(other.startswith(key + ".") for other in seen):
                    raise UserError(f"{where}: {key} stands twice; keep one")
                read(value_node, key + ".")
            elif key in sections:
                raise UserError(f"{where}: {key} is a group of settings and needs indented ones under it")
            elif key not in known and key not in PLAN_PARTS:
                names = ", ".join(name for name in [*known, *sections] if name.startswith(prefix) or not prefix)
                raise UserError(f"{where}: there is no setting {written!r}; there are {names}")
            elif written in seen:
                raise UserError(f"{where}: {key} stands twice; keep one")
            else:
                loader = yaml.SafeLoader("")
                try:
                    value = loader.construct_object(value_node, deep=True)
                except (yaml.YAMLError, ValueError) as error:
                    raise UserError(f"{where}: the value of {key} is not understood; put it in quotes") from error
                seen.add(written)
                _set(values, key, value, known, f"{where}: {written}")

    read(root, "")
    return values


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that the field wants; lossless conversions only."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is bool or isinstance(value, bool):
            if option is bool and isinstance(value, bool):
                return value
        elif option is int and isinstance(value, int):
            return value
        elif option is float and isinstance(value, str | int | float):
            try:  # YAML reads 3e-3 as a string
                if math.isfinite(number := float(value)):
                    return number
            except (ValueError, OverflowError):
                continue
        elif option is str and isinstance(value, str | int | float):
            return str(value)
    wanted = " or ".join("null" if option is type(None) else option.__name__ for option in options)
    raise UserError(f"{where} must be {wanted}, not {value!r}")
