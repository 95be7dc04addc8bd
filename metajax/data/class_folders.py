"""Images in class folders, `CLASS/IMAGE.png`, decoded once and kept in the cache."""

import errno
import hashlib
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.data import few_shot
from metajax.data.few_shot import Splits
from metajax.data.files import (
  DataError,
  all_below,
  cache_directory,
  decode_image,
  existing_directory,
  files_below,
  fingerprint,
  is_hidden,
  read_archive,
  read_file,
  unwritable,
)

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_OTHERS = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd")  # images, not read here
_PARTS = ("train", "training", "test", "testing", "val", "valid", "validation")  # in other data too
_CACHE = 2  # the version of the cache, to be raised when images are decoded in another way
_CHANNELS = {"L": 1, "RGB": 3}
Mode = Literal["L", "RGB"]


class Format(NamedTuple):
  """What the images of a data set become.

  Attributes:
    height: in pixels.
    width: in pixels.
    mode: `"L"` (gray, one channel) or `"RGB"`.
    fit: whether images of another size are resized; otherwise they are refused.
    layout: what the folder of the data should hold, for error messages.
  """

  height: int
  width: int
  mode: Mode
  fit: bool
  layout: str

  @property
  def shape(self) -> tuple[int, int, int]:
    return (self.height, self.width, _CHANNELS[self.mode])


def from_folder(
  path: str | os.PathLike,
  *,
  size: int | tuple[int, int],
  mode: Mode = "RGB",
  validation: int | float = 0.16,
  test: int | float = 0.2,
  seed: int = 0,
  min_examples: int = 1,
  unreadable: Literal["refuse", "skip"] = "refuse",
  cache_dir: str | os.PathLike | None = None,
) -> Splits:
  """Reads images that lie in a folder for each class.

  The folder holds either the class folders (`CLASS/IMAGE.png`) or the folders `train`, `test` and
  perhaps `val` (or `valid`, `validation`), which hold class folders. In the first case, classes are
  divided at random into training, validation and test classes. Images are PNG, JPEG, BMP, GIF, WebP
  or TIFF, gray ones of 8 bits; of several frames or pages, the first one counts. Hidden files and
  files of other types are passed over. Images are decoded once and kept in the cache. An image that
  a class has twice, after resizing, is kept once, with a warning, since a task must not be tested
  by what it learns.

  Args:
    path: the folder.
    size: height and width in pixels, or one number for both. An image of another size is cropped
      around its centre to this aspect ratio and then resized.
    mode: `"RGB"`, or `"L"` for gray.
    validation: the number of validation classes, or, if it is below 1, their fraction of all.
    test: the number or the fraction of test classes.
    seed: determines which classes are for what.
    min_examples: classes with fewer images are left out, with a warning that names them.
    unreadable: whether files that are no readable image are an error, which lists the first ten, or
      are skipped with a warning.
    cache_dir: where prepared data is kept; by default as `cache_directory` says.

  Returns:
    Splits with inputs uint8 `[m, height, width, channels]`; class names are those of the folders.

  Raises:
    DataError: if the folder is missing, there are no images, a class has none, a file cannot be
      read or lies outside the folders of classes, a class is in two of the parts `train`, `val` and
      `test`, or the cache cannot be written.
    ValueError: if the size, the mode or `unreadable` is none of the above, or the classes cannot be
      divided in this way.
  """
  form = format_of(size, mode)
  _check_choice(unreadable)
  folder = existing_directory(path)
  divided = all((folder / part).is_dir() for part in ("train", "test"))
  sources = _parts(folder) if divided else {"all": [folder]}
  prepared = decoded(folder, sources, "folder", form, cache_dir, skip=unreadable == "skip")
  _warn([line for part in prepared.values() for line in part.unreadable])
  _warn_of_other_types(folder)
  kept = without_repeats([(images.pixels, images.labels) for images in prepared.values()])
  classes = {}
  for part, (pixels, labels) in zip(prepared, kept, strict=True):
    classes[part] = few_shot.grouped(pixels, labels, min_examples=min_examples)
  if not divided:
    return few_shot.split(classes["all"], validation=validation, test=test, seed=seed)
  on_device = {part: jax.tree.map(jnp.asarray, found) for part, found in classes.items()}
  return Splits(on_device["train"], on_device.get("val"), on_device["test"])


