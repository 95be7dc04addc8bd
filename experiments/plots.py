"""Summaries and plots of results."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # before importing pyplot; no display is needed

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike

import metajax
from experiments.folders import Line, writes

SPLITS = ("train", "validation", "test")
_DRAWING = threading.Lock()  # pyplot's state is shared by all threads


def with_intervals(values: dict[str, np.ndarray]) -> Line:
  """Summarizes the accuracies of tasks as `{cell: {"accuracy", "interval95"}}`, as fractions.

  A task whose outputs are NaN has no accuracy. It is left out of the mean, and the number of such
  tasks stands beside it as "failed".
  """
  cells = {}
  for name, column in values.items():
    judged = column[~np.isnan(column)]
    mean, interval = metajax.mean_and_interval(judged) if len(judged) else (np.nan, np.nan)
    cells[name] = {"accuracy": round(mean, 6), "interval95": round(interval, 6)}
    if len(judged) < len(column):
      cells[name]["failed"] = len(column) - len(judged)
  return cells


def mean_losses(losses: ArrayLike) -> Line:
  """The mean over tasks of losses `[tasks, n]`, and its 95 % interval, `{"loss", "interval95"}`."""
  summary = [metajax.mean_and_interval(column) for column in np.asarray(losses).T]
  return {
    "loss": [round(cell.mean, 6) for cell in summary],
    "interval95": [round(cell.interval, 6) for cell in summary],
  }


def cells_over_seeds(results: Sequence[Line]) -> Line:
  """The cells of one run, or a summary of several.

  The summary has the mean over the runs, the standard deviation between them, and the mean of the
  intervals within a run.
  """
  if len(results) == 1:
    return results[0]["cells"]
  cells = {}
  for name in results[0]["cells"]:
    column = lambda key, name=name: np.array([result["cells"][name][key] for result in results])
    cells[name] = {
      "accuracy": round(float(column("accuracy").mean()), 6),
      "deviation_between_seeds": round(float(column("accuracy").std(ddof=1)), 6),
      "interval95_within_a_run": round(float(column("interval95").mean()), 6),
      "seeds": len(results),
      "tasks": results[0]["cells"][name]["tasks"],
    }
    failed = sum(result["cells"][name].get("failed", 0) for result in results)
    if failed:
      cells[name]["failed"] = failed
  return cells


def interval_of(cell: Line) -> float:
  """Half the 95 % interval over tasks, of one run or as the mean over several."""
  return cell["interval95_within_a_run"] if "seeds" in cell else cell["interval95"]


def percent(cell: Line) -> str:
  """A cell as text, in percent. Over several seeds, both kinds of uncertainty are named."""
  mean = f"{100 * cell['accuracy']:.2f}"
  failed = f" ({cell['failed']} tasks failed, with NaN outputs)" if "failed" in cell else ""
  if "seeds" in cell:
    between, within = cell["deviation_between_seeds"], cell["interval95_within_a_run"]
    return (
      f"{mean} % (deviation between {cell['seeds']} seeds {100 * between:.2f}, "
      f"95 % interval over tasks +- {100 * within:.2f}){failed}"
    )
  return f"{mean} +- {100 * cell['interval95']:.2f} %{failed}"


def learning_curve_summary(record: Line) -> str:
  cells = [
    f"{split} {name} {percent(cell)}"
    for split in SPLITS
    for name, cell in record.get(split, {}).items()
  ]
  step = f"step {record['step']}" + ("" if record["step"] else ", untrained")
  return f"{step}: " + ", ".join(cells)


def learning_curve_score(line: Line) -> float | None:
  """The score by which the best checkpoint is chosen.

  It is the mean of the cells on validation tasks or, if there are none, on training tasks. Choosing
  by test tasks would bias the reported accuracy upwards. A state for which a task failed has no
  score, since its accuracy is that of the other tasks.
  """
  cells = line.get("validation") or line.get("train")
  if cells is None or any("failed" in cell for cell in cells.values()):
    return None
  return sum(cell["accuracy"] for cell in cells.values()) / len(cells)


class Curve(NamedTuple):
  """Accuracy in percent against meta-steps; `band` is half the height of the band around it."""

  steps: np.ndarray
  mean: np.ndarray
  band: np.ndarray


def curve(runs: Sequence[list[Line]], split: str, name: str) -> Curve:
  """The accuracy of one cell against meta-steps.

  The band is the 95 % interval over tasks of one run, or the standard deviation between several.

  Raises:
    ValueError: if the runs have no such cell.
  """
  if name not in runs[0][0].get(split, {}):
    logged = [f"{split} {name}" for split in SPLITS for name in runs[0][0].get(split, {})]
    raise ValueError(f"the logs hold {', '.join(logged)}, and not {split} {name}")
  length = min(map(len, runs))
  steps = np.array([record["step"] for record in runs[0][:length]])
  values = lambda key: (
    100 * np.array([[record[split][name][key] for record in run[:length]] for run in runs])
  )
  accuracy = values("accuracy")
  band = values("interval95")[0] if len(runs) == 1 else accuracy.std(axis=0, ddof=1)
  return Curve(steps, accuracy.mean(axis=0), band)


def band_title(num_runs: int) -> str:
  if num_runs == 1:
    return "band: 95 % interval over tasks"
  return f"band: standard deviation between {num_runs} seeds"


def draw_learning_curve(runs: Sequence[list[Line]], path: Path) -> None:
  """Draws accuracy against meta-steps for every cell, of one run or as the mean over seeds."""
  with drawing(path, figsize=(6.4, 4.0)) as figure:
    axes = figure.subplots()
    for split, style in (("test", "-"), ("validation", "-."), ("train", "--")):
      for number, name in enumerate(runs[0][0].get(split, {})):
        steps, mean, band = curve(runs, split, name)
        color = f"C{number}"
        axes.plot(steps, mean, style, color=color, marker=".", label=f"{split} tasks, {name}")
        if split == "test":
          axes.fill_between(steps, mean - band, mean + band, color=color, alpha=0.2, lw=0)
    axes.set_xlabel("meta-steps")
    axes.set_ylabel("accuracy after adaptation (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title=band_title(len(runs)), fontsize=8, title_fontsize=8)


_SHOWN, _COLUMNS = 60, 10  # images of a contact sheet, and those of a row


def draw_predictions(
  images: np.ndarray, names: Sequence[str], found: metajax.Predictions, path: Path
) -> None:
  """Draws images `[m, height, width, channels]` with the class and the probability of each.

  If there are many, every n-th is drawn.
  """
  every = -(-len(images) // _SHOWN)
  shown = range(0, len(images), every)
  rows = -(-len(shown) // _COLUMNS)
  with drawing(path, figsize=(_COLUMNS * 1.1, rows * 1.4 + 0.5)) as figure:
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes in grid.flat:
      axes.axis("off")
    for axes, row in zip(grid.flat, shown, strict=False):
      image = images[row]
      axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
      probability = found.probabilities[row].max()
      title = f"{found.labels[row]} {100 * probability:.0f} %".encode(errors="replace").decode()
      axes.set_title(title, fontsize=8, parse_math=False)
      place = {"ha": "center", "va": "top", "transform": axes.transAxes}
      shown_name = names[row][-18:].encode(errors="replace").decode()  # it may be no Unicode
      axes.text(0.5, -0.04, shown_name, fontsize=5, parse_math=False, **place)
    part = f"{len(shown)} of {len(images)} images" if every > 1 else f"{len(images)} images"
    figure.suptitle(f"most probable class and its probability, {part}", fontsize=9)


@contextmanager
def drawing(path: Path, **options: Any) -> Iterator[plt.Figure]:
  """Yields a figure, then saves it to `path`, or as both PNG and SVG if `path` has no suffix."""
  with _DRAWING:
    figure = plt.figure(layout="constrained", **options)
    try:
      yield figure
      if not writes():
        return
      for suffix in [path.suffix] if path.suffix else [".png", ".svg"]:
        figure.savefig(path.with_suffix(suffix), dpi=150)
    finally:
      plt.close(figure)
