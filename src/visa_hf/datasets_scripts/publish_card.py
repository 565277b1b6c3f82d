"""The page of a published data set: what it is, whose it is, and how the Hub finds its tables.

Licences are those that the authors state, as far as known here; they are to be read at the source before anything is
passed on.
"""

from dataclasses import dataclass

import yaml

_COCO_IMAGES = "the images are those of COCO, under the licences of Flickr's users"


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from.

    Attributes:
        title (`str`): its name.
        source (`str`): URL of its authors' page.
        licence (`str`): what they say about its use, as far as known.
    """

    title: str
    source: str
    licence: str


_REFER = "https://github.com/lichengunc/refer"
_UNKNOWN = "not known here"
ORIGINS: dict[str, Origin] = {
    "revos": Origin("ReVOS", "https://github.com/cilinyan/VISA", f"{_UNKNOWN}; its clips come from other sets"),
    # Whoever draws the clips may say what they like.
    "synthetic": Origin("Synthetic clips of moving shapes", "`visa data synthesize`", "free: drawn by a program"),
    "mevis": Origin("MeViS", "https://github.com/henghuiding/MeViS", "for non-commercial research only"),
    "ref_youtube_vos": Origin("Ref-YouTube-VOS", "https://youtube-vos.org/dataset/rvos", _UNKNOWN),
    "ref_davis17": Origin("Ref-DAVIS17", "https://davischallenge.org", _UNKNOWN),
    "lv_vis": Origin("LV-VIS", "https://github.com/haochenheheda/LVVIS", _UNKNOWN),
    "reason_seg": Origin("ReasonSeg", "https://github.com/dvlab-research/LISA", _UNKNOWN),
    "refclef": Origin("refCLEF", _REFER, _UNKNOWN),
    "refcoco": Origin("RefCOCO", _REFER, f"{_UNKNOWN}; {_COCO_IMAGES}"),
    "refcoco+": Origin("RefCOCO+", _REFER, f"{_UNKNOWN}; {_COCO_IMAGES}"),
    "refcocog": Origin("RefCOCOg", _REFER, f"{_UNKNOWN}; {_COCO_IMAGES}"),
    "ade20k": Origin("ADE20K", "https://groups.csail.mit.edu/vision/datasets/ADE20K", _UNKNOWN),
    "cocostuff": Origin("COCO-Stuff", "https://github.com/nightrome/cocostuff", f"CC BY 4.0; {_COCO_IMAGES}"),
    "pascal_part": Origin("PASCAL-Part", "https://roozbehm.info/pascal-parts/pascal-parts.html", _UNKNOWN),
    "paco_lvis": Origin("PACO-LVIS", "https://github.com/facebookresearch/paco", f"{_UNKNOWN}; {_COCO_IMAGES}"),
    "mapillary": Origin("Mapillary Vistas", "https://www.mapillary.com/dataset/vistas", "CC BY-NC-SA 4.0"),
    "llava_instruct": Origin(
        "LLaVA-Instruct-150k",
        "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        f"CC BY 4.0, and OpenAI's terms of use; {_COCO_IMAGES}",
    ),
    "chat_univi_instruct": Origin(
        "Chat-UniVi-Instruct", "https://huggingface.co/datasets/Chat-UniVi/Chat-UniVi-Instruct", "Apache 2.0"
    ),
}
_CONTENTS = {
    "expressions": "an expression (a sentence) of a video a row, with the ids of the objects that it means",
    "masks": "an annotated object of a video a row: its mask in every frame as COCO run lengths, null where it is not",
    "videos": "a video a row: its frames, their size, all annotated objects together",
    "conversations": "a conversation about images or a video a row, all rounds",
    "frames": "an image file a row, byte for byte as its authors give it; `path` is what `frames` names elsewhere",
    "clips": "a video file a row, byte for byte; `frames` names its frames as `path#number`, counted from 0",
}


def write_card(
    name: str, num_rows: dict[str, dict[str, int]], *, licence: str | None = None, source: str | None = None
) -> str:
    """Write the text of `README.md`.

    Args:
        name (`str`): of the data set.
        num_rows (`dict`): config -> split -> number of rows.
        licence (`str`, *optional*): identifier as the Hub has it (`cc-by-4.0`), in place of what is known.
        source (`str`, *optional*): URL or words, in place of what is known.

    Returns:
        `str`: YAML between lines `---`, which names every config and its files, then Markdown.
    """
    origin = ORIGINS.get(name, Origin("Our own data", "the one who publishes it", _UNKNOWN))
    header = {
        "pretty_name": origin.title,
        "license": licence or ("other" if name in ORIGINS else "unknown"),
        "tags": ["video-segmentation", "visa"],
        "configs": [
            {
                "config_name": config,
                **({"default": True} if number == 0 else {}),
                "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in splits],
            }
            for number, (config, splits) in enumerate(num_rows.items())
        ],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", f"# {origin.title}"]
    lines += ["", f"Source: {source or origin.source}", "", f"Licence: {licence or origin.licence}."]
    if licence is None:
        lines += [
            "Read the licence at the source before you pass this on: it covers the annotations and the pictures."
        ]
    lines += ["", "| config | rows | a row |", "|---|---|---|"]
    for config, splits in num_rows.items():
        counts = ", ".join(f"{split} {count}" for split, count in splits.items())
        lines.append(f"| `{config}` | {counts} | {_CONTENTS[config]} |")
    lines += ["", "```python", "from datasets import load_dataset", ""]
    lines += [f'{config} = load_dataset(PATH_OR_NAME, "{config}")' for config in num_rows]
    lines += ["```", ""]
    if not {"frames", "clips"} & set(num_rows):
        lines += [
            "Frames are named by paths relative to the folder that the source gives; pictures are not in here.",
            "",
        ]
    return "\n".join([*lines, "Made by `visa data push` of visa_hf.", ""])