def without_repeats(
  parts: Sequence[tuple[np.ndarray, np.ndarray]], *, stacklevel: int = 3
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Images and labels of the parts of a data set, without images that their class has already.

  A warning says how many are left out, and how many images occur in several classes.
  """
  classes_of: dict[bytes, set[str]] = {}
  kept, repeated = [], 0
  for pixels, labels in parts:
    new = np.ones(len(labels), bool)
    for row, label in enumerate(labels.tolist()):
      content = hashlib.blake2b(pixels[row].tobytes(), digest_size=16).digest()
      found = classes_of.setdefault(content, set())
      new[row] = label not in found
      found.add(label)
    repeated += np.sum(~new)
    kept.append((pixels, labels) if new.all() else (pixels[new], labels[new]))
  if repeated:
    warnings.warn(
      f"{repeated} images are left out, since their class has the same image already",
      stacklevel=stacklevel,
    )
  shared = [sorted(found, key=str) for found in classes_of.values() if len(found) > 1]
  if shared:
    warnings.warn(
      f"some images ({len(shared)}) are in several classes, as in {shared[0][0]} and "
      f"{shared[0][1]}: see that they are labelled as you mean",
      stacklevel=stacklevel,
    )
  return kept


def _parts(folder: Path) -> dict[str, list[Path]]:
  """The folders of training, validation and test classes."""
  parts: dict[str, list[Path]] = {}
  for path in sorted(folder.iterdir()):
    if path.is_dir() and not is_hidden(path):
      part = "val" if path.name in ("valid", "validation") else path.name
      if part not in SPLITS or part in parts:
        raise DataError(
          f"{folder} holds {path.name} beside train and test: it should hold train, test and, if "
          "you like, val"
        )
      parts[part] = [path]
  return {part: parts[part] for part in SPLITS if part in parts}


class NamedImages(NamedTuple):
  """Images and where they were found.

  Attributes:
    names: the path of each image below the folder, such as `IMAGE.png` or `CLASS/IMAGE.png`.
    images: uint8 `[m, height, width, channels]`.
  """

  names: list[str]
  images: np.ndarray


def read_images(
  path: str | os.PathLike,
  *,
  size: int | tuple[int, int],
  mode: Mode = "RGB",
  unreadable: Literal["refuse", "skip"] = "refuse",
) -> NamedImages:
  """Reads all images below a folder, sorted by name; nothing is kept in the cache.

  Args:
    path: the folder.
    size: height and width in pixels, or one number for both; see `from_folder`.
    mode: `"RGB"`, or `"L"` for gray.
    unreadable: whether files that are no readable image are an error, which lists the first ten, or
      are skipped with a warning.

  Raises:
    DataError: if the folder is missing, there is no image, or one cannot be read.
    ValueError: if the size, the mode or `unreadable` is none of the above.
  """
  _check_choice(unreadable)
  form, folder = format_of(size, mode), existing_directory(path)
  found, bad = decode_source(folder, form)
  if unreadable == "refuse":
    _refuse(bad, form)
  if bad and not found:
    raise DataError(f"no image below {folder} can be read: {_listed(bad)}")
  _warn(bad)
  if not found:
    others = _of_other_types(folder)
    raise DataError(f"there is no image below {folder}{others}: see that it is the right folder")
  _warn_of_other_types(folder)
  return NamedImages([str(name) for name in found], np.stack(list(found.values())))


def format_of(size: int | tuple[int, int], mode: Mode) -> Format:
  """The format of images of any size that are made to fit.

  Raises:
    ValueError: if the size is not one or two whole numbers of at least 1, or the mode is not `"L"`
      or `"RGB"`.
  """
  sides: Any = size if np.shape(size) == (2,) else (size, size)
  height, width = sides
  if not all(isinstance(side, int | np.integer) for side in (height, width)):
    raise ValueError(f"size must be one whole number or two, not {size!r}")
  if min(height, width) < 1:
    raise ValueError(f"size must be at least 1, not {size}")
  if mode not in _CHANNELS:
    raise ValueError(f"mode must be 'L' or 'RGB', not {mode!r}")
  return Format(height, width, mode, True, "a folder of images for each class, CLASS/IMAGE.png")


class Images(NamedTuple):
  """The images of one part of a data set.

  Attributes:
    pixels: uint8 `[m, height, width, channels]`.
    labels: strings `[m]`, the class of each image.
    unreadable: what is wrong with each file that is left out.
  """

  pixels: np.ndarray
  labels: np.ndarray
  unreadable: list[str]


def decoded(
  folder: Path,
  sources: dict[str, list[Path]],
  name: str,
  form: Format,
  cache_dir: str | os.PathLike | None,
  *,
  skip: bool,
) -> dict[str, Images]:
  """Decodes all images, or reads them from the cache.

  Args:
    folder: all sources lie in it.
    sources: the folders and archives of each part.
    name: begins the name of the cache file.
    form: of the images.
    cache_dir: where the cache is.
    skip: whether to leave out what is no readable image.

  Raises:
    DataError: if there is no image in a part, a file lies in the wrong place, a class is in two
      parts, the cache cannot be written, or, unless they are skipped, files are no readable images;
      the first ten are listed.
  """
  files = [path for paths in sources.values() for path in _files(paths)]
  kind = "x".join(map(str, form.shape))
  skipped = "-skipped" if skip else ""
  home = cache_directory(cache_dir)
  cache = home / f"{name}-{_CACHE}-{kind}{skipped}-{fingerprint(folder, files)}.npz"
  if cache.is_file():
    return load_cache(cache, form)
  _check_folders(sources, form)
  _check_writable(home)  # before the images are decoded, which takes long
  parts = {part: _decode(paths, part, form) for part, paths in sources.items() if paths}
  bad = [line for images in parts.values() for line in images.unreadable]
  if not skip:
    _refuse(bad, form)
  _check_disjoint({part: np.unique(images.labels) for part, images in parts.items()}, form)
  try:
    _save(cache, parts)
  except DataError as error:  # as a full disk
    warnings.warn(f"{error}; the images are decoded again next time", stacklevel=3)
  return parts


def _check_writable(home: Path) -> None:
  try:
    home.mkdir(parents=True, exist_ok=True)
    if not os.access(home, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise unwritable(home, error) from error


def _check_folders(sources: dict[str, list[Path]], form: Format) -> None:
  """Checks the names in folders. What is in an archive is known when it has been read."""
  classes: dict[str, set[str]] = {}
  for part, paths in sources.items():
    for source in paths:
      if source.is_dir():
        empty = _empty_classes(source)
        if empty:
          raise DataError(
            f"{empty[0]} has no image{_of_other_types(empty[0])}: add the images of that class, or "
            "remove the folder"
          )
        for name, _ in files_below(source, SUFFIXES):
          _check_place(source, name, form)
          classes.setdefault(part, set()).add(name.parts[0])
    if paths and part not in classes and all(source.is_dir() for source in paths):
      raise _without_images(paths, form)
  _check_disjoint(classes, form)


def _without_images(paths: list[Path], form: Format) -> DataError:
  return DataError(
    f"{', '.join(map(str, paths))}: there is no image inside: it should hold {form.layout}"
  )


def _check_place(source: Path, name: PurePosixPath, form: Format) -> None:
  if len(name.parts) != 2:
    divided = "; if it is divided into parts, they are train, test and, if you like, val"
    raise DataError(
      f"{source} holds {name}, which is not CLASS/IMAGE: it should hold {form.layout}"
      + (divided if name.parts[0].lower() in _PARTS else "")
    )


def _check_disjoint(classes: Mapping[str, Iterable[str]], form: Format) -> None:
  """Checks that no class is in two parts."""
  merge = (
    "; or, if all parts have the same classes, merge them into one folder of class folders, which "
    "are then divided for you"
  )
  part_of: dict[str, str] = {}
  for part, labels in classes.items():
    for label in sorted(labels):
      if part_of.setdefault(label, part) != part:
        raise DataError(
          f"class {label} is in {part_of[label]} and in {part}: classes of different splits must "
          "be disjoint, so remove it from one" + (merge if form.fit else "")
        )


def decode_source(
  source: Path, form: Format, part: str = ""
) -> tuple[dict[PurePosixPath, np.ndarray], list[str]]:
  """Decodes every image below a folder or in an archive.

  Args:
    source: the folder or the archive.
    form: of the images.
    part: if names in an archive begin with this folder, it is taken off.

  Returns:
    The images by name, sorted, and what is wrong with each file that cannot be read.
  """
  images: dict[PurePosixPath, np.ndarray] = {}
  bad: list[str] = []
  for name, content in _read(source, part):
    if name in images:
      raise DataError(f"{source} holds {name} a second time: keep one of the two")
    try:
      images[name] = decode_image(
        read_file(content) if isinstance(content, Path) else content,
        f"{name} in {source}",
        size=(form.width, form.height),
        mode=form.mode,
        fit=form.fit,
      )
    except DataError as error:
      bad.append(str(error))
  return {name: images[name].reshape(form.shape) for name in sorted(images)}, bad


def _files(sources: list[Path]) -> Iterator[Path]:
  for source in sources:
    if not source.is_dir():
      yield source
      continue
    for path in all_below(source):
      if path.suffix.lower() in SUFFIXES or not path.is_file():
        yield path


def _read(source: Path, part: str) -> Iterator[tuple[PurePosixPath, Path | bytes]]:
  """Yields the name CLASS/IMAGE of each image, with its path, or its content in an archive."""
  if source.is_dir():
    yield from files_below(source, SUFFIXES)
    return
  for name, content in read_archive(source, SUFFIXES):
    parts = name.parts[1:] if name.parts[0] == part else name.parts
    yield PurePosixPath(*parts), content


def _empty_classes(folder: Path) -> list[Path]:
  """Class folders without an image. In an archive, these cannot be detected."""
  classes = (path for path in sorted(folder.iterdir()) if path.is_dir())
  visible = (path for path in classes if not is_hidden(path))
  return [path for path in visible if not any(files_below(path, SUFFIXES))]


def _decode(paths: list[Path], part: str, form: Format) -> Images:
  """Decodes the images of one part, which come from one or several folders and archives."""
  images: dict[PurePosixPath, np.ndarray] = {}
  bad: list[str] = []
  for source in paths:
    found, unreadable = decode_source(source, form, part)
    for name in found:
      _check_place(source, name, form)
      if name in images:
        raise DataError(f"{source} holds {name} a second time: keep one of the two")
    images |= found
    bad += unreadable
    del found  # of these images, only `images` is to know below
  if not images and bad:
    raise DataError(_listed(bad))
  if not images:
    raise _without_images(paths, form)
  names = sorted(images)
  pixels = np.empty((len(names), *form.shape), np.uint8)
  for row, name in enumerate(names):
    pixels[row] = images.pop(name)
  return Images(pixels, np.array([name.parts[0] for name in names], str), bad)


def _listed(lines: list[str]) -> str:
  shown = "; ".join(lines[:10])
  return f"{shown}; and {len(lines) - 10} more" if len(lines) > 10 else shown


def _check_choice(unreadable: str) -> None:
  if unreadable not in ("refuse", "skip"):
    raise ValueError(f"unreadable must be 'refuse' or 'skip', not {unreadable!r}")


def _refuse(bad: list[str], form: Format) -> None:
  if bad:
    advice = ", or skip such files (unreadable=skip)" if form.fit else ""
    raise DataError(_listed(bad) + advice)


def _warn(bad: list[str]) -> None:
  if bad:
    warnings.warn(f"images are skipped: {_listed(bad)}", stacklevel=3)


def _of_other_types(folder: Path) -> str:
  """Says how many images below a folder have types that are not read; "" if there are none."""
  others = [path for path in all_below(folder) if path.suffix.lower() in _OTHERS]
  kinds = ", ".join(sorted({path.suffix.lower() for path in others}))
  return f" ({len(others)} of types that are not read, {kinds}: convert them)" if others else ""


def _warn_of_other_types(folder: Path) -> None:
  others = _of_other_types(folder)
  if others:
    warnings.warn(f"images below {folder} are passed over{others}", stacklevel=3)


def _save(cache: Path, parts: dict[str, Images]) -> None:
  """Writes a temporary file, and renames it to `cache` when it is complete."""
  arrays: dict[str, Any] = {}
  for part, images in parts.items():
    arrays[f"{part}_images"] = images.pixels
    arrays[f"{part}_labels"] = images.labels
    arrays[f"{part}_unreadable"] = np.array(images.unreadable, str)
  beside = cache.with_name(f"{cache.stem}-{uuid.uuid4().hex}.partial.npz")
  try:
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
      np.savez(beside, **arrays)
      beside.replace(cache)
    finally:
      beside.unlink(missing_ok=True)
  except OSError as error:
    raise unwritable(cache.parent, error) from error


def load_cache(cache: Path, form: Format) -> dict[str, Images]:
  """Reads what `decoded` wrote.

  Raises:
    DataError: if the file is damaged.
  """
  try:
    # The file is a zip archive, so reading verifies checksums. It is opened here, since np.load
    # leaves a damaged file open if it opened the file itself.
    with cache.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
      parts = [name.removesuffix("_images") for name in file if name.endswith("_images")]
      return {part: _checked(file, part, form) for part in _in_order(parts)}
  except MemoryError:
    raise
  except PermissionError as error:
    raise DataError(f"the cache {cache} cannot be read ({error.strerror}): allow it") from error
  except Exception as error:  # whatever else the cause, the remedy is the same
    raise DataError(f"the cache {cache} is damaged: delete it, and it is made again") from error


def _in_order(parts: list[str]) -> list[str]:
  if set(parts) not in ({"all"}, {"train", "test"}, set(SPLITS)):
    raise ValueError(f"the parts are {parts}")
  return sorted(parts, key=("all", *SPLITS).index)


def _checked(file: Any, part: str, form: Format) -> Images:
  pixels, labels, unreadable = (
    file[f"{part}_{what}"] for what in ("images", "labels", "unreadable")
  )
  if pixels.shape[1:] != form.shape or pixels.dtype != np.uint8 or labels.shape != pixels.shape[:1]:
    raise ValueError(f"{part} is {pixels.dtype} {pixels.shape}")
  if labels.dtype.kind != "U" or unreadable.dtype.kind != "U":
    raise ValueError(f"its labels are {labels.dtype}")
  return Images(pixels, labels, unreadable.tolist())
