"""A prepared data set as a folder of Parquet files, which plain `load_dataset` reads, here or on the Hub.

`FOLDER/README.md` names the configs and splits, `FOLDER/<config>/<split>-00000-of-00001.parquet` hold the rows. Images
and video files go in byte for byte, or not at all: nothing is encoded anew.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import visa_hf.datasets_scripts as builders
from visa_hf.datasets_scripts.annotations import check_relative
from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS, KnownDataset
from visa_hf.datasets_scripts.publish_card import write_card

# Files of about this size are what the Hub advises; a group of rows is what a reader holds at a time.
_SHARD_BYTES = 500_000_000
_GROUP_BYTES = 50_000_000
_MAX_FILE_BYTES = 2**31 - 2**20  # a cell has 31 bits for its length, and the name needs some room
_FRAME_OF_VIDEO = re.compile(r"(.+)#[0-9]+")
_FRAME_FEATURES = datasets.Features({"path": datasets.Value("string"), "image": datasets.Image()})
_CLIP_FEATURES = datasets.Features({"path": datasets.Value("string"), "video": datasets.Value("large_binary")})


def publish_configs(name: str) -> dict[str, str]:
    """Which configs of a data set are published: the name that they get -> the builder's name for them.

    Raises:
        ValueError: the data set is not known.
    """
    known = _known(name)
    builder = getattr(builders, known.builder)
    available = [config.name for config in builder.BUILDER_CONFIGS]
    wanted = [*known.configs, *(["videos"] if "videos" in available else [])]
    return {config.rpartition("_")[2]: config for config in wanted}


def _known(name: str) -> KnownDataset:
    if name not in KNOWN_DATASETS:
        raise ValueError(f"There is no data set {name!r}. Known are {', '.join(KNOWN_DATASETS)}.")
    return KNOWN_DATASETS[name]


def export_dataset(
    name: str,
    data_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    with_frames: bool = False,
    licence: str | None = None,
    source: str | None = None,
    on_error: str = "raise",
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
) -> Path:
    """Prepare a data set and write it as a folder of Parquet files.

    Args:
        name (`str`): one of `KNOWN_DATASETS`.
        data_dir: the folder that holds the data set, as its builder wants it.
        output: folder to write; it must not exist, or be empty. It appears whole, or not at all.
        with_frames (`bool`): put the images (config "frames") and video files ("clips") in as well.
        licence, source (`str`, *optional*): for the card, in place of what is known; see `write_card`.
        on_error (`str`): "raise", or "skip" rows that cannot be used.
        cache_dir, num_proc: of the preparation.

    Returns:
        `Path`: the folder.

    Raises:
        AnnotationError: a row cannot be used.
        FileNotFoundError: the data set or one of its frames is not there.
        FileExistsError: `output` holds something already.
        ValueError: the data set is not known.
    """
    configs = publish_configs(name)
    target = Path(os.path.abspath(os.path.expanduser(output)))
    with _appearing_whole(target) as folder:
        num_rows: dict[str, dict[str, int]] = {}
        for config, config_name in configs.items():
            rows = _prepare(name, config_name, data_dir, on_error=on_error, cache_dir=cache_dir, num_proc=num_proc)
            num_rows[config] = {split: _write_rows(rows[split], folder / config, split) for split in rows}
            if with_frames and config in ("expressions", "conversations"):
                files = {split: _files_of(rows[split]) for split in rows}
        if with_frames:
            root = Path(os.path.abspath(os.path.expanduser(data_dir)))
            for kind, features, place in (("frames", _FRAME_FEATURES, 0), ("clips", _CLIP_FEATURES, 1)):
                written = {
                    split: _write_files(sorted(found[place]), root, features, folder / kind, split)
                    for split, found in files.items()
                    if found[place]
                }
                if written:
                    num_rows[kind] = written
        card = write_card(name, num_rows, licence=licence, source=source)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def _prepare(
    name: str,
    config_name: str,
    data_dir: str | os.PathLike[str],
    *,
    on_error: str,
    cache_dir: str | os.PathLike[str] | None,
    num_proc: int | None,
) -> dict[str, datasets.Dataset]:
    builder_class: Any = getattr(builders, _known(name).builder)
    builder = builder_class(config_name=config_name, data_dir=data_dir, cache_dir=cache_dir, on_error=on_error)
    builder.download_and_prepare(num_proc=num_proc)
    return {str(split): rows for split, rows in builder.as_dataset().items()}


def _write_rows(rows: datasets.Dataset, folder: Path, split: str) -> int:
    """Write one split of one config; returns the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = max(1, min(len(rows), -(-rows.data.nbytes // _SHARD_BYTES)))
    for shard in range(num_shards):
        part = rows.shard(num_shards, shard, contiguous=True)
        part.to_parquet(str(folder / _shard_name(split, shard, num_shards)))
    return len(rows)


def _shard_name(split: str, shard: int, num_shards: int) -> str:
    return f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"


# Files: images and video files


def _files_of(rows: datasets.Dataset) -> tuple[set[str], set[str]]:
    """The image files and the video files that the rows name."""
    names: set[str] = set()
    for batch in rows.select_columns("frames").with_format("arrow").iter(batch_size=1000):
        frames = batch["frames"].combine_chunks().flatten()
        names.update(pc.unique(frames).to_pylist())
    matches = {name: _FRAME_OF_VIDEO.fullmatch(name) for name in names}
    return {name for name, match in matches.items() if not match}, {match[1] for match in matches.values() if match}


def _write_files(names: Iterable[str], root: Path, features: datasets.Features, folder: Path, split: str) -> int:
    """Write files as rows, in groups, into as many shards as are needed; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    is_image = "image" in features
    count = 0
    shards: list[Path] = []
    writer: pq.ParquetWriter | None = None
    written = _SHARD_BYTES
    try:
        for group in _groups(names, root):
            if written >= _SHARD_BYTES:
                if writer is not None:
                    writer.close()
                shards.append(folder / f"{split}-{len(shards)}.partial")
                writer, written = pq.ParquetWriter(shards[-1], features.arrow_schema), 0
            contents = [{"bytes": data, "path": Path(name).name} for name, data in group] if is_image else None
            columns: dict[str, list[Any]] = {"path": [name for name, _ in group]}
            columns |= {"image": contents} if contents else {"video": [data for _, data in group]}
            assert writer is not None
            writer.write_table(pa.Table.from_pydict(columns, schema=features.arrow_schema))
            written += sum(len(data) for _, data in group)
            count += len(group)
    finally:
        if writer is not None:
            writer.close()
    for number, path in enumerate(shards):
        path.rename(folder / _shard_name(split, number, len(shards)))
    return count


def _groups(names: Iterable[str], root: Path) -> Iterator[list[tuple[str, bytes]]]:
    """Read files, some at a time."""
    group: list[tuple[str, bytes]] = []
    size = 0
    for name in names:
        path = root / check_relative(name)
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"`{path}` is larger than 2 GB, which Parquet cannot hold. Leave the frames out.")
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"`{name}`, which the annotations name, is not in `{root}`. Complete it, or leave the frames out."
            ) from error
        group.append((name, data))
        size += len(data)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextmanager
def _appearing_whole(target: Path) -> Iterator[Path]:
    """Lend a temporary folder beside `target`; on success it takes its place, on any failure it vanishes."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"`{target}` is a file or a link. Give a folder that does not exist.")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"The folder `{target}` is not empty. Give another one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already on success
