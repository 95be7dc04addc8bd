"""Shows learning curves in TensorBoard or Weights & Biases, besides metrics.jsonl."""

import importlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.folders import Line

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(NamedTuple):
  """Somewhere that numbers and images are sent to.

  Attributes:
    numbers: `(step, {name: number})`.
    images: `(step, name, images)`, uint8 `[n, height, width, channels]`.
    close: sends what is left.
  """

  numbers: Callable[[int, dict[str, float]], None]
  images: Callable[[int, str, np.ndarray], None]
  close: Callable[[], None]


def check(names: Sequence[str]) -> None:
  """Checks that the trackers are installed."""
  for name in names:
    try:
      importlib.import_module(_MODULES[name])
    except ImportError as error:
      raise ValueError(
        f"--track={name} needs a package that is not here: pip install {_MODULES[name]}"
      ) from error


def opened(name: str, folder: Path, settings: dict[str, Any]) -> Tracker:
  """Opens a tracker for the run in a folder.

  Raises:
    ValueError: if it cannot be opened, for example without a login.
  """
  try:
    return {"tensorboard": _tensorboard, "wandb": _wandb}[name](folder, settings)
  except Exception as error:  # of the tracker's own types
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"--track={name} cannot be opened ({reason}): see its own documentation, or leave it out"
    ) from error


def numbers_of(line: Line) -> dict[str, float]:
  """The numbers of a line of metrics.jsonl by name, such as `test/1-shot inductive/accuracy`."""

  def flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
      for key, part in value.items():
        yield from flat(f"{name}/{key}", part)
    elif isinstance(value, list):
      for number, part in enumerate(value, start=1):
        yield from flat(f"{name}/{number}", part)
    elif isinstance(value, int | float):
      yield name.removeprefix("/"), float(value)

  return dict(flat("", {key: value for key, value in line.items() if key != "step"}))


def _tensorboard(folder: Path, settings: dict[str, Any]) -> Tracker:
  writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))
  writer.add_text("settings", "\n".join(f"    --{k}={v}" for k, v in settings.items()))

  def numbers(step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      writer.add_scalar(name, value, step)
    writer.flush()

  def images(step: int, name: str, pixels: np.ndarray) -> None:
    writer.add_images(name, pixels, step, dataformats="NHWC")

  return Tracker(numbers, images, writer.close)


def _wandb(folder: Path, settings: dict[str, Any]) -> Tracker:
  wandb = importlib.import_module("wandb")
  known = folder / "wandb_id"  # when the run in this folder goes on, it does so there too
  if not known.is_file():
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(uuid.uuid4().hex)
  run = wandb.init(
    project="metajax",
    id=known.read_text(),
    name="/".join(folder.resolve().parts[-2:]),
    resume="allow",
    reinit="create_new",  # several runs of this process may be open at once
    dir=str(folder),
    config=settings,
  )

  def numbers(step: int, values: dict[str, float]) -> None:
    run.log(values, step=step)

  def images(step: int, name: str, pixels: np.ndarray) -> None:
    run.log({name: [wandb.Image(image.squeeze()) for image in pixels]}, step=step)

  return Tracker(numbers, images, run.finish)
