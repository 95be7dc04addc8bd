"""Images from the data sets of TensorFlow Datasets and of Hugging Face, divided by class."""

import difflib
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metajax.data import few_shot
from metajax.data.class_folders import Format, Mode, format_of, without_repeats
from metajax.data.few_shot import Splits
from metajax.data.files import DataError, fit_image


def from_tfds(
  name: Any,
  *,
  size: int | tuple[int, int],
  mode: Mode = "RGB",
  validation: int | float = 0.16,
  test: int | float = 0.2,
  seed: int = 0,
  min_examples: int = 1,
  data_dir: str | os.PathLike | None = None,
) -> Splits:
  """Reads a data set of TensorFlow Datasets with features `image` and `label`.

  The images of all its splits are put together, and then its classes are divided. An image that
  occurs twice in a class is kept once, and one without a label is left out, with a warning. The
  data set is downloaded and prepared when it is first used; TensorFlow itself may be needed for
  that.

  Args:
    name: such as `"cifar100"`, or a builder.
    size: height and width in pixels, or one number for both; see `from_folder`.
    mode: `"RGB"`, or `"L"` for gray.
    validation: the number or the fraction of validation classes.
    test: the number or the fraction of test classes.
    seed: determines which classes are for what.
    min_examples: classes with fewer images are left out, with a warning that names them.
    data_dir: where TensorFlow Datasets keeps its data; by default its own choice.

  Returns:
    Splits with inputs uint8 `[m, height, width, channels]`.

  Raises:
    DataError: if there is no such data set, it cannot be downloaded or prepared, it has no images
      with labels, or an image cannot be read.
    ImportError: if TensorFlow is needed to prepare it and is not installed.
    ValueError: if the size, the mode or the division into classes is impossible.
  """
  import tensorflow_datasets as tfds

  form = format_of(size, mode)
  builder = name
  if isinstance(name, str):
    try:
      builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:  # its message names all data sets that there are
      close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
      advice = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()"
      raise DataError(f"TensorFlow Datasets has no data set {name!r}: {advice}") from None
  features = builder.info.features
  if not {"image", "label"} <= set(features):
    raise DataError(f"{builder.name} has features {', '.join(features)}, not image and label")
  try:
    builder.download_and_prepare()
  except ImportError:  # it says what to install
    raise
  except Exception as error:  # it raises many types of error
    why = str(error).strip().split("\n")[0] or type(error).__name__
    raise DataError(f"{builder.name} cannot be downloaded or prepared: {why}") from error
  names = getattr(features["label"], "names", None)
  records = (record for part in builder.as_data_source().values() for record in part)
  found = (_Labelled(record["image"], record["label"], names) for record in records)
  return _splits(found, form, min_examples, validation, test, seed)


def from_huggingface(
  name: Any,
  *,
  size: int | tuple[int, int],
  mode: Mode = "RGB",
  image: str = "image",
  label: str = "label",
  validation: int | float = 0.16,
  test: int | float = 0.2,
  seed: int = 0,
  min_examples: int = 1,
) -> Splits:
  """Reads a data set of images with labels by the library `datasets` of Hugging Face.

  The images of all its splits are put together, and then its classes are divided. An image that
  occurs twice in a class is kept once, and one without a label is left out, with a warning. The
  library is an extra of metajax.

  Args:
    name: on the Hugging Face hub, such as `"uoft-cs/cifar100"`, or what `datasets.load_dataset` or
      `datasets.load_from_disk` returned.
    size: height and width in pixels, or one number for both; see `from_folder`.
    mode: `"RGB"`, or `"L"` for gray.
    image: the column of the images.
    label: the column of the labels.
    validation: the number or the fraction of validation classes.
    test: the number or the fraction of test classes.
    seed: determines which classes are for what.
    min_examples: classes with fewer images are left out, with a warning that names them.

  Returns:
    Splits with inputs uint8 `[m, height, width, channels]`.

  Raises:
    DataError: if there are no such columns, an image cannot be read, a label is no whole number or
      name or has no name of a class, or no image has a label. What the library itself raises, as
      for a name that does not exist, is not changed.
    ImportError: if the library is not installed.
    ValueError: if the size, the mode or the division into classes is impossible.
  """
  form = format_of(size, mode)
  try:
    import datasets
  except ImportError as error:
    raise ImportError("from_huggingface needs a library: pip install datasets") from error

  found = datasets.load_dataset(name) if isinstance(name, str) else name
  parts = list(found.values()) if isinstance(found, dict) else [found]
  for part in parts:
    if not {image, label} <= set(part.column_names):
      columns = ", ".join(part.column_names)
      raise DataError(f"the data set has columns {columns}, not {image} and {label}: name yours")
  labelled = (
    _Labelled(record[image], record[label], getattr(part.features[label], "names", None))
    for part in parts
    for record in part
  )
  return _splits(labelled, form, min_examples, validation, test, seed)


