"""Effect of an overlap of the last minibatch with earlier ones (Section 6.3, Figure 4).

  python -m experiments.overlap --data_dir=DIR --meta_steps=5000 --out=DIR

Trains first-order MAML (FOMAML), with a separate and with a shared tail, and Reptile on 5-shot
5-way Omniglot, with plain SGD and tasks of 100 training examples. The panels show the final
accuracy (a) against the number of inner iterations, (b) against the inner batch size, and (c)
against the initial outer learning rate, for FOMAML with a shared tail and full batches. Each point
is a run of `experiments.few_shot` on its own device and in its own folder, so the same command
resumes runs that were interrupted. The run folder (--out) gets result.json, figure4.png and
figure4.svg.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import cli, folders, plots, runs
from experiments.recipes import PLAIN_SGD, Recipe
from experiments.runs import Job
from experiments.settings import Settings, option

CURVES: dict[str, dict[str, Any]] = {
  "Reptile (cycling)": {"tail": "shared", "minibatches": "cycling"},
  "FOMAML (separate tail, cycling)": {"tail": "separate", "minibatches": "cycling"},
  "FOMAML (shared tail, replacement)": {"tail": "shared", "minibatches": "replacement"},
  "FOMAML (shared tail, cycling)": {"tail": "shared", "minibatches": "cycling"},
}
ITERATIONS, BATCH = 4, 25  # the values where they are not varied
PANELS = {
  "a": ("inner_steps", (2, 3, 4, 5, 7, 10, 15)),
  "b": ("inner_batch", (10, 25, 50, 100)),
  "c": ("outer_rate", tuple(2.0**e for e in (-7.5, -5, -2, 5))),  # (a) and (b) have 2^-2
}
_LABELS = {
  "inner_steps": "inner iterations",
  "inner_batch": "inner batch size",
  "outer_rate": "initial outer learning rate, full batches",
}

_DECIDED = (
  "algorithm",
  "weights",
  "inner_steps",
  "inner_batch",
  "tail",
  "tail_shots",
  "minibatches",
)  # settings that the point decides
FIGURE = replace(
  PLAIN_SGD,
  inner_batch=BATCH,
  inner_steps=ITERATIONS,
  weights=(1.0,) * ITERATIONS,
  train_shots=20,
  curve_tasks=10,
  eval_every=5_000,
)


@dataclass(frozen=True, kw_only=True)
class Panels(Settings):
  """Which panels of the figure to train or draw."""

  panels: tuple[str, ...] = option(tuple(PANELS), f"Any of {', '.join(PANELS)}.", among=PANELS)


class Point(NamedTuple):
  """A point of the figure, and the runs whose accuracy it shows."""

  panel: str
  curve: str
  x: float
  runs: list[Job]  # one for each seed


def points(recipe: Recipe, panels: Panels, seeds: int, out: Path) -> list[Point]:
  """All points of the chosen panels; two panels may share a run.

  Raises:
    ValueError: if a flag is invalid.
  """
  examples, largest = recipe.ways * recipe.train_shots, max(PANELS["b"][1])
  if "b" in panels.panels and examples < largest:
    raise ValueError(
      f"--panels=b has minibatches of {largest} and tasks of {examples} training examples: "
      "raise --train_shots, or leave panel b out"
    )
  found = []
  for panel in panels.panels:
    name, values = PANELS[panel]
    for curve in list(CURVES)[-1:] if panel == "c" else CURVES:
      for x in values:
        where = {"inner_steps": ITERATIONS, "inner_batch": BATCH, "outer_rate": recipe.outer_rate}
        if panel == "c":
          where["inner_batch"] = examples
        one = recipe_of(recipe, curve, where | {name: x})
        label = _label(curve, one)
        found.append(Point(panel, curve, x, runs.of_each_seed(label, one, out / label, seeds)))
  return found


def recipe_of(recipe: Recipe, curve: str, where: dict[str, Any]) -> Recipe:
  """The recipe of a point of a curve; `where` holds its inner steps, inner batch and outer rate.

  A separate tail has a quarter of the examples.
  """
  k = where["inner_steps"]
  weights = [1.0] * k if curve.startswith("Reptile") else [0.0] * (k - 1) + [1.0]
  shots = max(recipe.train_shots // 4, 1) if CURVES[curve]["tail"] == "separate" else 1
  return replace(recipe, weights=tuple(weights), tail_shots=shots, **CURVES[curve], **where)


def _label(curve: str, recipe: Recipe) -> str:
  """The name of the point, and of its folder."""
  step = f"{np.log2(recipe.outer_rate):g}"
  label = f"{curve}, {recipe.inner_steps} x {recipe.inner_batch}, step 2^{step}"
  for old, new in ((" ", "_"), ("(", ""), (")", ""), (",", ""), ("^", "")):
    label = label.replace(old, new)
  return label.lower()


def run(
  recipe: Recipe, panels: Panels, found: list[Point], folder: folders.RunFolder, seeds: int
) -> dict[str, Any]:
  """Trains the runs that are not complete, and returns the content of result.json."""
  many = {job.out: job for point in found for job in point.runs}  # two points may share one
  results = runs.run_all(list(many.values()), diverging_guesses=True)
  kept = folder.earlier("points", seeds) or []
  points = [point for point in kept if point["panel"] not in panels.panels] + [
    {
      "panel": point.panel,
      "curve": point.curve,
      "x": point.x,
      "cells": plots.cells_over_seeds([results[job.out] for job in point.runs]),
      "runs": [f"{job.out.parent.name}/{job.out.name}" for job in point.runs],
    }
    for point in found
  ]
  result = {
    "points": sorted(points, key=lambda point: point["panel"]),
    "meta_steps": recipe.meta_steps,
    "seeds": seeds,
    "cell": f"{recipe.eval_shots[0]}-shot transductive",
    "versions": folders.versions(),
  }
  folder.finish(result)
  draw(result, folder.path / "figure4")
  print(f"{result['cell']} accuracy over {recipe.eval_tasks} test tasks")
  for panel, curve, xs, cells in _lines(result):
    print(f"  ({panel}) {curve}")
    for x, cell in zip(xs, cells, strict=True):
      print(f"    {PANELS[panel][0]} {x:g}: {plots.percent(cell)}")
  print(f"  the runs are in {folder.path}")
  return result


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, str, list[float], list[dict[str, Any]]]]:
  """Yields the curves: panel, name, and along the curve x and the cells."""
  points = result["points"]
  for panel, curve in dict.fromkeys((point["panel"], point["curve"]) for point in points):
    line = [point for point in points if (point["panel"], point["curve"]) == (panel, curve)]
    yield panel, curve, [point["x"] for point in line], [p["cells"][result["cell"]] for p in line]


def draw(result: dict[str, Any], path: Path) -> None:
  """Draws Figure 4, with one panel for each setting that is varied."""
  panels = list(dict.fromkeys(point["panel"] for point in result["points"]))
  with plots.drawing(path, figsize=(max(4.2 * len(panels), 6), 4.2)) as figure:  # for the legend
    all_axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for panel, curve, xs, cells in _lines(result):
      between = "deviation_between_seeds" if result["seeds"] > 1 else "interval95"
      all_axes[panel].errorbar(
        xs,
        [100 * cell["accuracy"] for cell in cells],
        [100 * cell[between] for cell in cells],
        color=f"C{list(CURVES).index(curve)}",
        marker=".",
        linestyle="none" if panel == "c" else "-",  # the rates are too far apart to join
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
    bars = plots.band_title(result["seeds"]).replace("band", "bars")
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8, title=bars)


def program(options: cli.Run, panels: Panels, recipe: Recipe) -> Callable[[], Any]:
  """Checks the flags, and returns the function that runs the experiment."""
  out = Path(options.out or "")
  found = points(recipe, panels, options.seeds, out)
  if options.plot_only:
    result = folders.finished(out, "points")
    shown = [point for point in result["points"] if point["panel"] in panels.panels]
    if not shown:
      raise ValueError(f"{out} has no points of --panels={','.join(panels.panels)} yet")
    return partial(draw, result | {"points": shown}, out / "figure4")
  folder = runs.open_folder(recipe, out, without=_DECIDED, free=runs.COST)
  folder.check_seeds(options.seeds, all_of_them=set(panels.panels) == set(PANELS))
  runs.check_all([one for point in found for one in point.runs])
  folder.begin("a run of each point and seed")
  return folders.locked(out, partial(run, recipe, panels, found, folder, options.seeds))


if __name__ == "__main__":
  cli.main(program, Panels(), FIGURE, leave_out=_DECIDED)
