"""Few-shot classification (Section 6.1): meta-trains one algorithm on one data set, and judges it.

  python -m experiments.few_shot
  python -m experiments.few_shot --recipe=omniglot_5way_reptile
  python -m experiments.few_shot --dataset=folder --data_dir=DIR --image_size=28 --network=conv4

The run folder (--out) gets flags.txt, metrics.jsonl, test_tasks.jsonl, result.json,
learning_curve.png, checkpoints, and the learner file of the last state, which metajax.load and
experiments.adapt read, and that of the best state if there is one. (Algorithms such as Meta-SGD,
whose adaptation a learner file cannot describe, have none.) The same command with the same --out
resumes an interrupted run. With --seeds, each run has a folder of its own inside. A trained learner
is judged again, in other ways or on more tasks, by

  python -m experiments.few_shot --out=DIR --judge=newest --eval_tasks=10000
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import cli, folders, plots, runs
from experiments.folders import Line
from experiments.recipes import PRESETS, Recipe
from experiments.settings import Settings, as_text, option, values_of


@dataclass(frozen=True, kw_only=True)
class Choice(Settings):
  """Which run, and whether it is trained."""

  recipe: str | None = option(
    None, f"The settings to start from; other flags change them. One of {', '.join(PRESETS)}."
  )
  judge: Literal["newest", "best"] | None = option(
    None,
    "Trains nothing: judges a checkpoint of --out, which need not be complete, by the given "
    "--eval flags. The results are written to OUT/judged or, with several seeds, to the folder "
    "judged in the folder of each seed.",
  )


def program(run_options: cli.Run, choice: Choice, recipe: Recipe) -> Callable[[], Any]:
  """Checks what the binary is asked to do, and returns what to run."""
  out = Path(run_options.out or "")
  picture = out / "learning_curve.png"
  if choice.judge is not None:
    if run_options.fresh or run_options.plot_only:
      raise ValueError("--judge judges a run that is there: leave out --fresh and --plot_only")
    if recipe.track:
      raise ValueError("--track sends what is trained, and --judge trains nothing: leave out one")
    return partial(_judge_all, recipe, choice.judge, out)
  if run_options.plot_only:
    logs = folders.logs_of_seeds(out) or [folders.logged(out)]
    return partial(plots.draw_learning_curve, logs, picture)
  folder = runs.open_folder(recipe, out)
  folder.check_seeds(run_options.seeds)
  if run_options.seeds == 1:
    result = runs.complete(recipe, folder)
    if result is not None:
      return partial(report, recipe, result, out)
    prepared = runs.prepare(recipe, out)
    return folders.locked(out, lambda: report(recipe, runs.run(recipe, *prepared), out))
  many = runs.of_each_seed("", recipe, out, run_options.seeds)
  runs.check_all(many)
  folder.begin("a run of each seed")

  def each_seed() -> None:
    results = list(runs.run_all(many).values())
    mean = lambda key: round(sum(result[key] for result in results) / len(results), 3)
    whole = {
      **results[0],
      "seeds": len(results),
      "cells": plots.cells_over_seeds(results),
      "train_seconds": mean("train_seconds"),
      "meta_steps_per_second": mean("meta_steps_per_second"),
    }
    folder.finish(whole)
    plots.draw_learning_curve([folders.logged(job.out) for job in many], picture)
    report(recipe, whole, out)

  return folders.locked(out, each_seed)


def _judge_all(recipe: Recipe, which: str, out: Path) -> None:
  """Judges the run in a folder, or those of all seeds in it."""
  seeds = [path for path in folders.seeds_in(out) if (path / "checkpoints").is_dir()]
  paths = seeds or [out]
  recipes = [replace(recipe, seed=int(path.name[4:])) for path in paths] if seeds else [recipe]
  results = [runs.judge_again(one, which, path) for one, path in zip(recipes, paths, strict=True)]
  steps = sorted({result["meta_steps"] for result in results})
  meta_steps = " or ".join(map(str, steps))  # each seed has its own checkpoints
  whole = {**results[0], "cells": plots.cells_over_seeds(results), "meta_steps": meta_steps}
  report(recipe, whole, out / ("seed*/judged" if seeds else "judged"))


def report(recipe: Recipe, result: Line, out: Path) -> None:
  """Prints a result."""
  first = next(iter(result["cells"].values()))
  print(
    f"{result.get('data', recipe.data_name)}, {recipe.ways}-way, {recipe.algorithm}: "
    f"accuracy over {first['tasks']} test tasks, with its 95 % interval"
  )
  for name, cell in result["cells"].items():
    print(f"  {name:20s} {plots.percent(cell)}")
  each = " each" if "seeds" in first else ""
  took = f", trained in {result['train_seconds']:.0f} s{each}" if "train_seconds" in result else ""
  steps = result["diverged"] if "diverged" in result else f"{result['meta_steps']} meta-steps"
  print(f"  {steps}{took}; see {out}")


# By algorithm, why it does not use some flags, and their names.
_WITHOUT_EFFECT = {
  "prototypical": (
    "which has no inner steps and takes the mean loss",
    (
      "inner_optimizer",
      "inner_rate",
      "inner_eps_root",
      "inner_state",
      "inner_batch",
      "inner_steps",
      "minibatches",
      "loss_reduction",
      "eval_steps",
      "eval_batch",
    ),
  ),
  "joint": ("which takes one inner step", ("inner_steps",)),
  "scratch": (
    "which learns no parameters",
    ("outer_optimizer", "outer_rate", "outer_rate_final", "outer_schedule", "outer_clip"),
  ),
  "anil": ("which moves the last layer only", ("adapt_norm",)),
}


def implied(given: dict[str, Any]) -> list[str]:
  """The flags of --recipe; with --judge, those that the run was trained with.

  Raises:
    ValueError: if they are not there, or the algorithm does not use a flag that was given.
  """
  lines = _implied(given)
  flag = "--algorithm="
  before = [line.removeprefix(flag) for line in lines if line.startswith(flag)]
  algorithm = given.get("algorithm", before[-1] if before else Recipe().algorithm)
  why, names = _WITHOUT_EFFECT.get(algorithm, ("", ()))
  for name in names:
    if name in given:
      raise ValueError(f"--{name} is of no use with --algorithm={algorithm}, {why}: leave it out")
  return lines


def _implied(given: dict[str, Any]) -> list[str]:
  if given.get("judge"):
    if given.keys() & {"recipe", "seed", "seeds"}:
      raise ValueError(
        "--judge reads how a run was trained: leave out --recipe, --seed and --seeds"
      )
    flags = Path(given.get("out", ""), "flags.txt").expanduser()
    if not flags.is_file():
      raise ValueError("--judge judges a run: give its folder as --out")
    return [line for line in flags.read_text().splitlines() if line.startswith("--")]
  name = given.get("recipe")
  if name is None:
    return []
  if name not in PRESETS:
    raise ValueError(f"--recipe={name} must be one of {', '.join(PRESETS)}")
  return [f"--{one}={as_text(value)}" for one, value in values_of(PRESETS[name], Recipe).items()]


if __name__ == "__main__":
  cli.main(program, Choice(), Recipe(), implied=implied)
