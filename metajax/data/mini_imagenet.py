"""mini-ImageNet (Vinyals et al. 2016): 84x84 RGB, Ravi & Larochelle's 64 / 16 / 20 classes."""

import os
from pathlib import Path

from metajax.data.class_folders import SPLITS, Format, decoded
from metajax.data.few_shot import Splits, from_arrays
from metajax.data.files import DataError, existing_directory

_LAYOUT = (
  "train*.tar.gz, val*.tar.gz and test*.tar.gz, holding SPLIT/CLASS/IMAGE.jpg, or folders "
  "train/CLASS, val/CLASS and test/CLASS, all images 84x84"
)
FORMAT = Format(84, 84, "RGB", fit=False, layout=_LAYOUT)


def load(
  data_dir: str | os.PathLike | None, *, cache_dir: str | os.PathLike | None = None
) -> Splits:
  """Loads mini-ImageNet. Classes may differ in size, and validation classes may be missing.

  The images may not be redistributed (ImageNet's terms), so there is no download: make them from
  ILSVRC-2012 with Ravi & Larochelle's lists. They are decoded once and kept in the cache.

  Args:
    data_dir: a folder with archives (`train*.tar.gz`, `val*.tar.gz`, `test*.tar.gz`; all
      that match are read) or with class folders (`train/CLASS/IMAGE.jpg`, ...).
    cache_dir: where prepared data is kept; by default as `cache_directory` says.

  Returns:
    Splits with inputs uint8 `[m, 84, 84, 3]`.

  Raises:
    DataError: if `data_dir` is not given or holds no images, a file is damaged, has another size or
      lies in the wrong place, a class is in two splits, or the cache cannot be written.
  """
  if data_dir is None:
    raise DataError(
      "mini-ImageNet cannot be downloaded (ImageNet's terms): make the 84x84 images from "
      "ILSVRC-2012 with Ravi & Larochelle's lists and give, as data_dir, a folder with " + _LAYOUT
    )
  folder = existing_directory(data_dir)
  sources = {split: _sources(folder, split) for split in SPLITS}
  for split in ("train", "test"):
    if not sources[split]:
      raise DataError(f"{folder} has no {split} images: it should hold {_LAYOUT}")
  parts = decoded(folder, sources, "mini_imagenet", FORMAT, cache_dir, skip=False)
  classes = {split: from_arrays(images.pixels, images.labels) for split, images in parts.items()}
  return Splits(classes["train"], classes.get("val"), classes["test"])


def _sources(folder: Path, split: str) -> list[Path]:
  folders = [folder / split] if (folder / split).is_dir() else []
  return sorted(folder.glob(f"{split}*.tar.gz")) + folders
