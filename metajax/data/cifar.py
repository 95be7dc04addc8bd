"""CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018), from CIFAR-100."""

import os
from pathlib import Path

import numpy as np

from metajax.data.few_shot import Classes, Splits, from_arrays, select
from metajax.data.files import DataError, existing_directory, read_archive

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
_ARCHIVE = "cifar-100-binary.tar.gz"
_PARTS = {"train.bin": 500, "test.bin": 100}  # images of each of the 100 classes
_RECORD = 2 + 3 * 32 * 32  # the superclass, the class, and the pixels, a plane for each color
_LARGEST = 200 * 2**20  # bytes of a file in the archive


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


# Of CIFAR-FS; all other classes are for training.
_VALIDATION = _words(
  "otter motorcycle television lamp crocodile shark butterfly beaver beetle tractor flatfish "
  "maple_tree camel crab sea cattle"
)
_TEST = _words(
  "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail "
  "sweet_pepper table telephone wardrobe whale woman worm"
)
# Of FC100: the superclasses, each of five classes; all others are for training.
_VALIDATION_SUPERCLASSES = _words(
  "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals"
)
_TEST_SUPERCLASSES = _words("aquatic_mammals insects medium_mammals people")


def cifar_fs(data_dir: str | os.PathLike) -> Splits:
  """Loads CIFAR-FS: 64 classes for training, 16 for validation and 20 for testing, 600 images each.

  Args:
    data_dir: a folder with the official `cifar-100-binary.tar.gz`.

  Returns:
    Splits with inputs uint8 `[m, 32, 32, 3]`.

  Raises:
    DataError: if the archive is missing, damaged or incomplete.
  """
  classes, _ = _cifar_100(data_dir)
  return _splits(classes, _VALIDATION, _TEST)


def fc100(data_dir: str | os.PathLike) -> Splits:
  """Loads FC100: 60 classes for training, 20 for validation and 20 for testing, 600 images each.

  Classes of one superclass, such as fish, are in the same split, which makes FC100 harder than
  CIFAR-FS.

  Args:
    data_dir: a folder with the official `cifar-100-binary.tar.gz`.

  Returns:
    Splits with inputs uint8 `[m, 32, 32, 3]`.

  Raises:
    DataError: if the archive is missing, damaged or incomplete.
  """
  classes, superclass = _cifar_100(data_dir)
  of = lambda names: frozenset(name for name, above in superclass.items() if above in names)
  return _splits(classes, of(_VALIDATION_SUPERCLASSES), of(_TEST_SUPERCLASSES))


def _splits(classes: Classes, validation: frozenset[str], test: frozenset[str]) -> Splits:
  numbers = range(len(classes.names))
  chosen = lambda wanted: select(classes, [i for i in numbers if wanted(classes.names[i])])
  return Splits(
    chosen(lambda name: name not in validation | test),
    chosen(validation.__contains__),
    chosen(test.__contains__),
  )


def _cifar_100(data_dir: str | os.PathLike) -> tuple[Classes, dict[str, str]]:
  """All images as classes, and the name of the superclass of each class."""
  path = existing_directory(data_dir) / _ARCHIVE
  if not path.is_file():
    raise DataError(f"{path.parent} has no {_ARCHIVE}: download {URL}")
  found = {
    name.name: content for name, content in read_archive(path, (".bin", ".txt"), largest=_LARGEST)
  }
  names, above = (_names(found, f"{kind}_label_names.txt", path) for kind in ("fine", "coarse"))
  parts = []
  for part, each in _PARTS.items():
    content = found.get(part, b"")
    if len(content) != len(names) * each * _RECORD:
      raise _incomplete(path, part)
    parts.append(np.frombuffer(content, np.uint8).reshape(-1, _RECORD))
  records = np.concatenate(parts)
  superclass, label, pixels = records[:, 0], records[:, 1], records[:, 2:]
  counts = np.bincount(label, minlength=len(names))
  if superclass.max() >= len(above) or np.any(counts != sum(_PARTS.values())):
    raise _incomplete(path, "an image")
  images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  pairs = {names[i]: above[j] for i, j in zip(label.tolist(), superclass.tolist(), strict=True)}
  return from_arrays(images, np.array(names)[label]), pairs


def _names(found: dict[str, bytes], file: str, path: Path) -> list[str]:
  names = found.get(file, b"").decode(errors="replace").split()
  if len(names) != len(set(names)) or not names:
    raise _incomplete(path, file)
  return names


def _incomplete(path: Path, what: str) -> DataError:
  return DataError(f"{path} lacks {what}, or it is not as it should be: download {URL} again")
