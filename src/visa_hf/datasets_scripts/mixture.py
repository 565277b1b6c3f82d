"""Which source a training sample comes from: the published rates, and samples as a function of their number.

The mixture of VISA (https://huggingface.co/papers/2407.11325): groups of sources drawn at given rates, and inside a
group each source at its own. A run's data is a row of draw numbers; a number and the seed are all that a sample
depends on, so training resumes anywhere by going on at the next number. Files are read in `mixture_yaml`, sources
made in `training_sources`.
"""

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import index

from torch.utils.data import Dataset

from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.frame_store import FrameError
from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.samples import Sample, Source
from visa_hf.datasets_scripts.sampling import SamplingRecipe, random_generator

logger = logging.getLogger(__name__)

# The rates of the published training script. Nothing is published about the sets inside `sem_seg` and `refer_seg`:
# each is drawn equally often, as in LISA.
_PUBLISHED: dict[str, tuple[float, dict[str, float]]] = {
    "sem_seg": (9, {"ade20k": 1, "cocostuff": 1, "pascal_part": 1, "paco_lvis": 1, "mapillary": 1}),
    "refer_seg": (3, {"refclef": 1, "refcoco": 1, "refcoco+": 1, "refcocog": 1}),
    "vqa": (3, {"llava_instruct": 1}),
    "reason_seg": (1, {"reason_seg": 1}),
    "chatunivi": (4, {"chat_univi_instruct": 1}),
    "rvos": (12, {"mevis": 4000, "ref_youtube_vos": 15000, "ref_davis17": 400, "revos": 3000, "lv_vis": 3000}),
}

