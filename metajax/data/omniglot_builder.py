"""A TensorFlow Datasets builder of Omniglot that works without TensorFlow.

The builder in TensorFlow Datasets decodes and encodes the images with TensorFlow; this one is given
the decoded images.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Records = Iterator[tuple[str, dict[str, Any]]]


class MetajaxOmniglot(tfds.core.GeneratorBasedBuilder):
  """1,623 handwritten characters, 20 drawings of each by 20 people (Lake et al. 2015)."""

  VERSION = tfds.core.Version("2.0.0")

  def __init__(
    self, *, urls: dict[str, str], read: Callable[[str, Path], Records], **kwargs: Any
  ) -> None:
    """Makes the builder.

    Args:
      urls: the archive of each split, a URL or a path.
      read: `(split, path) -> records`.
      **kwargs: of `GeneratorBasedBuilder`.
    """
    self._urls, self._read = urls, read
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      homepage="https://github.com/brendenlake/omniglot",
      features=tfds.features.FeaturesDict(
        {
          "drawings": tfds.features.Tensor(shape=(20, 28, 28), dtype=np.uint8),
          "alphabet": tfds.features.Text(),
          "label": tfds.features.Scalar(dtype=np.int64),
        }
      ),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Records]:
    remote = {split: url for split, url in self._urls.items() if "://" in url}
    paths = {**self._urls, **(dl_manager.download(remote) if remote else {})}
    return {split: self._generate_examples(split, path) for split, path in paths.items()}

  def _generate_examples(self, split: str, path: str) -> Records:
    yield from self._read(split, Path(path))
