"""Linear combinations of the inner gradients (Section 6.2, Figure 3): which of them learn.

  python -m experiments.combinations --data_dir=DIR --seeds=2 --out=DIR

Trains the ten combinations of g_1 ... g_k, k = 1 ... 4, on 5-shot 5-way Omniglot by plain SGD
inside and out, each run on a device of its own, several at once. Takes the flags of
`experiments.few_shot`; a run is one of its runs, in a folder of its own, so that the same command
goes on where it stopped. The run folder (--out) gets result.json, figure3.png and figure3.svg.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import app, flags

from experiments import common, few_shot, folders, reports


def _fractions(k: int) -> dict[str, tuple[str, list[float]]]:
  """The mean, the sum and the last of k gradients."""
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

Logs = dict[str, list[list[folders.Record]]]  # by curve, of every seed

# fmt: off
_FLAGS = (
  *few_shot.FLAGS,
  flags.DEFINE_list("curves", list(CURVES), f"Any of {', '.join(CURVES)}."),
)
# fmt: on
_DEFAULTS = few_shot.PLAIN_SGD | {"train_shots": None, "inner_batch": 25, "eval_every": 500}


def runs(settings: SimpleNamespace) -> dict[str, list[SimpleNamespace]]:
  """The settings of every run, by curve: one for each seed.

  Training tasks have as many shots as it takes that no two of the k minibatches overlap.

  Raises:
    ValueError: if a flag is no good.
  """
  unknown = sorted(set(settings.curves) - set(CURVES))
  if unknown or not settings.curves:
    raise ValueError(f"--curves must be any of {', '.join(CURVES)}, separated by commas")
  common.refuse(
    settings, "weights", "inner_steps", "train_shots", algorithm="combine", tail="shared"
  )
  if "test" not in settings.curve_splits:
    raise ValueError("--curve_splits must have test, which is what the figure shows")
  chosen = common.changed(settings)
  del chosen.curves
  found = {}
  for name in settings.curves:
    weights = CURVES[name][1]
    one = common.changed(
      chosen,
      weights=weights,
      inner_steps=len(weights),
      train_shots=-(-len(weights) * settings.inner_batch // settings.ways),
      out=str(Path(settings.out, name)),
    )
    few_shot.check(one)
    found[name] = common.of_each_seed(one)
  return found


def run(settings: SimpleNamespace, by_curve: dict[str, list[SimpleNamespace]]) -> dict[str, Any]:
  """Trains what is not there yet; returns what it writes to result.json."""
  many = [
    (f"{name}, seed {one.seed}", one)
    for of_seeds in zip(*by_curve.values(), strict=True)
    for name, one in zip(by_curve, of_seeds, strict=True)
  ]
  many.sort(key=lambda one: one[1].inner_steps, reverse=True)  # a long one begun last ends alone
  results = dict(zip((one.out for _, one in many), few_shot.run_all(many), strict=True))
  folder = folders.open_folder(_of_figure(settings))
  before = folder.result() or {"curves": {}, "seeds": settings.seeds}
  curves = before["curves"] if before["seeds"] == settings.seeds else {}
  curves |= {
    name: reports.cells_over_seeds([results[one.out] for one in of_seeds])
    for name, of_seeds in by_curve.items()
  }
  result = {
    "curves": {name: curves[name] for name in CURVES if name in curves},
    "meta_steps": settings.meta_steps,
    "seeds": settings.seeds,
    "versions": folders.versions(),
  }
  folder.finish(result)
  there = runs(common.changed(settings, curves=list(result["curves"])))
  logs = {name: [folders.logged(one.out) for one in of_seeds] for name, of_seeds in there.items()}
  draw(logs, Path(settings.out, "figure3"))
  print(f"accuracy over {settings.eval_tasks} test tasks after {settings.meta_steps} meta-steps")
  for name, cells in result["curves"].items():
    print(f"  {CURVES[name][0]}")
    for cell, value in cells.items():
      print(f"    {cell:20s} {reports.percent(value)}")
  print(f"  the runs are in {settings.out}")
  return result


def draw(logs: Logs, path: Path) -> None:
  """Figure 3: accuracy against meta-steps, smoothed, one colour for each k."""
  seeds = min(map(len, logs.values()))  # of a run under way, those that all curves have
  logs = {name: of_seeds[:seeds] for name, of_seeds in logs.items()}
  first = next(iter(logs.values()))[0][0]["test"]
  cell = next(name for name in first if name.endswith("transductive"))
  with reports.drawing(path, figsize=(12.0, 4.8)) as figure:
    whole, upper = figure.subplots(1, 2)
    for name in (name for name in CURVES if name in logs):
      records = logs[name]
      label, weights = CURVES[name]
      steps, mean, band = reports.curve(records, "test", cell)
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
    title = f"{cell},\nrunning mean of 5 points;\n{reports.band_title(seeds)}"
    lines = whole.get_legend_handles_labels()
    figure.legend(*lines, title=title, fontsize=8, title_fontsize=8, loc="outside right center")


def _smooth(values: np.ndarray, reach: int = 2) -> np.ndarray:
  """The mean of a point and `reach` on either side, of fewer toward the ends."""
  last = len(values) - 1
  reaches = [min(reach, i, last - i) for i in range(len(values))]
  return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reaches)])


def _of_figure(settings: SimpleNamespace) -> SimpleNamespace:
  """What all curves have in common: `--curves` may be trained one after another."""
  return common.changed(settings, curves=None)


def program(settings: SimpleNamespace) -> Callable[[], Any]:
  """What the binary does, checked."""
  common.check_numbers(settings, "inner_batch", "ways")
  by_curve = runs(settings)
  if settings.plot_only:
    found = {name: folders.logs_of_seeds(Path(settings.out, name)) for name in by_curve}
    there = {name: logs for name, logs in found.items() if logs}
    if not there:
      raise ValueError(f"{settings.out} holds no run to draw: train first, without --plot_only")
    return partial(draw, there, Path(settings.out, "figure3"))
  few_shot.check_all([one for many in by_curve.values() for one in many])
  folders.open_folder(_of_figure(settings)).begin("a run of each curve and seed")
  return partial(run, settings, by_curve)


def defaults(**changes: Any) -> SimpleNamespace:
  """The flags' default values, but for `changes`: to run from Python."""
  return common.defaults(_FLAGS, **{**_DEFAULTS, **changes})


def main(argv: list[str]) -> None:
  common.main("combinations", argv, _FLAGS, _DEFAULTS, program)


if __name__ == "__main__":
  app.run(main, flags_parser=common.parse_flags)
