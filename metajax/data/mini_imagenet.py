"""mini-ImageNet (Vinyals et al. 2016): 84x84 RGB, Ravi & Larochelle's 64 / 16 / 20 classes."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from metajax.data.few_shot import Classes, Splits, from_arrays
from metajax.data.files import (
  DataError,
  cache_directory,
  decode_image,
  existing_directory,
  fingerprint,
  read_archive,
  read_folder,
  unwritable,
)

_SIZE = 84
_SUFFIXES = (".jpg", ".jpeg", ".png")
_SPLITS = ("train", "val", "test")
_LAYOUT = (
  "train*.tar.gz, val*.tar.gz and test*.tar.gz, holding SPLIT/CLASS/IMAGE.jpg, or folders "
  "train/CLASS, val/CLASS and test/CLASS, all images 84x84"
)


def load(
  data_dir: str | os.PathLike | None, *, cache_dir: str | os.PathLike | None = None
) -> Splits:
  """Loads mini-ImageNet. Classes may differ in size, and validation classes may be missing.

  The images may not be redistributed (ImageNet's terms), so there is no download: make them from
  ILSVRC-2012 with Ravi & Larochelle's lists. They are decoded once and kept in the cache.

  Args:
    data_dir: a folder with archives (`train*.tar.gz`, `val*.tar.gz`, `test*.tar.gz`; all
      that match are read) or with class folders (`train/CLASS/IMAGE.jpg`, ...).
    cache_dir: by default `$METAJAX_CACHE` or `~/.cache/metajax`.

  Returns:
    Splits with inputs uint8 `[m, 84, 84, 3]`.

  Raises:
    DataError: if there are no images, or a file is damaged or has another size.
  """
  if data_dir is None:
    raise DataError(
      "mini-ImageNet cannot be downloaded (ImageNet's terms): make the 84x84 images from "
      "ILSVRC-2012 with Ravi & Larochelle's lists and give, as data_dir, a folder with " + _LAYOUT
    )
  folder = existing_directory(data_dir)
  sources = {split: _sources(folder, split) for split in _SPLITS}
  for split in ("train", "test"):
    if not sources[split]:
      raise DataError(f"{folder} has no {split} images: it should hold {_LAYOUT}")
  files = [path for split in _SPLITS for path in _files(sources[split])]
  cache = cache_directory(cache_dir) / f"mini_imagenet-{fingerprint(folder, files)}.npz"
  if not cache.is_file():
    _prepare(sources, cache)
  return _load(cache)


def _sources(folder: Path, split: str) -> list[Path]:
  folders = [folder / split] if (folder / split).is_dir() else []
  return sorted(folder.glob(f"{split}*.tar.gz")) + folders


def _files(sources: list[Path]) -> Iterator[Path]:
  for source in sources:
    yield from (source.rglob("*") if source.is_dir() else [source])


def _read(source: Path, split: str) -> Iterator[tuple[PurePosixPath, bytes]]:
  """Yields the name CLASS/IMAGE and the content of each image of an archive or folder."""
  if source.is_dir():
    yield from read_folder(source, _SUFFIXES)
    return
  for name, content in read_archive(source, _SUFFIXES):
    parts = name.parts[1:] if name.parts[0] == split else name.parts
    yield PurePosixPath(*parts), content


def _empty_classes(folder: Path) -> list[Path]:
  """Class folders without an image. In an archive, these cannot be detected."""
  classes = (path for path in sorted(folder.iterdir()) if path.is_dir())
  visible = (path for path in classes if not path.name.startswith("."))
  return [path for path in visible if not any(read_folder(path, _SUFFIXES))]


def _prepare(sources: dict[str, list[Path]], cache: Path) -> None:
  """Decodes all images into a temporary file, and renames it to `cache` when it is complete."""
  arrays: dict[str, np.ndarray] = {}
  split_of: dict[str, str] = {}
  for split, paths in sources.items():
    if paths:
      arrays[f"{split}_images"], arrays[f"{split}_labels"], names = _decode(paths, split)
      for name in names:
        if split_of.setdefault(name, split) != split:
          raise DataError(
            f"class {name} is in {split_of[name]} and in {split}: classes of different splits must "
            "be disjoint, so remove it from one"
          )
  beside = cache.with_name(f"{cache.stem}-{os.getpid()}.partial.npz")
  try:
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
      np.savez(beside, **arrays)  # type: ignore[arg-type]
      beside.replace(cache)
    finally:
      beside.unlink(missing_ok=True)
  except OSError as error:
    raise unwritable(cache.parent, error) from error


def _decode(paths: list[Path], split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """Returns images uint8 `[m, 84, 84, 3]`, labels `[m]`, and the class name of each label."""
  images: dict[PurePosixPath, np.ndarray] = {}
  for source in paths:
    empty = _empty_classes(source) if source.is_dir() else []
    if empty:
      raise DataError(
        f"{empty[0]} has no image: add the images of that class, or remove the folder"
      )
    for name, content in _read(source, split):
      if len(name.parts) != 2:
        raise DataError(
          f"{source} holds {name}, which is not CLASS/IMAGE: it should hold {_LAYOUT}"
        )
      if name in images:
        raise DataError(f"{source} holds {name} a second time: keep one of the two")
      images[name] = decode_image(content, f"{name} in {source}", size=(_SIZE, _SIZE), mode="RGB")
  if not images:
    raise DataError(
      f"{', '.join(map(str, paths))}: there is no image inside: it should hold {_LAYOUT}"
    )
  names = sorted(images)
  classes = sorted({name.parts[0] for name in names})
  label_of = {name: label for label, name in enumerate(classes)}
  stacked = np.empty((len(names), _SIZE, _SIZE, 3), np.uint8)
  for row, name in enumerate(names):
    stacked[row] = images.pop(name)
  return stacked, np.array([label_of[name.parts[0]] for name in names], np.int32), classes


def _load(cache: Path) -> Splits:
  try:
    # The file is a zip archive, so reading verifies checksums. It is opened here, since np.load
    # leaves a damaged file open if it opened the file itself.
    with cache.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
      validation = _split(file, "val") if "val_images" in file else None
      return Splits(_split(file, "train"), validation, _split(file, "test"))
  except Exception as error:  # whatever the cause, the remedy is the same
    raise DataError(f"the cache {cache} is damaged: delete it, and it is made again") from error


def _split(file: Any, split: str) -> Classes:
  images = file[f"{split}_images"]
  if images.shape[1:] != (_SIZE, _SIZE, 3) or images.dtype != np.uint8:
    raise ValueError(f"{split} is {images.dtype} {images.shape}")
  return from_arrays(images, file[f"{split}_labels"])
