"""Adapts a trained learner to labelled images, and predicts the classes of others.

  python -m experiments.adapt --learner=glyphs_5way_reptile --labelled=DIR --unlabelled=DIR

--labelled holds a folder of images for each class. The images of --unlabelled, at any depth, are
predicted. The results are a table of probabilities (--out) and, beside it, a picture of the
images with their predictions.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import metajax
from experiments import cli, plots
from experiments.folders import plain_warnings
from experiments.settings import Settings, option


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Adaptation(Settings):
  """Which learner adapts to what."""

  learner: str | None = option(None,
    "A learner file, such as RUN/learner.safetensors, or the name of a learner of metajax.")
  labelled: str | None = option(None, "A folder with a folder of images for each class.")
  unlabelled: str | None = option(None, "A folder with the images to predict.")
  out: str = option("predictions.csv", "The table; the picture is beside it, as a PNG.")
  protocol: Literal["inductive", "transductive"] = option("inductive",
    "Whether each image is predicted in a batch with the labelled ones only, so that the others do "
    "not matter, or all together, which is faster and, if all classes are among them, more "
    "accurate.")
  unreadable: Literal["refuse", "skip"] = option("refuse",
    "Whether a file that is no readable image is an error, or is skipped with a warning.")
  adapt_seed: int = option(0, "Determines the minibatches of the adaptation.", at_least=0)
# fmt: on


def program(adaptation: Adaptation) -> Callable[[], Any]:
  """Checks what the binary is asked to do, and returns what to run."""
  learner, labelled, unlabelled = adaptation.learner, adaptation.labelled, adaptation.unlabelled
  if learner is None or labelled is None or unlabelled is None:
    raise ValueError("give --learner, --labelled and --unlabelled")
  out = Path(adaptation.out).expanduser()
  if out.suffix != ".csv" or not out.parent.is_dir():
    raise ValueError(f"--out={out} must end in .csv, in a folder that exists")
  for name, given in (("labelled", labelled), ("unlabelled", unlabelled)):
    if out.resolve().is_relative_to(Path(given).expanduser().resolve()):
      raise ValueError(
        f"--out={out} lies in --{name}={given}, where its picture would be read as an image: give "
        "another folder"
      )
  learned = metajax.load(learner)
  known = _images(learned, labelled, adaptation)
  others = _images(learned, unlabelled, adaptation)
  other = [name for name in known.names if name.count("/") != 1]
  if other:
    raise ValueError(
      f"--labelled={labelled} holds {other[0]}, which is not CLASS/IMAGE: it should hold a folder "
      "of images for each class, CLASS/IMAGE.png"
    )
  labels = [name.split("/")[0] for name in known.names]
  for folder in sorted(Path(labelled).expanduser().iterdir()):
    hidden = metajax.data.files.is_hidden(folder)
    if folder.is_dir() and not hidden and folder.name not in labels:
      raise ValueError(f"{folder} has no image: add images of that class, or remove the folder")

  def run() -> None:
    predict = learned.adapt(
      known.images, labels, protocol=adaptation.protocol, seed=adaptation.adapt_seed
    )
    found = predict(others.images)
    write_table(out, others.names, found)
    picture = out.with_suffix(".png")
    plots.draw_predictions(others.images, others.names, found, picture)
    print(
      f"adapted to {len(labels)} images of {len(found.classes)} classes, predicted "
      f"{len(others.names)}: {out}, {picture}"
    )

  return run


def _images(
  learned: metajax.Learned, folder: str, adaptation: Adaptation
) -> metajax.data.NamedImages:
  """The images of a folder as the learner takes them."""
  inputs = learned.recipe.inputs.get("", {"shape": (), "dtype": ""})
  shape = inputs["shape"]
  of_images = len(shape) == 3 and shape[2] in (1, 3) and inputs["dtype"] == "uint8"
  if not of_images or learned.recipe.loss["name"] != "cross_entropy":
    raise ValueError(
      f"--learner={adaptation.learner} was not trained to classify uint8 images: use metajax.load "
      "in a program of your own"
    )
  with plain_warnings():
    return metajax.data.read_images(
      folder,
      size=(shape[0], shape[1]),
      mode="L" if shape[2] == 1 else "RGB",
      unreadable=adaptation.unreadable,
    )


def write_table(path: Path, names: list[str], found: metajax.Predictions) -> None:
  """Writes a row for each image: its file, the most probable class, and all probabilities."""
  header = ["file", "prediction", *map(str, found.classes)]
  with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
    writer = csv.writer(file)
    writer.writerow(header)
    for name, label, row in zip(names, found.labels, found.probabilities, strict=True):
      writer.writerow([name, label, *(f"{probability:.6f}" for probability in np.asarray(row))])


if __name__ == "__main__":
  cli.main_without_folder(program, Adaptation())
