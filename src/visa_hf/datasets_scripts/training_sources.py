"""Sources of a mixture, made from the folders of their data sets with the builders.

Preparation is the builders' (a cache that is found again while the annotation files stay as they are); sampling is
`samples`. This joins the two for training.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import datasets

from visa_hf import datasets_scripts
from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.mixture import GroupConfig, MixtureConfig, SourceConfig
from visa_hf.datasets_scripts.samples import ConversationSource, ExpressionSource, Source

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


def load_sources(
    mixture: MixtureConfig,
    roots: Mapping[str, PathLike] | None = None,
    *,
    cache_dir: PathLike | None = None,
    num_proc: int | None = None,
    on_error: str = "raise",
    renormalise: bool = False,
    with_foregrounds: bool = False,
) -> dict[str, Source]:
    """Prepare the data sets of a mixture and return its sources by name.

    Args:
        mixture ([`MixtureConfig`]): what to load. Sources and groups of weight 0 are left out.
        roots (`Mapping[str, str]`, *optional*): folders by name of a source, a data set or a group (looked up in this
            order); they go before the mixture's `data_dir`.
        cache_dir (`str`, *optional*): where prepared rows are kept; the cache of `datasets` by default.
        num_proc (`int`, *optional*): processes that prepare a data set.
        on_error (`str`): `"raise"`, or `"skip"` rows that cannot be used, while preparing.
        renormalise (`bool`): leave out sources that have no folder; hand the same to [`TrainingSamples`].
        with_foregrounds (`bool`): let samples have their foreground, where a data set knows it.

    Returns:
        `dict[str, Source]`: in the order of the mixture.

    Raises:
        FileNotFoundError: a folder is given that does not exist.
        ValueError: a source has no folder (all such are named), `roots` has an unknown name, or a data set has no such
            split.
        AnnotationError: an annotation cannot be used.
    """
    given = dict(roots or {})
    known = {name for group in mixture.groups for name in (group.name, *_names_of(group))}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"Folders are given for {', '.join(unknown)}, which the mixture does not name. Remove them.")
    folders: dict[str, Path] = {}
    drawn = [(g, s) for g in mixture.groups for s in g.sources if g.weight > 0 and s.weight > 0]
    for group, source in drawn:
        named = [given[key] for key in (source.name, source.dataset, group.name) if key in given]
        folder = named[0] if named else source.data_dir
        if folder is not None:
            folders[source.name] = Path(folder).expanduser().absolute()
    mixture.probabilities(folders, renormalise=renormalise)  # refuses sources without a folder, unless told otherwise
    missing = [f"`{folder}` (source `{name}`)" for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(f"There is no folder {', '.join(missing)}. Correct the path.")
    return {
        source.name: _load_source(source, folders[source.name], cache_dir, num_proc, on_error, with_foregrounds)
        for _, source in drawn
        if source.name in folders
    }


def _names_of(group: GroupConfig) -> list[str]:
    return [name for source in group.sources for name in (source.name, source.dataset)]


def _load_source(
    source: SourceConfig,
    folder: Path,
    cache_dir: PathLike | None,
    num_proc: int | None,
    on_error: str,
    with_foregrounds: bool,
) -> Source:
    """Prepare one data set and make a source of it."""
    known = KNOWN_DATASETS[source.dataset]

    def load(config: str) -> datasets.Dataset:
        builder = getattr(datasets_scripts, known.builder)(
            config_name=config, data_dir=folder, cache_dir=cache_dir, on_error=on_error
        )
        builder.download_and_prepare(num_proc=num_proc)
        if source.split not in builder.info.splits:
            raise ValueError(
                f"Source `{source.name}` is to have the split {source.split!r}, but `{folder}` has "
                f"{', '.join(map(repr, builder.info.splits))}. Name one of those."
            )
        return builder.as_dataset(split=source.split)

    rows = [load(config) for config in known.configs]
    if len(rows) == 1:
        return ConversationSource(source.name, rows[0], folder, source.recipe)
    videos = None
    if with_foregrounds and known.foregrounds is not None:
        try:
            videos = load(known.foregrounds)
        except FileNotFoundError as error:  # expressions and masks are there, so it is the foregrounds that are not
            logger.info("Source `%s` has no foregrounds, so there will be no robustness R: %s", source.name, error)
    return ExpressionSource(source.name, rows[0], rows[1], folder, source.recipe, videos=videos)
