"""Mixtures as YAML files: reading them with the line in every error, and writing them.

The file has one key, `groups`; the keys below it are names of groups, and below `sources` names of sources:

    groups:
      rvos:
        weight: 12
        sources:
          mevis: 4000                    # a weight alone: data set of that name, split "train", sampled as published
          my_clips:
            weight: 100
            dataset: own_data            # by default the source's own name
            split: train
            data_dir: ../clips           # relative to this file
            sampling:                    # fields of SamplingRecipe that differ from the data set's
              max_reference_frames: 10
"""

import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.mixture import GroupConfig, MixtureConfig, SourceConfig
from visa_hf.datasets_scripts.sampling import SamplingRecipe
from visa_hf.yaml_files import YamlFile, nearest

_SOURCE_KEYS = ("weight", "dataset", "split", "data_dir", "sampling")


def read_mixture(path: str | os.PathLike[str]) -> MixtureConfig:
    """Read a mixture.

    Args:
        path (`str` or `os.PathLike`): the YAML file. A relative `data_dir` in it is taken from the file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, a key or a data set is unknown, a value has the wrong type or is out of its range;
            the text begins with file and line.
    """
    file = YamlFile(path)
    return mixture_of(file, file.root)


def mixture_of(file: YamlFile, node: yaml.Node) -> MixtureConfig:
    """Read a mixture that is a part of a file: a mapping with the key `groups`. Errors as of [`read_mixture`]."""
    keys = file.mapping(node, "the mixture", ("groups",))
    if "groups" not in keys:
        raise file.error(node, "`groups` is missing.")
    groups = file.mapping(keys["groups"], "`groups`")
    return _made(file, node, MixtureConfig, tuple(_group(file, name, value) for name, value in groups.items()))


def write_mixture(mixture: MixtureConfig, path: str | os.PathLike[str]) -> None:
    """Write a mixture; what equals the default is left out."""
    groups = {
        group.name: {"weight": group.weight, "sources": {source.name: _plain(source) for source in group.sources}}
        for group in mixture.groups
    }
    text = yaml.safe_dump({"groups": groups}, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _plain(source: SourceConfig) -> Any:
    """Return what a file says of one source: its weight alone, if the rest is as expected."""
    assert source.recipe is not None, "a source without one has its data set's"
    usual = asdict(KNOWN_DATASETS[source.dataset].recipe)
    sampling = {name: value for name, value in asdict(source.recipe).items() if value != usual[name]}
    said: dict[str, Any] = {"weight": source.weight}
    said |= {} if source.dataset == source.name else {"dataset": source.dataset}
    said |= {} if source.split == "train" else {"split": source.split}
    said |= {} if source.data_dir is None else {"data_dir": source.data_dir}
    said |= {"sampling": sampling} if sampling else {}
    return said if len(said) > 1 else source.weight


def _group(file: YamlFile, name: str, node: yaml.Node) -> GroupConfig:
    keys = file.mapping(node, f"group `{name}`", ("weight", "sources"))
    for key in ("weight", "sources"):
        if key not in keys:
            raise file.error(node, f"group `{name}` has no `{key}`.")
    sources = file.mapping(keys["sources"], f"`sources` of group `{name}`")
    made = tuple(_source(file, source, value) for source, value in sources.items())
    return _made(file, keys["weight"], GroupConfig, name, file.scalar(keys["weight"], "weight"), made)


def _source(file: YamlFile, name: str, node: yaml.Node) -> SourceConfig:
    if isinstance(node, yaml.ScalarNode):
        keys = {"weight": node}
    else:
        keys = file.mapping(node, f"source `{name}`", _SOURCE_KEYS)
    if "weight" not in keys:
        raise file.error(node, f"source `{name}` has no `weight`.")
    texts = {key: file.text(keys[key], key) for key in ("dataset", "split", "data_dir") if key in keys}
    dataset = texts.get("dataset", name)
    if dataset not in KNOWN_DATASETS:
        hint = nearest(dataset, KNOWN_DATASETS)
        raise file.error(keys.get("dataset", node), f"source `{name}` is of the unknown data set `{dataset}`. {hint}")
    data_dir = texts.get("data_dir")
    return _made(
        file,
        keys["weight"],
        SourceConfig,
        name,
        file.scalar(keys["weight"], "weight"),
        dataset,
        texts.get("split", "train"),
        None if data_dir is None else os.path.abspath(file.path.parent / os.path.expanduser(data_dir)),
        _recipe(file, keys.get("sampling"), name, KNOWN_DATASETS[dataset].recipe),
    )


def _recipe(file: YamlFile, node: yaml.Node | None, name: str, usual: SamplingRecipe) -> SamplingRecipe:
    if node is None:
        return usual
    known = [field.name for field in fields(SamplingRecipe)]
    nodes = file.mapping(node, f"`sampling` of source `{name}`", known)
    given = {key: file.scalar(value, key) for key, value in nodes.items()}
    try:
        return replace(usual, **given)  # all at once, since one value may only be right with another
    except (TypeError, ValueError) as error:
        # The recipe's errors begin with the field's name.
        wrong = [value for key, value in nodes.items() if str(error).startswith(f"`{key}`")]
        raise file.error(wrong[0] if wrong else node, str(error)) from error


def _made(file: YamlFile, node: yaml.Node, make: Any, *values: Any) -> Any:
    """Call `make`, giving its error the place of `node`."""
    try:
        return make(*values)
    except (TypeError, ValueError) as error:
        raise file.error(node, str(error)) from error