class _Labelled(NamedTuple):
  """An image, as an array or Pillow's, and its label.

  Attributes:
    image: the image.
    label: the number of its class in `names`, or the class itself if there are none.
    names: those of the classes.
  """

  image: Any
  label: Any
  names: list[str] | None


def _splits(
  records: Iterable[_Labelled],
  form: Format,
  min_examples: int,
  validation: int | float,
  test: int | float,
  seed: int,
) -> Splits:
  labels: list[Any] = []
  unlabelled = 0

  def fitted() -> Iterator[np.ndarray]:
    nonlocal unlabelled
    for number, (image, label, names) in enumerate(_readable(records)):
      if label is None or (names is not None and label < 0):  # as in test sets that are kept secret
        unlabelled += 1
        continue
      is_one = isinstance(label, int | np.integer | str)
      if not is_one:
        raise DataError(
          f"image {number} has the label {label!r:.40}: give one whole number or name each"
        )
      if names is not None and label >= len(names):
        raise DataError(
          f"image {number} has the label {label}, and the data set has {len(names)} names of "
          "classes: correct the label, or the names"
        )
      try:
        image = _as_image(image, f"image {number}")
        found = fit_image(image, f"image {number}", (form.width, form.height), form.mode)
      except (DataError, MemoryError):
        raise
      except Exception as error:  # decoders raise many types of error
        raise DataError(f"image {number} is not a readable image: leave it out") from error
      labels.append(label if names is None else names[label])
      yield np.asarray(found).reshape(form.shape)

  images = list(fitted())
  if unlabelled:
    warnings.warn(f"{unlabelled} images without a label are left out", stacklevel=3)
  if not images:
    raise DataError("the data set has no image with a label")
  # Splits of the data set may overlap, and a task must not be tested by what it learns.
  stacked = np.stack(images)
  images.clear()
  ((pixels, kept),) = without_repeats([(stacked, few_shot.class_labels(labels))], stacklevel=4)
  classes = few_shot.grouped(pixels, kept, min_examples=min_examples, stacklevel=4)
  return few_shot.split(classes, validation=validation, test=test, seed=seed)


def _readable(records: Iterable[_Labelled]) -> Iterator[_Labelled]:
  """The same records, or one line about one that the library of the data cannot read."""
  number, found = 0, iter(records)
  while True:
    try:
      record = next(found)
    except StopIteration:
      return
    except MemoryError:
      raise
    except Exception as error:
      why = str(error).strip().split("\n")[0] or type(error).__name__
      raise DataError(f"image {number} cannot be read ({why}): leave it out") from error
    yield record
    number += 1


def _as_image(image: Any, name: str) -> Image.Image:
  """A Pillow image of an image or of an array `[height, width]` or `[height, width, channels]`."""
  if isinstance(image, Image.Image):
    return image
  pixels = np.asarray(image)
  if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
    raise DataError(f"{name} is {pixels.dtype} {pixels.shape}, not uint8 [height, width, channels]")
  return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
