"""Data sets, and task samplers: functions `key -> Task` that run on the device."""

from metajax.data import few_shot, glyphs, mini_imagenet, omniglot, sine
from metajax.data.cifar import cifar_fs, fc100
from metajax.data.class_folders import NamedImages, from_folder, read_images
from metajax.data.few_shot import Classes, Splits, from_arrays, split
from metajax.data.files import DataError, cache_directory
from metajax.data.host import host_episodes, host_tasks
from metajax.data.hub import from_huggingface, from_tfds

__all__ = [
  "Classes",
  "DataError",
  "NamedImages",
  "Splits",
  "cache_directory",
  "cifar_fs",
  "fc100",
  "few_shot",
  "from_arrays",
  "from_folder",
  "from_huggingface",
  "from_tfds",
  "glyphs",
  "host_episodes",
  "host_tasks",
  "mini_imagenet",
  "omniglot",
  "read_images",
  "sine",
  "split",
]
