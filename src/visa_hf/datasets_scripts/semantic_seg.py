"""ADE20K, COCO-Stuff and Mapillary (label images), PASCAL-Part and PACO-LVIS (COCO's format): classes as expressions.

Each set from the folder that its authors publish, inside LISA's root (https://github.com/dvlab-research/LISA,
`utils/sem_seg_dataset.py`). A class name in an image is one expression; which classes VISA's training left out is
LISA's choice, kept here. How rows are made is in `label_images` and `part_annotations`.
"""

from collections.abc import Sequence
from pathlib import Path

from .annotations import AnnotationError, check_text, read_json
from .brief import brief
from .class_names import ADE20K_CLASSES, COCO_STUFF_CLASSES
from .label_images import LabelFolders, LabelImageBuilder
from .part_annotations import PartBuilder, PartFiles
from .still_images import join, set_folder

__all__ = ["ADE20K", "COCOStuff", "Mapillary", "PACOLVIS", "PascalPart"]


class ADE20K(LabelImageBuilder):
    """The 150 classes of ADE20K's scene parsing challenge; splits "train" and "val".

    Label 0 is "none of the classes" and gives no row. Names are the first synonyms of the set's own
    `objectInfo150.txt` where that lies beside the images, else the same from this package.

    Args:
        data_dir (`str` or `Path`): LISA's root (`ade20k` below it), or the folder `ADEChallengeData2016` itself.
        config_name (`str`, *optional*): `"expressions"` (default) or `"masks"`.
        **kwargs: as for any builder; `on_error="skip"` leaves out images that cannot be used.
    """

    SHORT_NAME = "ade20k"
    LAYOUT = """\
    [ade20k/]
      images/{training,validation}/NAME.jpg
      annotations/{training,validation}/NAME.png   label images, 0 to 150
      objectInfo150.txt                            optional: names of the classes"""

    def label_folders(self) -> dict[str, LabelFolders]:
        """Return where each split's label images and images lie."""
        folder = set_folder(self.root, "ade20k")
        return {
            split: LabelFolders(join(folder, "annotations", name), join(folder, "images", name))
            for split, name in (("train", "training"), ("val", "validation"))
        }

    def names_file(self) -> Path:
        """Return the file with the names of the classes, which may be missing."""
        return self.root / set_folder(self.root, "ade20k") / "objectInfo150.txt"

    def classes(self) -> dict[int, str | None]:
        """Return the class of each label; `None` for 0 and 255."""
        file = self.names_file()
        names = _object_info(file) if file.is_file() else ADE20K_CLASSES
        return {0: None, 255: None, **dict(enumerate(names, start=1))}


class COCOStuff(LabelImageBuilder):
    """COCO-Stuff's pixel maps (things and stuff); splits "train" and "val".

    Names come from the set's own `labels.txt` where that lies in `cocostuff`, else from this package. Classes with a
    "-" in their name ("wall-concrete", "building-other") give no row, as in LISA: they are no names people use.

    Args:
        data_dir (`str` or `Path`): LISA's root, with `cocostuff` and `coco` (the images) below it.
        config_name (`str`, *optional*): `"expressions"` (default) or `"masks"`.
        **kwargs: as for any builder; `on_error="skip"` leaves out images that cannot be used.
    """

    SHORT_NAME = "cocostuff"
    LAYOUT = """\
    cocostuff/{train2017,val2017}/NAME.png   label images: 0 to 181, 255 for none
    cocostuff/labels.txt                     optional: names of the classes
    coco/{train2017,val2017}/NAME.jpg"""

    def label_folders(self) -> dict[str, LabelFolders]:
        """Return where each split's label images and images lie."""
        names = (("train", "train2017"), ("val", "val2017"))
        return {split: LabelFolders(f"cocostuff/{name}", f"coco/{name}") for split, name in names}

    def names_file(self) -> Path:
        """Return the file with the names of the classes, which may be missing."""
        return self.root / "cocostuff" / "labels.txt"

    def classes(self) -> dict[int, str | None]:
        """Return the class of each label; `None` for 255 and for names with "-"."""
        file = self.names_file()
        names = _labels_txt(file) if file.is_file() else COCO_STUFF_CLASSES
        return {255: None, **{label: None if "-" in name else name for label, name in enumerate(names)}}


