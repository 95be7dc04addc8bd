"""Does the last minibatch overlap the ones before? (Section 6.3, Figure 4)

  python -m experiments.overlap --data_dir=DIR --meta_steps=5000 --out=DIR

First-order MAML with a separate and with a shared tail, and Reptile, on 5-shot 5-way Omniglot by
plain SGD, tasks of 100 training examples: final accuracy (a) against the number of inner
iterations, (b) against the inner batch, (c) of shared-tail FOMAML on full batches against the outer
step. Takes the flags of `experiments.few_shot`; a point is one of its runs, on a device of its own,
in a folder of its own, so that the same command goes on where it stopped. The run folder (--out)
gets result.json, figure4.png and figure4.svg.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments import common, few_shot, folders, reports

CURVES: dict[str, dict[str, Any]] = {
  "Reptile (cycling)": {"tail": "shared", "minibatches": "cycling"},
  "FOMAML (separate tail, cycling)": {"tail": "separate", "minibatches": "cycling"},
  "FOMAML (shared tail, replacement)": {"tail": "shared", "minibatches": "replacement"},
  "FOMAML (shared tail, cycling)": {"tail": "shared", "minibatches": "cycling"},
}
ITERATIONS, BATCH = 4, 25  # where they are not varied
PANELS = {
  "a": ("inner_steps", (2, 3, 4, 5, 7, 10, 15)),
  "b": ("inner_batch", (10, 25, 50, 100)),
  "c": ("outer_rate", tuple(2.0**e for e in (-7.5, -5, -2, 5))),  # that of (a) and (b) is 2^-2
}
_LABELS = {
  "inner_steps": "inner iterations",
  "inner_batch": "inner batch size",
  "outer_rate": "initial outer step, full batches",
}

# fmt: off
_FLAGS = (
  *few_shot.FLAGS,
  flags.DEFINE_list("panels", list(PANELS), f"Any of {', '.join(PANELS)}."),
)
# fmt: on
_DEFAULTS: dict[str, Any] = few_shot.PLAIN_SGD | {
  "inner_batch": None,  # by the point, as these two
  "tail": None,
  "minibatches": None,
  "train_shots": 20,
  "tail_shots": 5,
  "curve_tasks": 10,
  "eval_every": 5_000,
}


class Point(NamedTuple):
  """A place in the figure, and the runs that decide how high it is."""

  panel: str
  curve: str
  x: float
  runs: list[SimpleNamespace]  # one a seed


def points(settings: SimpleNamespace) -> list[Point]:
  """All points of the chosen panels; two panels may share a run.

  Raises:
    ValueError: if a flag is no good.
  """
  unknown = sorted(set(settings.panels) - set(PANELS))
  if unknown or not settings.panels or len(set(settings.panels)) < len(settings.panels):
    raise ValueError(f"--panels must be any of {', '.join(PANELS)}, separated by commas, each once")
  common.refuse(
    settings, "weights", "inner_steps", "inner_batch", "tail", "minibatches", algorithm="combine"
  )
  examples, largest = settings.ways * settings.train_shots, max(PANELS["b"][1])
  if "b" in settings.panels and examples < largest:
    raise ValueError(
      f"--panels=b has minibatches of {largest} and tasks of {examples} training examples: "
      "raise --train_shots, or leave panel b out"
    )
  found = []
  for panel in settings.panels:
    name, values = PANELS[panel]
    for curve in list(CURVES)[-1:] if panel == "c" else CURVES:
      for x in values:
        where = {"inner_steps": ITERATIONS, "inner_batch": BATCH, "outer_rate": settings.outer_rate}
        if panel == "c":
          where["inner_batch"] = settings.ways * settings.train_shots
        found.append(Point(panel, curve, x, _runs(settings, curve, where | {name: x})))
  return found


def _runs(settings: SimpleNamespace, curve: str, where: dict[str, Any]) -> list[SimpleNamespace]:
  k = where["inner_steps"]
  if where["outer_rate"] <= 0:
    raise ValueError(f"--outer_rate={where['outer_rate']} must be positive and finite")
  weights = [1.0] * k if curve.startswith("Reptile") else [0.0] * (k - 1) + [1.0]
  step = f"{np.log2(where['outer_rate']):g}"
  folder = f"{curve}, {k} x {where['inner_batch']}, step 2^{step}"
  for old, new in ((" ", "_"), ("(", ""), (")", ""), (",", ""), ("^", "")):
    folder = folder.replace(old, new)
  one = common.changed(
    settings, weights=weights, **CURVES[curve], **where, out=str(Path(settings.out, folder.lower()))
  )
  del one.panels
  few_shot.check(one)
  return common.of_each_seed(one)


def run(settings: SimpleNamespace, found: list[Point]) -> dict[str, Any]:
  """Trains what is not there yet; returns what it writes to result.json."""
  many = {
    one.out: (Path(one.out).relative_to(settings.out).as_posix(), one)
    for point in found
    for one in point.runs
  }
  results = dict(
    zip(many, few_shot.run_all(list(many.values()), diverging_guesses=True), strict=True)
  )
  folder = folders.open_folder(_of_figure(settings))
  before = folder.result() or {"points": [], "seeds": settings.seeds}
  kept = before["points"] if before["seeds"] == settings.seeds else []
  points = [point for point in kept if point["panel"] not in settings.panels] + [
    {
      **point._asdict(),
      "cells": reports.cells_over_seeds([results[one.out] for one in point.runs]),
      "runs": [Path(one.out).relative_to(settings.out).as_posix() for one in point.runs],
    }
    for point in found
  ]
  result = {
    "points": sorted(points, key=lambda point: point["panel"]),
    "meta_steps": settings.meta_steps,
    "seeds": settings.seeds,
    "cell": f"{settings.eval_shots[0]}-shot transductive",
    "versions": folders.versions(),
  }
  folder.finish(result)
  draw(result, Path(settings.out, "figure4"))
  print(f"{result['cell']} accuracy over {settings.eval_tasks} test tasks")
  for panel, curve, xs, cells in _lines(result):
    print(f"  ({panel}) {curve}")
    for x, cell in zip(xs, cells, strict=True):
      print(f"    {PANELS[panel][0]} {x:g}: {reports.percent(cell)}")
  print(f"  the runs are in {settings.out}")
  return result


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, str, list[float], list[dict[str, Any]]]]:
  """Panel, curve, and along it x and the cell."""
  points = result["points"]
  for panel, curve in dict.fromkeys((point["panel"], point["curve"]) for point in points):
    line = [point for point in points if (point["panel"], point["curve"]) == (panel, curve)]
    yield panel, curve, [point["x"] for point in line], [p["cells"][result["cell"]] for p in line]


def draw(result: dict[str, Any], path: Path) -> None:
  """Figure 4: a panel each for what is varied."""
  panels = list(dict.fromkeys(point["panel"] for point in result["points"]))
  with reports.drawing(path, figsize=(4.2 * len(panels), 4.2)) as figure:
    all_axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for panel, curve, xs, cells in _lines(result):
      between = "deviation_between_seeds" if result["seeds"] > 1 else "interval95"
      all_axes[panel].errorbar(
        xs,
        [100 * cell["accuracy"] for cell in cells],
        [100 * cell[between] for cell in cells],
        color=f"C{list(CURVES).index(curve)}",
        marker=".",
        capsize=2,
        label=curve,
      )
    for panel, axes in all_axes.items():
      axes.set(xlabel=_LABELS[PANELS[panel][0]], ylim=(0, 100), title=f"({panel})")
      axes.grid(alpha=0.3)
      if panel == "c":
        axes.set_xscale("log", base=2)
    all_axes[panels[0]].set_ylabel(f"final accuracy, {result['cell']} (%)")
    lines = [axes.get_legend_handles_labels() for axes in all_axes.values()]
    handles = max(lines, key=lambda line: len(line[0]))  # (c) has one curve only
    bars = reports.band_title(result["seeds"]).replace("band", "bars")
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8, title=bars)


def _of_figure(settings: SimpleNamespace) -> SimpleNamespace:
  """What all points have in common: `--panels` may be trained one after another."""
  return common.changed(settings, panels=None)


def program(settings: SimpleNamespace) -> Callable[[], Any]:
  """What the binary does, checked."""
  common.check_numbers(settings)
  found = points(settings)
  if settings.plot_only:
    result = folders.finished(settings.out)
    shown = [point for point in result["points"] if point["panel"] in settings.panels]
    if not shown:
      raise ValueError(f"{settings.out} has no points of --panels={','.join(settings.panels)} yet")
    return partial(draw, result | {"points": shown}, Path(settings.out, "figure4"))
  few_shot.check_all([one for point in found for one in point.runs])
  folders.open_folder(_of_figure(settings)).begin("a run of each point and seed")
  return partial(run, settings, found)


def defaults(**changes: Any) -> SimpleNamespace:
  """The flags' default values, but for `changes`: to run from Python."""
  return common.defaults(_FLAGS, **{**_DEFAULTS, **changes})


def main(argv: list[str]) -> None:
  common.main("overlap", argv, _FLAGS, _DEFAULTS, program)


if __name__ == "__main__":
  app.run(main, flags_parser=common.parse_flags)
