"""Sections of recipes: YAML nodes -> checked values, each error with its file and line.

For recipes of all kinds: which sections there are, and what they mean, is in recipe.py and tracker_recipe.py.
"""

import math
import os
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from visa_hf.datasets_scripts.mixture import MixtureConfig
from visa_hf.datasets_scripts.mixture_yaml import mixture_of
from visa_hf.trainer.training_arguments import VisaTrainingArguments
from visa_hf.yaml_files import YamlFile, nearest

RECIPES = Path(__file__).parent / "recipes"
BUNDLED_DEEPSPEED = ("zero2", "zero3")
# Arguments that divide something.
_COUNTED = {"per_device_train_batch_size", "per_device_eval_batch_size"}
# What `schedule` decides.
_SCHEDULED = ("max_steps", "num_train_epochs", "gradient_accumulation_steps")


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe: a path, or the name of a bundled one with or without `.yaml`.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = RECIPES / (path.name if path.suffix else f"{path.name}.yaml")
    if path.parent == Path() and bundled.is_file():
        return bundled
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    raise FileNotFoundError(
        f"There is no recipe `{path}`. Give the path of a YAML file, or a bundled one: {', '.join(known)}."
    )


def open_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> YamlFile:
    """Open the file of a recipe, and replace the values that `overrides` name, such as `"schedule.epochs=2"`.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it is no YAML, or an override is none; file and line, or the override, are named.
    """
    file = YamlFile(find_recipe(name))
    for assignment in overrides:
        file.override(assignment)
    return file


def require_sections(file: YamlFile, sections: dict[str, yaml.Node]) -> None:
    """Refuse a recipe without the sections that every recipe needs."""
    for needed in ("schedule", "data"):
        if needed not in sections:
            raise file.error(file.root, f"the section `{needed}` is missing.")


def read_evaluation(file: YamlFile, sections: dict[str, yaml.Node], kind: type) -> Any:
    """Make the object of the section `evaluation`, whose folder must be there; `None` without one."""
    node = sections.get("evaluation")
    if node is None or file.value(node, "evaluation") is None:
        return None
    evaluation = read_section(file, sections, "evaluation", kind)
    check_folder(file, file.mapping(node, "`evaluation`")["folder"], evaluation.folder)
    return evaluation


def read_section(file: YamlFile, sections: dict[str, yaml.Node], name: str, kind: type) -> Any:
    """Make the object of a section; of its defaults, if it is not there."""
    node = sections.get(name)
    if node is None:
        return kind()
    return make(file, node, kind, read_fields(file, node, name, kind))


def read_fields(
    file: YamlFile,
    node: yaml.Node,
    name: str,
    kind: type,
    others: Collection[str] = (),
) -> dict[str, Any]:
    """Return the values of a section, each of the type that `kind` has for it, but for `others`."""
    hints = typing.get_type_hints(kind)
    known = {one.name for one in fields(kind)}
    values = {}
    for key, value_node in file.mapping(node, f"`{name}`", known).items():
        if key in others:
            continue
        value = file.value(value_node, f"{name}.{key}")
        _check_type(file, value_node, f"{name}.{key}", value, hints[key])
        values[key] = value
    missing = [
        one.name
        for one in fields(kind)
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values
    ]
    if missing:
        raise file.error(node, f"`{name}` has no `{missing[0]}`.")
    return values


def read_arguments(file: YamlFile, node: yaml.Node) -> dict[str, Any]:
    """Return the fields of the training arguments, after checking names and types."""
    known = {one.name for one in fields(VisaTrainingArguments) if one.init} - {"output_dir"}
    for key, value_node in file.mapping(node, "`arguments`").items():
        if key in _SCHEDULED:
            raise file.error(value_node, f"`arguments.{key}` follows from `schedule`. Remove it, and set that.")
        if key == "output_dir":
            raise file.error(value_node, "`arguments.output_dir` is given on the command line: `-o`. Remove it.")
        if key not in known:
            raise file.error(value_node, f"`arguments` has the unknown key `{key}`. {nearest(key, known)}")
    values = read_fields(file, node, "arguments", VisaTrainingArguments)
    # YAML reads a bare `no` as false.
    values |= {key: "no" for key, value in values.items() if key.endswith("_strategy") and value is False}
    for key in _COUNTED & set(values):
        if values[key] < 1:
            value_node = file.mapping(node, "`arguments`")[key]
            raise file.error(value_node, f"`arguments.{key}` is {values[key]} but must be at least 1.")
    config = values.get("deepspeed")
    if isinstance(config, str) and config not in BUNDLED_DEEPSPEED and not Path(config).is_file():
        value_node = file.mapping(node, "`arguments`")["deepspeed"]
        names = ", ".join(BUNDLED_DEEPSPEED)
        raise file.error(value_node, f"`arguments.deepspeed` is {config!r} but must be {names} or a JSON file.")
    return values


