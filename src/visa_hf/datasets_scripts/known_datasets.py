"""The data sets that a mixture can name: their builders, the configs to prepare, and how VISA sampled from them.

Data only. `training_sources` makes sources of them, `mixture` knows their published shares.
"""

from dataclasses import dataclass

from visa_hf.datasets_scripts.sampling import SamplingRecipe

_VIDEO = SamplingRecipe()
# MeViS, ReVOS and LV-VIS: videos of a single frame were left out of training.
_LONG_VIDEO = SamplingRecipe(min_video_frames=2)
# An image's expression, above all a class name, may well be true of another image, so an empty mask would be a lie.
_IMAGE = SamplingRecipe(foreign_probability=0.0)
_LOWER_CASE_IMAGE = SamplingRecipe(foreign_probability=0.0, lower_case=True)
_CONVERSATION = SamplingRecipe()
_CHAT_UNIVI = SamplingRecipe(pad_to_square=True, last_turn_only=True)


@dataclass(frozen=True)
class KnownDataset:
    """How to build one data set for training.

    Attributes:
        builder (`str`): name of the class in `visa_hf.datasets_scripts`.
        recipe ([`SamplingRecipe`]): how VISA sampled from it.
        configs (`tuple[str, ...]`): the builder's configs of expressions and of masks, or the one of conversations.
        foregrounds (`str`, *optional*): its config of videos, where that has foregrounds.
    """

    builder: str
    recipe: SamplingRecipe
    configs: tuple[str, ...] = ("expressions", "masks")
    foregrounds: str | None = None


KNOWN_DATASETS: dict[str, KnownDataset] = {
    "mevis": KnownDataset("MeViS", _LONG_VIDEO),
    "ref_youtube_vos": KnownDataset("RefYoutubeVOS", _VIDEO),
    "ref_davis17": KnownDataset("RefDAVIS17", _VIDEO),
    "revos": KnownDataset("ReVOS", _LONG_VIDEO, foregrounds="videos"),
    "lv_vis": KnownDataset("LVVIS", _LONG_VIDEO),
    "reason_seg": KnownDataset("ReasonSeg", _IMAGE),
    "refclef": KnownDataset("ReferSeg", _LOWER_CASE_IMAGE, ("refclef_expressions", "refclef_masks")),
    "refcoco": KnownDataset("ReferSeg", _LOWER_CASE_IMAGE, ("refcoco_expressions", "refcoco_masks")),
    "refcoco+": KnownDataset("ReferSeg", _LOWER_CASE_IMAGE, ("refcoco+_expressions", "refcoco+_masks")),
    "refcocog": KnownDataset("ReferSeg", _LOWER_CASE_IMAGE, ("refcocog_expressions", "refcocog_masks")),
    "ade20k": KnownDataset("ADE20K", _LOWER_CASE_IMAGE),
    "cocostuff": KnownDataset("COCOStuff", _LOWER_CASE_IMAGE),
    "pascal_part": KnownDataset("PascalPart", _LOWER_CASE_IMAGE),
    "paco_lvis": KnownDataset("PACOLVIS", _LOWER_CASE_IMAGE),
    "mapillary": KnownDataset("Mapillary", _LOWER_CASE_IMAGE),
    "llava_instruct": KnownDataset("LLaVAInstruct", _CONVERSATION, ("conversations",)),
    "chat_univi_instruct": KnownDataset("ChatUniViInstruct", _CHAT_UNIVI, ("conversations",)),
    "own_data": KnownDataset("OwnData", _VIDEO),
    # Its sentences, above all those about one shape of many, may well be true of another video.
    "synthetic": KnownDataset("Synthetic", SamplingRecipe(foreign_probability=0.0), foregrounds="videos"),
}