# Unreadable samples in a row after which it is the data that is broken, not a file here and there.
MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        name (`str`): unique in the mixture.
        weight (`float`): its share of its group, relative to the others'.
        dataset (`str`): one of `KNOWN_DATASETS`.
        split (`str`): split of that data set.
        data_dir (`str`, *optional*): folder of the data set; may also be given when sources are loaded.
        recipe ([`SamplingRecipe`], *optional*): how to sample; by default as VISA did from this data set.
    """

    name: str
    weight: float
    dataset: str
    split: str = "train"
    data_dir: str | None = None
    recipe: SamplingRecipe | None = None

    def __post_init__(self) -> None:
        _check_weight(self.name, self.weight)
        if self.dataset not in KNOWN_DATASETS:
            raise ValueError(
                f"Source `{self.name}` is of data set {self.dataset!r}, but known are {', '.join(KNOWN_DATASETS)}."
            )
        if self.recipe is None:
            object.__setattr__(self, "recipe", KNOWN_DATASETS[self.dataset].recipe)


@dataclass(frozen=True)
class GroupConfig:
    """Sources that share one rate.

    Attributes:
        name (`str`): unique in the mixture.
        weight (`float`): share of the group in all samples, relative to the other groups'.
        sources (`tuple[SourceConfig, ...]`): at least one.
    """

    name: str
    weight: float
    sources: tuple[SourceConfig, ...]

    def __post_init__(self) -> None:
        _check_weight(self.name, self.weight)
        if not self.sources:
            raise ValueError(f"Group `{self.name}` has no sources. Give it one, or leave it out.")
        if self.weight > 0 and not any(source.weight > 0 for source in self.sources):
            raise ValueError(
                f"Group `{self.name}` has weight {self.weight}, but the weights of its sources are all 0."
            )


@dataclass(frozen=True)
class MixtureConfig:
    """Groups of sources and their rates.

    Attributes:
        groups (`tuple[GroupConfig, ...]`): at least one with a weight above 0.
    """

    groups: tuple[GroupConfig, ...]

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        for kind, given in (("Source", names), ("Group", [group.name for group in self.groups])):
            twice = [name for name in given if given.count(name) > 1]
            if twice:
                raise ValueError(f"{kind} `{twice[0]}` is there twice. Give each a name of its own.")
        if not any(group.weight > 0 for group in self.groups):
            raise ValueError("No group has a weight above 0, so there is nothing to draw from.")

    @classmethod
    def published(cls) -> "MixtureConfig":
        """Return VISA's mixture, without folders."""
        return cls(
            tuple(
                GroupConfig(
                    name, weight, tuple(SourceConfig(source, share, source) for source, share in shares.items())
                )
                for name, (weight, shares) in _PUBLISHED.items()
            )
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MixtureConfig":
        """Read a YAML file; see [`visa_hf.datasets_scripts.mixture_yaml.read_mixture`]."""
        from visa_hf.datasets_scripts.mixture_yaml import read_mixture

        return read_mixture(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file that [`MixtureConfig.load`] reads."""
        from visa_hf.datasets_scripts.mixture_yaml import write_mixture

        write_mixture(self, path)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All sources, group by group."""
        return tuple(source for group in self.groups for source in group.sources)

    def with_folders(self, folders: Collection[str]) -> list[str]:
        """Return the names of the sources that have a folder: one of their own, or one given.

        Args:
            folders (collection of `str`): names of sources, data sets or groups whose folder is given.
        """
        return [
            source.name
            for group in self.groups
            for source in group.sources
            if source.data_dir is not None or {source.name, source.dataset, group.name} & set(folders)
        ]

    def probabilities(self, available: Iterable[str] | None = None, *, renormalise: bool = False) -> dict[str, float]:
        """Return the probability of each source that can be drawn, in the order of the file; their sum is 1.

        Args:
            available (`Iterable[str]`, *optional*): names of the sources that are at hand; all by default.
            renormalise (`bool`): leave out sources that are not at hand. The others of a group share its rate, and a
                group without any gives its rate to the other groups.

        Raises:
            ValueError: a source is not at hand and `renormalise` is off, none is left, or `available` names one that
                is not in the mixture.
        """
        at_hand = {source.name for source in self.sources} if available is None else set(available)
        unknown = sorted(at_hand - {source.name for source in self.sources})
        if unknown:
            raise ValueError(
                f"The mixture has no source {', '.join(f'`{name}`' for name in unknown)}. Give it a weight, or leave "
                "it out."
            )
        drawable = [group for group in self.groups if group.weight > 0]
        missing = [s.name for group in drawable for s in group.sources if s.weight > 0 and s.name not in at_hand]
        if missing and not renormalise:
            raise ValueError(
                f"The mixture draws from {', '.join(f'`{name}`' for name in missing)}, which is not at hand. Give its "
                "folder, set its weight to 0, or pass `renormalise=True` to share its rate among the others."
            )
        shares = {
            group: {s.name: s.weight for s in group.sources if s.weight > 0 and s.name in at_hand}
            for group in drawable
        }
        total = math.fsum(group.weight for group, weights in shares.items() if weights)
        if total == 0:
            raise ValueError("None of the mixture's sources is at hand, so there is nothing to draw from.")
        return {
            name: group.weight / total * weight / math.fsum(weights.values())
            for group, weights in shares.items()
            for name, weight in weights.items()
        }

    def counts(
        self, num_draws: int, available: Iterable[str] | None = None, *, renormalise: bool = False
    ) -> dict[str, float]:
        """Return how many of `num_draws` samples are expected from each source."""
        probabilities = self.probabilities(available, renormalise=renormalise)
        return {name: num_draws * probability for name, probability in probabilities.items()}


class TrainingSamples(Dataset[Sample]):
    """All samples of a run, by number: a map-style data set whose items are made when they are asked for.

    Sample i is a function of (sources, mixture, seed, i). Workers, ranks, and the order of asking change nothing, and
    it may be pickled and forked. To resume, go on with the next number.

    Args:
        sources (`Mapping[str, Source]`): what to draw from, by the names of the mixture.
        mixture ([`MixtureConfig`] or `Mapping[str, float]`): the rates, or simply a weight for each source.
        seed (`int`): of the run.
        num_draws (`int`): how many samples there are: steps times samples a step.
        on_error (`str`): what to do about a frame that cannot be read, or a mask that does not fit it: `"raise"`, or
            `"skip"`: draw again from the same source with other numbers, which depend on seed, draw and attempt alone.
            Each is logged and counted in `num_skipped` (of this process) and in the sample's `attempt`.
        renormalise (`bool`): do without sources that the mixture names but that are not given.

    Raises:
        ValueError: sources and mixture do not fit together, or a number is out of its range.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixture: MixtureConfig | Mapping[str, float],
        seed: int,
        num_draws: int,
        *,
        on_error: str = "raise",
        renormalise: bool = False,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` is {on_error!r} but must be "raise" or "skip".')
        if num_draws < 0:
            raise ValueError(f"`num_draws` is {num_draws} but must be at least 0.")
        random_generator(seed, num_draws)  # checks both
        if isinstance(mixture, MixtureConfig):
            probabilities = mixture.probabilities(sources, renormalise=renormalise)
        else:
            probabilities = _probabilities_of(mixture, sources)
        self.probabilities = probabilities
        self.seed, self.num_draws, self.on_error = seed, num_draws, on_error
        self.num_skipped = 0
        self._sources = [sources[name] for name in probabilities]
        self._names = list(probabilities)
        self._bounds = list(accumulate(probabilities.values()))

    def __len__(self) -> int:
        return self.num_draws

    def source_of(self, draw: int) -> str:
        """Return the name of the source of one draw, without making the sample."""
        return self._names[self._pick(random_generator(self.seed, self._checked(draw)).random())]

    def __getitem__(self, draw: int) -> Sample:
        """Make one sample.

        Raises:
            IndexError: there is no draw of that number.
            FrameError: a frame cannot be read.
            AnnotationError: a mask is damaged or does not fit its frame.
            RuntimeError: with `on_error="skip"`, nothing could be read in many attempts.
        """
        draw = self._checked(draw)
        rng = random_generator(self.seed, draw)
        source = self._sources[self._pick(rng.random())]
        if self.on_error == "raise":
            return source.sample(rng, draw)
        for attempt in range(MAX_ATTEMPTS):
            try:
                return replace(source.sample(rng, draw), attempt=attempt)
            except (FrameError, AnnotationError) as error:
                self.num_skipped += 1
                logger.warning(
                    "Draw %d from `%s` is drawn again (%d so far in this process): %s",
                    draw,
                    source.name,
                    self.num_skipped,
                    error,
                )
                last, rng = error, random_generator(self.seed, draw, attempt + 1)
        raise RuntimeError(
            f"Draw {draw} from `{source.name}` failed {MAX_ATTEMPTS} times. Repair the data, or leave the source out. "
            f"The last error: {last}"
        ) from last

    def _checked(self, draw: int) -> int:
        draw = index(draw)
        if not 0 <= draw < self.num_draws:
            raise IndexError(f"Draw {draw} is outside the run, which has {self.num_draws}.")
        return draw

    def _pick(self, position: float) -> int:
        """Return the number of the source that holds `position`, in [0, 1)."""
        for number, bound in enumerate(self._bounds):
            if position < bound:
                return number
        return len(self._bounds) - 1  # the bounds' rounding


def _probabilities_of(weights: Mapping[str, float], sources: Mapping[str, Source]) -> dict[str, float]:
    """Return the probability of each source with a plain weight above 0."""
    for name, weight in weights.items():
        _check_weight(name, weight)
    missing = [name for name, weight in weights.items() if weight > 0 and name not in sources]
    unweighed = [name for name in sources if name not in weights]
    if missing or unweighed:
        raise ValueError(
            f"Weights are given for {', '.join(weights)}, but the sources are {', '.join(sources)}. Give one weight "
            "for each source."
        )
    total = math.fsum(weights.values())
    if total == 0:
        raise ValueError("No source has a weight above 0, so there is nothing to draw from.")
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def _check_weight(name: str, weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"The weight of `{name}` is {weight!r} but must be a number.")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"The weight of `{name}` is {weight} but must be at least 0, and finite.")