class Mapillary(LabelImageBuilder):
    """Mapillary Vistas 2.0; splits "train" and "val".

    Names are `readable` of the set's own `config_v2.0.json`; several labels of the same name are one class.
    "Unlabeled" gives no row; LISA asked for it like for a class.

    Args:
        data_dir (`str` or `Path`): LISA's root (`mapillary` below it), or that folder itself.
        config_name (`str`, *optional*): `"expressions"` (default) or `"masks"`.
        **kwargs: as for any builder; `on_error="skip"` leaves out images that cannot be used.
    """

    SHORT_NAME = "mapillary"
    LAYOUT = """\
    [mapillary/]
      config_v2.0.json
      {training,validation}/images/NAME.jpg
      {training,validation}/v2.0/labels/NAME.png   label images"""

    def label_folders(self) -> dict[str, LabelFolders]:
        """Return where each split's label images and images lie."""
        folder = set_folder(self.root, "mapillary")
        return {
            split: LabelFolders(join(folder, name, "v2.0/labels"), join(folder, name, "images"))
            for split, name in (("train", "training"), ("val", "validation"))
        }

    def names_file(self) -> Path:
        """Return the file with the names of the classes, which is needed."""
        return self.root / set_folder(self.root, "mapillary") / "config_v2.0.json"

    def classes(self) -> dict[int, str | None]:
        """Return the class of each label; `None` for "Unlabeled" and 255."""
        file = self.require(join(set_folder(self.root, "mapillary"), "config_v2.0.json"))[0]
        config = read_json(file)
        labels = config.get("labels") if isinstance(config, dict) else None
        if not isinstance(labels, list) or not all(isinstance(label, dict) for label in labels):
            raise AnnotationError.at("has no `labels`, a list of objects with `readable`.", file=file)
        names = [check_text(label.get("readable"), "readable", file=file).strip() for label in labels]
        return {
            255: None,
            **{label: None if name.lower() == "unlabeled" else name for label, name in enumerate(names)},
        }


class PascalPart(PartBuilder):
    """PASCAL-Part as VLPart publishes it, in COCO's format; split "train" (and "val" where `val.json` is there).

    The expression of "dog:head" is "the head of the dog".

    Args:
        data_dir (`str` or `Path`): LISA's root (`vlpart/pascal_part` below it), or that folder itself.
        config_name (`str`, *optional*): `"expressions"` (default) or `"masks"`.
        **kwargs: as for any builder; `on_error="skip"` leaves out what cannot be used.
    """

    SHORT_NAME = "pascal_part"
    LAYOUT = """\
    [vlpart/pascal_part/]
      train.json                              and val.json, if you have it
      VOCdevkit/VOC2010/JPEGImages/NAME.jpg"""

    def part_files(self) -> dict[str, PartFiles]:
        """Return each split's annotation file and folder of images."""
        folder = set_folder(self.root, "vlpart/pascal_part")
        images = join(folder, "VOCdevkit/VOC2010/JPEGImages")
        return {split: PartFiles(join(folder, f"{split}.json"), images) for split in ("train", "val")}


class PACOLVIS(PartBuilder):
    """PACO-LVIS: objects and their parts on COCO's images; splits "train", "val" and "test", those that are there.

    The expression of "mug:handle" is "the handle of the mug", that of "mug" is "mug"; "_" becomes a space, and what
    tells two meanings apart, as in "bat_(animal)", is left out, as in LISA.

    Args:
        data_dir (`str` or `Path`): LISA's root, with `vlpart/paco` and `coco` (the images) below it.
        config_name (`str`, *optional*): `"expressions"` (default) or `"masks"`.
        **kwargs: as for any builder; `on_error="skip"` leaves out what cannot be used.
    """

    SHORT_NAME = "paco_lvis"
    LAYOUT = """\
    vlpart/paco/annotations/paco_lvis_v1_{train,val,test}.json   or in annotations/paco_lvis_v1/
    coco/{train2017,val2017}/NAME.jpg"""

    def part_files(self) -> dict[str, PartFiles]:
        """Return each split's annotation file and folder of images."""
        folder = "vlpart/paco/annotations"
        if (self.root / folder / "paco_lvis_v1").is_dir():  # as the published archive unpacks
            folder = f"{folder}/paco_lvis_v1"
        names = ("train", "val", "test")
        return {split: PartFiles(f"{folder}/paco_lvis_v1_{split}.json", "coco") for split in names}

    def image_folders(self) -> Sequence[Path]:
        """Return the folders of COCO's images."""
        return [self.root / "coco" / name for name in ("train2017", "val2017")]


def _object_info(file: Path) -> list[str]:
    """Read `objectInfo150.txt`: a heading, then number, ratio, train, val and names, separated by tabs."""
    names = []
    for number, line in enumerate(_text_lines(file)[1:], start=1):
        columns = line.split("\t")
        if len(columns) != 5 or columns[0].strip() != str(number):
            raise AnnotationError.at(
                f"five columns, the first {number}, are needed, not {brief(line)}.", file=file, line=number + 1
            )
        names.append(check_text(columns[4].split(",")[0].strip(), "Name", file=file, line=number + 1))
    if len(names) != 150:
        raise AnnotationError.at(f"has {len(names)} classes; the challenge has 150.", file=file)
    return names


def _labels_txt(file: Path) -> list[str]:
    """Read `labels.txt`: `NUMBER: NAME` on each line, from 0, "unlabeled", on. Labels in images are one less."""
    names = []
    for number, line in enumerate(_text_lines(file)):
        label, separator, name = line.partition(":")
        if not separator or label.strip() != str(number):
            raise AnnotationError.at(f"`{number}: NAME` is needed, not {brief(line)}.", file=file, line=number + 1)
        names.append(check_text(name.strip(), "NAME", file=file, line=number + 1))
    if len(names) != 183:
        raise AnnotationError.at(f"has {len(names)} lines; 183 are needed, 0 (unlabeled) to 182.", file=file)
    return names[1:]


def _text_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError.at(f"is not UTF-8 text ({error}).", file=file) from error
