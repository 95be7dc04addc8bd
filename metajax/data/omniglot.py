"""Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, 20 drawings each, as 28x28 images.

It is read with TensorFlow Datasets from array_record files; TensorFlow itself is not needed.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metajax.data.few_shot import Classes, Splits, from_arrays
from metajax.data.files import (
  DataError,
  cache_directory,
  decode_image,
  existing_directory,
  fingerprint,
  read_archive,
  unwritable,
)

URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
# The archive of each split and its number of characters; every character has 20 drawings.
ARCHIVES = {"train": ("images_background.zip", 964), "test": ("images_evaluation.zip", 659)}
DRAWINGS = 20
_TRAIN_CHARACTERS = 1200  # in the paper's pooled protocol; the other 423 are for testing
_SOURCE_SIZE, _SIZE = 105, 28


def load(
  data_dir: str | os.PathLike | None = None,
  *,
  protocol: Literal["pooled", "alphabets"] = "pooled",
  seed: int = 0,
  cache_dir: str | os.PathLike | None = None,
) -> Splits:
  """Loads Omniglot.

  Args:
    data_dir: a folder with the official `images_background.zip` and `images_evaluation.zip`; None
      downloads them. They are converted once, and the result is kept in the cache.
    protocol: `"pooled"`, as in the paper: of all characters, 1,200 random ones are for training,
      with each rotated by 0, 90, 180 and 270 degrees to make four classes (4,800 in all), and the
      other 423 for testing, not rotated. `"alphabets"`: the 964 characters of the background
      alphabets are for training (3,856 classes with rotations), and the 659 of the evaluation
      alphabets for testing.
    seed: determines the 1,200 characters.
    cache_dir: where prepared data is kept; by default as `cache_directory` says.

  Returns:
    Splits without validation classes; inputs are uint8 `[m, 28, 28, 1]`, paper 255, ink 0.

  Raises:
    DataError: if an archive is missing, damaged or incomplete, the download fails, or the cache
      cannot be written.
    ValueError: for any other protocol.
  """
  if protocol not in ("pooled", "alphabets"):
    raise ValueError(f"protocol must be 'pooled' or 'alphabets', not {protocol!r}")
  background, evaluation = _drawings(data_dir, cache_directory(cache_dir))
  if protocol == "alphabets":
    return Splits(_with_rotations(background), None, _classes(evaluation))
  characters = np.concatenate([background, evaluation])
  order = np.random.default_rng(seed).permutation(len(characters))
  train, test = np.split(characters[order], [_TRAIN_CHARACTERS])
  return Splits(_with_rotations(train), None, _classes(test))


def _classes(drawings: np.ndarray) -> Classes:
  """Makes a class of each character, from drawings uint8 `[characters, 20, 28, 28]`."""
  labels = np.repeat(np.arange(len(drawings)), drawings.shape[1])
  return from_arrays(drawings.reshape(-1, _SIZE, _SIZE, 1), labels)


def _with_rotations(drawings: np.ndarray) -> Classes:
  quarter_turns = [np.rot90(drawings, turns, axes=(2, 3)) for turns in range(4)]
  return _classes(np.concatenate(quarter_turns))


def _drawings(data_dir: str | os.PathLike | None, cache: Path) -> list[np.ndarray]:
  """Returns the drawings of the two archives, each uint8 `[characters, 20, 28, 28]`."""
  from metajax.data.omniglot_builder import MetajaxOmniglot

  if data_dir is None:
    urls = {split: URL + name for split, (name, _) in ARCHIVES.items()}
    home = cache / "omniglot-download"
  else:
    folder = existing_directory(data_dir)
    paths = {split: folder / name for split, (name, _) in ARCHIVES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
      raise DataError(f"{folder} has no {' and no '.join(missing)}: download from {URL}")
    urls = {split: str(path) for split, path in paths.items()}
    home = cache / f"omniglot-{fingerprint(folder, paths.values())}"

  damaged = DataError(f"the cache {home} is damaged: delete it, and it is made again")

  def builder_of_cache() -> MetajaxOmniglot:
    try:
      return MetajaxOmniglot(
        urls=urls, read=_read_records, data_dir=home, file_format="array_record"
      )
    except Exception as error:  # the files of an earlier call are damaged
      raise damaged from error

  try:
    home.mkdir(parents=True, exist_ok=True)
    builder = builder_of_cache()
    try:
      builder.download_and_prepare()
    except Exception:
      if not Path(builder.data_dir).is_dir():
        raise
      builder = builder_of_cache()  # another process has prepared the same meanwhile
  except DataError:
    raise
  except Exception as error:  # downloads fail in many ways, with the same remedy
    if isinstance(error, OSError) and (data_dir is not None or not home.is_dir()):
      raise unwritable(cache, error) from error
    if data_dir is not None:
      raise damaged from error
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise DataError(
      f"Omniglot could not be downloaded ({reason}): get images_background.zip and "
      f"images_evaluation.zip from {URL} and give their folder as data_dir"
    ) from error
  try:
    return [_read_split(builder.as_data_source(split=split), split) for split in ARCHIVES]
  except Exception as error:  # readers raise many types of error on damaged files
    raise damaged from error


def _read_split(source: Any, split: str) -> np.ndarray:
  """Returns the drawings of a split, in the order of the characters' numbers."""
  drawings = {int(record["label"]): record["drawings"] for record in source}
  in_order = np.stack([drawings[label] for label in sorted(drawings)])
  return in_order.reshape(ARCHIVES[split][1], DRAWINGS, _SIZE, _SIZE)


def _read_records(split: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a record of each character of an archive, after checking that it is complete."""
  name, characters = ARCHIVES[split]
  drawings: dict[str, list[np.ndarray]] = {}
  alphabets: dict[str, str] = {}
  seen: set[str] = set()
  for inside, content in read_archive(path, (".png",)):
    if len(inside.parts) != 4 or not re.fullmatch("[0-9]{4}_[0-9]{2}", inside.stem):
      raise DataError(
        f"{path} holds {inside}, not SET/ALPHABET/characterNN/####_##.png: download {URL}{name}"
      )
    label = inside.stem.split("_")[0]
    if inside.stem in seen:
      raise DataError(f"{path} holds {inside.name} twice: download {URL}{name} again")
    seen.add(inside.stem)
    alphabets[label] = inside.parts[1]
    drawings.setdefault(label, []).append(_shrink(content, f"{inside} in {path}"))
  if len(drawings) != characters:
    raise DataError(
      f"{path} holds {len(drawings)} characters, not {characters}: download {URL}{name} again"
    )
  for label, images in drawings.items():
    if len(images) != DRAWINGS:
      raise DataError(
        f"{path} holds {len(images)} drawings of character {label}, not {DRAWINGS}: download "
        f"{URL}{name} again"
      )
  for label, images in drawings.items():
    record = {"drawings": np.stack(images), "alphabet": alphabets[label], "label": int(label)}
    yield label, record


def _shrink(content: bytes, name: object) -> np.ndarray:
  """A drawing as uint8 `[28, 28]`, resized by nearest neighbour as in the paper's code."""
  image = decode_image(content, name, size=(_SOURCE_SIZE, _SOURCE_SIZE), mode="L")
  pixels = ((np.arange(_SIZE) + 0.5) * _SOURCE_SIZE / _SIZE).astype(int)
  return image[np.ix_(pixels, pixels)]
