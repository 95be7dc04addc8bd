"""Compares linear combinations of the inner gradients (Section 6.2, Figure 3).

  python -m experiments.combinations --data_dir=DIR --seeds=2 --out=DIR

Trains with ten combinations of g_1 ... g_k, k = 1 ... 4, on 5-shot 5-way Omniglot, with plain SGD
in the inner and the outer loop. Runs are independent: each has its own device, and several run at
once. Each is a run of `experiments.few_shot` in its own folder, so the same command resumes those
that were interrupted. The run folder (--out) gets result.json, figure3.png and figure3.svg.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, folders, plots, runs
from experiments.recipes import PLAIN_SGD, Recipe
from experiments.runs import Job
from experiments.settings import Settings, option


def _fractions(k: int) -> dict[str, tuple[str, list[float]]]:
  """Labels and weights of the mean, the sum and the last of k gradients."""
  terms = " + ".join(f"g{i}" for i in range(1, k + 1))
  return {
    f"mean{k}": (f"({terms}) / {k}", [1 / k] * k),
    f"sum{k}": (terms, [1.0] * k),
    f"last{k}": (f"g{k}", [0.0] * (k - 1) + [1.0]),
  }


CURVES: dict[str, tuple[str, list[float]]] = {
  "g1": ("g1", [1.0]),
  **_fractions(2),
  **_fractions(3),
  **_fractions(4),
}

Logs = dict[str, list[list[folders.Line]]]  # the logs of every seed, by curve

_DECIDED = (
  "algorithm",
  "weights",
  "inner_steps",
  "train_shots",
  "tail",
  "tail_shots",
)  # settings that the curve decides
FIGURE = replace(PLAIN_SGD, inner_batch=25, eval_every=500)


@dataclass(frozen=True, kw_only=True)
class Curves(Settings):
  """Which curves of the figure to train or draw."""

  curves: tuple[str, ...] = option(tuple(CURVES), f"Any of {', '.join(CURVES)}.", among=CURVES)


def recipes(recipe: Recipe, curves: Curves) -> dict[str, Recipe]:
  """The recipe of every curve.

  Training tasks have the fewest shots with which no two of the k minibatches overlap.

  Raises:
    ValueError: if a setting is invalid.
  """
  if "test" not in recipe.curve_splits:
    raise ValueError("--curve_splits must have test, which is what the figure shows")
  return {
    name: replace(
      recipe,
      weights=tuple(weights),
      inner_steps=len(weights),
      train_shots=-(-len(weights) * recipe.inner_batch // recipe.ways),
    )
    for name, (_, weights) in CURVES.items()
    if name in curves.curves
  }


def runs_of(recipe: Recipe, curves: Curves, seeds: int, out: Path) -> dict[str, list[Job]]:
  """The runs of every curve, one for each seed."""
  return {
    name: runs.of_each_seed(name, one, out / name, seeds)
    for name, one in recipes(recipe, curves).items()
  }


def run(
  recipe: Recipe, by_curve: dict[str, list[Job]], folder: folders.RunFolder, seeds: int
) -> dict[str, Any]:
  """Trains the runs that are not complete, and returns the content of result.json."""
  many = [one for of_seeds in zip(*by_curve.values(), strict=True) for one in of_seeds]
  many.sort(key=lambda job: job.recipe.inner_steps, reverse=True)  # longest first: none ends alone
  results = runs.run_all(many)
  curves: dict[str, Any] = folder.earlier("curves", seeds) or {}
  curves |= {
    name: plots.cells_over_seeds([results[job.out] for job in of_seeds])
    for name, of_seeds in by_curve.items()
  }
  result: dict[str, Any] = {
    "curves": {name: curves[name] for name in CURVES if name in curves},
    "meta_steps": recipe.meta_steps,
    "seeds": seeds,
    "versions": folders.versions(),
  }
  folder.finish(result)
  there = runs_of(recipe, Curves(curves=tuple(result["curves"])), seeds, folder.path)
  logs = {name: [folders.logged(job.out) for job in of_seeds] for name, of_seeds in there.items()}
  draw(logs, folder.path / "figure3")
  print(f"accuracy over {recipe.eval_tasks} test tasks after {recipe.meta_steps} meta-steps")
  for name, cells in result["curves"].items():
    print(f"  {CURVES[name][0]}")
    for cell, value in cells.items():
      print(f"    {cell:20s} {plots.percent(value)}")
  print(f"  the runs are in {folder.path}")
  return result


def draw(logs: Logs, path: Path) -> None:
  """Draws Figure 3: smoothed accuracy against meta-steps, one colour for each k."""
  seeds = min(map(len, logs.values()))  # if unfinished, those that all curves have
  logs = {name: of_seeds[:seeds] for name, of_seeds in logs.items()}
  first = next(iter(logs.values()))[0][0]["test"]
  cell = next(name for name in first if name.endswith("transductive"))
  with plots.drawing(path, figsize=(12.0, 4.8)) as figure:
    whole, upper = figure.subplots(1, 2)
    for name in (name for name in CURVES if name in logs):
      lines = logs[name]
      label, weights = CURVES[name]
      steps, mean, band = plots.curve(lines, "test", cell)
      mean, band = _smooth(mean), _smooth(band)
      style = {"m": ":", "s": "-", "l": "--", "g": "-"}[name[0]]
      color = f"C{len(weights) - 1}"
      for axes in (whole, upper):
        axes.plot(steps, mean, style, color=color, label=label)
      whole.fill_between(steps, mean - band, mean + band, color=color, alpha=0.15, lw=0)
    whole.set(xlabel="meta-steps", ylabel="accuracy on test tasks (%)", ylim=(0, 100))
    upper.set(xlabel="meta-steps", title="the same, above 85 % and without bands", ylim=(85, 100))
    for axes in (whole, upper):
      axes.grid(alpha=0.3)
    title = f"{cell},\nrunning mean of 5 points;\n{plots.band_title(seeds)}"
    labelled = whole.get_legend_handles_labels()
    figure.legend(*labelled, title=title, fontsize=8, title_fontsize=8, loc="outside right center")


def _smooth(values: np.ndarray, reach: int = 2) -> np.ndarray:
  """The mean of each point and up to `reach` on either side, fewer toward the ends."""
  last = len(values) - 1
  reaches = [min(reach, i, last - i) for i in range(len(values))]
  return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reaches)])


def program(options: cli.Run, curves: Curves, recipe: Recipe) -> Callable[[], Any]:
  """Checks the flags, and returns the function that runs the experiment."""
  out = Path(options.out or "")
  by_curve = runs_of(recipe, curves, options.seeds, out)
  if options.plot_only:
    found = {name: folders.logs_of_seeds(out / name) for name in by_curve}
    there = {name: logs for name, logs in found.items() if logs}
    if not there:
      raise ValueError(f"{out} holds no run to draw: train first, without --plot_only")
    return partial(draw, there, out / "figure3")
  folder = runs.open_folder(recipe, out, without=_DECIDED, free=runs.COST)
  folder.check_seeds(options.seeds, all_of_them=set(curves.curves) == set(CURVES))
  runs.check_all([one for of_seeds in by_curve.values() for one in of_seeds])
  folder.begin("a run of each curve and seed")
  return folders.locked(out, partial(run, recipe, by_curve, folder, options.seeds))


if __name__ == "__main__":
  cli.main(program, Curves(), FIGURE, leave_out=_DECIDED)
