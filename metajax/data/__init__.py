"""Data sets, and task samplers: functions `key -> Task` that run on the device."""

from metajax.data import few_shot, glyphs, mini_imagenet, omniglot, sine
from metajax.data.class_folders import from_folder
from metajax.data.few_shot import Classes, Splits, from_arrays, split
from metajax.data.files import DataError, cache_directory

__all__ = [
  "Classes",
  "DataError",
  "Splits",
  "cache_directory",
  "few_shot",
  "from_arrays",
  "from_folder",
  "glyphs",
  "mini_imagenet",
  "omniglot",
  "sine",
  "split",
]