def check_evaluation(
    file: YamlFile, sections: dict[str, yaml.Node], arguments: dict[str, Any], evaluation: object | None
) -> None:
    """Refuse an evaluation without a time, and times without an evaluation."""
    is_timed = arguments.get("eval_strategy", "no") != "no"
    if is_timed and evaluation is None:
        node = file.mapping(sections["arguments"], "`arguments`")["eval_strategy"]
        raise file.error(node, "`arguments.eval_strategy` is set, but there is no section `evaluation` to measure on.")
    if evaluation is not None and not is_timed:
        raise file.error(
            sections["evaluation"],
            "`evaluation` is there but nothing says when. Add `eval_strategy: steps` and `eval_steps: N` to "
            "`arguments`, or remove the section.",
        )


def _check_type(file: YamlFile, node: yaml.Node, name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than its field has; types that are more than plain data are left to the field."""
    kinds = set(typing.get_args(hint)) if _is_union(hint) else {hint}
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    if typing.Any in kinds or not kinds <= {*plain, list, types.NoneType}:
        return
    is_right = (
        (value is None and types.NoneType in kinds)
        or (type(value) in kinds)
        or (type(value) is int and float in kinds and math.isfinite(value))
    )
    if not is_right:
        wanted = " or ".join(text for kind, text in plain.items() if kind in kinds)
        raise file.error(node, f"`{name}` is {value!r} but must be {wanted}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def make(file: YamlFile, node: yaml.Node, kind: type, values: dict[str, Any]) -> Any:
    """Make an object, giving its error the line of the value that it begins with, else of the section."""
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        keys = file.mapping(node, "the section")
        wrong = [value for key, value in keys.items() if str(error).startswith(f"`{key}`")]
        raise file.error(wrong[0] if wrong else node, str(error)) from error


def read_mixture(file: YamlFile, node: yaml.Node) -> MixtureConfig:
    """Read `data.mixture`: a name, a file, or the mixture itself."""
    if isinstance(node, yaml.MappingNode):
        return mixture_of(file, node)
    text = file.text(node, "data.mixture")
    if text == "published":
        return MixtureConfig.published()
    path = file.path.parent / Path(text).expanduser()
    if not path.is_file():
        raise file.error(node, f"`data.mixture` names the file `{path}`, which does not exist.")
    return MixtureConfig.load(path)


def check_folders(file: YamlFile, node: yaml.Node, data: dict[str, Any]) -> None:
    """Refuse folders of nothing that is drawn, folders that are not there, and sources without one."""
    mixture = data.get("mixture") or MixtureConfig.published()
    folders_node = file.mapping(node, "`data`").get("folders")
    nodes = {} if folders_node is None else file.mapping(folders_node, "`data.folders`")
    names = {name for g in mixture.groups for name in (g.name, *(n for s in g.sources for n in (s.name, s.dataset)))}
    for name, folder_node in nodes.items():
        if name not in names:
            raise file.error(folder_node, f"`data.folders` names `{name}`, which is not drawn. {nearest(name, names)}")
        check_folder(file, folder_node, file.text(folder_node, f"data.folders.{name}"))
    try:
        mixture.probabilities(mixture.with_folders(nodes), renormalise=data.get("renormalise", False))
    except ValueError as error:
        hint = "Name folders in `data.folders`, or with `--override data.folders.NAME=FOLDER`."
        raise file.error(folders_node or node, f"{error} {hint}") from error


def check_folder(file: YamlFile, node: yaml.Node, folder: str) -> None:
    """Refuse a folder that is not there."""
    if not Path(folder).expanduser().is_dir():
        raise file.error(node, f"There is no folder `{folder}`.")
