"""A few-shot run in its folder: trained, judged, and many of them together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import metajax
from experiments import build, folders, jobs, plots, trackers
from experiments.build import Experiment
from experiments.folders import Line, RunFolder
from experiments.recipes import Cost, Judging, Recipe, Training
from experiments.settings import values_of
from metajax.checkpoint import checkpoints

TASKS_PER_CALL = 25  # judged by one call of a compiled program, whatever the number of tasks
TEST_TASKS = "test_tasks.jsonl"
LEARNER, BEST_LEARNER = "learner.safetensors", "best_learner.safetensors"
_LONG = 10_000  # meta-steps; before a longer run, the network is shown
_FINN = 600  # tasks of a test in Finn et al. (2017), reported besides if there are more
_PATHS = ("data_dir", "cache_dir", "track")  # not kept with a run: another machine has others
COST = tuple(setting.name for setting in fields(Cost))
_FREE = ("eval_tasks", *COST)  # may differ on resuming


def open_folder(
  recipe: Recipe, out: str | Path, *, without: Sequence[str] = (), free: Sequence[str] = _FREE
) -> RunFolder:
  """The folder of the recipe's run; nothing is written yet.

  Args:
    recipe: whose settings the folder belongs to.
    out: the folder.
    without: settings that it does not keep, since each run inside has others.
    free: settings that may differ from those that the run was begun with.
  """
  left_out = (*_PATHS, *without)
  groups = Training, Judging, Cost
  values = values_of(recipe, *groups).items()
  kept = {name: value for name, value in values if name not in left_out}
  return RunFolder(out, kept, free=free, defaults=values_of(Recipe(), *groups))


def prepare(
  recipe: Recipe, out: str | Path, mesh: jax.sharding.Mesh | None = None
) -> tuple[Experiment, RunFolder]:
  """Reads the data, builds the experiment and begins its folder.

  Args:
    recipe: of one run.
    out: its folder.
    mesh: where to run; by default all devices if tasks are spread over them, else one.

  Raises:
    ValueError: if a setting or the data is no good; nothing has been written over then.
  """
  folder = open_folder(recipe, out)
  trackers.check(recipe.track or ())
  mesh = build.mesh_of(recipe) if mesh is None else mesh
  splits = metajax.programs.on_mesh(build.load(recipe), mesh)
  experiment = build.build(recipe, splits, mesh)
  folder.begin(folders.describe(splits))
  return experiment, folder


class Job(NamedTuple):
  """One of several runs."""

  label: str
  recipe: Recipe
  out: Path


def check_all(many: Sequence[Job]) -> None:
  """Raises what is wrong with any of several runs, before one is trained.

  All are built with the first run's data. Those that have begun, which may be complete, must be of
  the data that they began with.
  """
  for _, recipe, _ in many:
    trackers.check(recipe.track or ())
  first = many[0].recipe
  splits = build.load(first)
  by_seed = {first.seed: folders.describe(splits)}
  for _, recipe, out in many:
    folder = open_folder(recipe, out)
    complete(recipe, folder)
    build.build(recipe, splits, build.mesh_of(recipe))
    if folder.begun():
      if recipe.seed not in by_seed:
        by_seed[recipe.seed] = folders.describe(build.load(recipe))
      folder.check(by_seed[recipe.seed])


class Keys(NamedTuple):
  """Everything random in a run."""

  init: jax.Array
  train: jax.Array
  curve: jax.Array
  test: jax.Array


def keys_of(recipe: Recipe, mesh: jax.sharding.Mesh) -> Keys:
  init, train, *_ = jax.random.split(jax.random.key(recipe.seed), 4)
  *_, curve, test = jax.random.split(jax.random.key(recipe.seed_of_data), 4)
  return metajax.programs.on_mesh(Keys(init, train, curve, test), mesh)


def judge_of(experiment: Experiment, folder: RunFolder, prefix: str) -> Callable[..., Any]:
  """Judges states of an experiment. Its progress bars begin with the prefix.

  Returns:
    `(state, key, split, num_tasks, log=None) -> {cell: accuracies [num_tasks]}`. With the name of a
    log in the folder, what is in the log is not computed again.
  """
  judges = {
    (split, shots): metajax.judge(
      *evaluation, experiment.mesh, tasks_per_call=TASKS_PER_CALL, chunk=experiment.chunk
    )
    for split, by_shots in experiment.evaluations.items()
    for shots, evaluation in by_shots.items()
  }

  def judge(
    state: metajax.MetaState, key: jax.Array, split: str, num_tasks: int, log: str | None = None
  ) -> dict[str, np.ndarray]:
    logged = folder.keep(name=log) if log else []
    done = {(line["shots"], line["first"]): line["accuracy"] for line in logged}
    values = {}
    for shots in experiment.evaluations[split]:
      columns: dict[str, list[float]] = {}
      desc = f"{prefix}judging {shots} {split} tasks"
      with jobs.progress(total=num_tasks, unit="task", desc=desc, mesh=experiment.mesh) as bar:
        for first in range(0, num_tasks, TASKS_PER_CALL):
          part = done.get((shots, first))
          if part is None:
            if metajax.devices.in_any_process(jobs.stopping()):
              raise jobs.StoppedError(
                f"stopped at {shots} test task {first} of {folder.path}: the same command goes on "
                "from there"
              )
            accuracies = judges[split, shots](state, key, TASKS_PER_CALL, first)
            part = {protocol: column.tolist() for protocol, column in accuracies.items()}
            if log:
              folder.append({"shots": shots, "first": first, "accuracy": part}, log)
          for protocol, column in part.items():
            columns.setdefault(protocol, []).extend(column)
          so_far = (f"{name} {100 * np.mean(column):.1f} %" for name, column in columns.items())
          bar.set_postfix_str(", ".join(so_far), refresh=False)
          bar.update(min(TASKS_PER_CALL, num_tasks - first))
      for protocol, column in columns.items():
        values[f"{shots} {protocol}"] = np.array(column[:num_tasks])
    return values

  return judge


def cells_of(values: dict[str, np.ndarray]) -> Line:
  """The cells of a result, from the accuracies of test tasks."""
  cells = plots.with_intervals(values)
  for name, cell in cells.items():
    cell["tasks"] = len(values[name])
    if len(values[name]) > _FINN:
      cell["first_600"] = plots.with_intervals({name: values[name][:_FINN]})[name]
  return cells


def run(recipe: Recipe, experiment: Experiment, folder: RunFolder, label: str = "") -> Line:
  """Trains and judges; returns what it writes to result.json. The label tells runs apart."""
  keys = keys_of(recipe, experiment.mesh)
  prefix = f"{label}: " if label else ""
  judge = judge_of(experiment, folder, prefix)
  start = experiment.learner.init(jax.jit(experiment.model.init)(keys.init))

  def evaluate(state: metajax.MetaState) -> Line:
    folder.keep(lambda line: False, TEST_TASKS)  # they are of a later state, or of this one anew
    return {
      split: plots.with_intervals(judge(state, keys.curve, split, recipe.curve_tasks))
      for split in recipe.curve_splits
    }

  if recipe.meta_steps >= _LONG and folders.writes():
    batch = np.repeat(experiment.example_inputs, recipe.inner_batch, axis=0)
    tqdm.write(metajax.models.summary(experiment.model, batch))
  with _tracked(recipe, experiment, folder, keys.train) as track:
    record = jobs.train(
      folder,
      experiment.learner,
      experiment.sample_task,
      experiment.make_episode,
      start,
      keys.train,
      track=track,
      evaluate=evaluate,
      summary=plots.learning_curve_summary,
      score=plots.learning_curve_score,
      mesh=experiment.mesh,
      label=f"{prefix}meta-training",
      num_steps=recipe.meta_steps,
      report_every=recipe.eval_every,
      steps_per_call=recipe.steps_per_call,
    )
  cells = cells_of(judge(record.state, keys.test, "test", recipe.eval_tasks, TEST_TASKS))
  build.ship(recipe, experiment, record.state, folder.path / LEARNER, {"accuracy": cells})
  with checkpoints(folder.path / "checkpoints") as opened:
    best = opened.best(record.state)
  if best is not None:
    build.ship(recipe, experiment, best.state, folder.path / BEST_LEARNER, {"chosen": "best"})
  result: Line = {
    "data": recipe.data_name,
    "cells": cells,
    "meta_steps": recipe.meta_steps,
    "train_seconds": round(record.seconds, 3),
    "meta_steps_per_second": round(recipe.meta_steps / record.seconds, 3),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(record.state.params)),
    "peak_memory_mb": folders.peak_memory(),
    "versions": folders.versions(),
  }
  plots.draw_learning_curve([folder.lines()], folder.path / "learning_curve.png")
  folder.finish(result)
  return result


@contextmanager
def _tracked(
  recipe: Recipe, experiment: Experiment, folder: RunFolder, key: jax.Array
) -> Iterator[Callable[[Line], None]]:
  """Yields a function that sends a line to the recipe's trackers, and the first one with images."""
  names, settings = recipe.track or (), values_of(recipe, Training, Judging)
  opened = [trackers.opened(name, folder.path, settings) for name in names if folders.writes()]

  def track(line: Line) -> None:
    if names and line["step"] == 0:  # drawn in all processes, since the data may be on all devices
      images = np.asarray(experiment.sample_task(key).train.inputs)
      for tracker in opened:
        tracker.images(0, "a training task", images)
    for tracker in opened:
      tracker.numbers(line["step"], trackers.numbers_of(line))

  try:
    yield track
  finally:
    for tracker in opened:
      tracker.close()


def complete(recipe: Recipe, folder: RunFolder) -> Line | None:
  """The result of a run that is complete.

  Raises:
    ValueError: if it was judged on another number of tasks.
  """
  result = folder.result()
  judged = {cell["tasks"] for cell in result["cells"].values()} if result else set()
  if judged - {recipe.eval_tasks}:
    raise ValueError(
      f"{folder.path} is complete, judged on {judged.pop()} tasks: to judge it on "
      f"{recipe.eval_tasks}, run few_shot with --out={folder.path} --judge=newest "
      f"--eval_tasks={recipe.eval_tasks}, and --data_dir where the data needs it"
    )
  return result


def run_all(many: Sequence[Job], *, diverging_guesses: bool = False) -> dict[Path, Line]:
  """The results of several runs, by folder; those that are complete are left as they are.

  If they spread their tasks, they run one after another on all devices, else side by side, each on
  a device of its own. A run that diverges ends them all, or, with `diverging_guesses`, has the
  accuracy of guessing.
  """

  def result_of(label: str, recipe: Recipe, out: Path, mesh: jax.sharding.Mesh | None) -> Line:
    folder = open_folder(recipe, out)
    try:
      result = complete(recipe, folder)
      if result is not None:
        return result
      prepared = prepare(recipe, out, mesh)
      with folders.alone(out):
        return run(recipe, *prepared, label)
    except jobs.DivergedError as error:
      if not diverging_guesses:
        raise
      guess = {"accuracy": 1 / recipe.ways, "interval95": 0.0, "tasks": recipe.eval_tasks}
      cells = [
        f"{shots}-shot {protocol}"
        for shots, _ in recipe.shots_and_batches
        for protocol in ("transductive", "inductive")
      ]
      result = {"cells": dict.fromkeys(cells, guess), "diverged": str(error)}
      folder.finish(result)
      tqdm.write(f"{label}: {error}; it counts as guessing")
      return result

  if any(recipe.execution == build.SPREAD for _, recipe, _ in many):
    results = [result_of(*one, None) for one in many]
  else:
    results = jobs.side_by_side([partial(result_of, *one) for one in many])
  return {one.out: result for one, result in zip(many, results, strict=True)}


def judge_again(recipe: Recipe, which: str, out: str | Path) -> Line:
  """Judges the newest or the best checkpoint of a run, which may still be training.

  Lines and result are written to a folder of the run, judged/stepN; one that was judged in another
  way is renamed to judged/stepN.old1.

  Raises:
    ValueError: if the recipe trains something else, or there is no checkpoint.
  """
  folder = open_folder(recipe, out, free=(*_FREE, *(setting.name for setting in fields(Judging))))
  saved = folder.path / "checkpoints"
  if not saved.is_dir():
    raise ValueError(f"{folder.path} holds no checkpoints to judge: give the --out of a run")
  mesh = build.mesh_of(recipe)
  splits = metajax.programs.on_mesh(build.load(recipe), mesh)
  experiment = build.build(recipe, splits, mesh)
  folder.check(folders.describe(splits))
  keys = keys_of(recipe, mesh)
  like = experiment.learner.init(jax.jit(experiment.model.init)(keys.init))
  with checkpoints(saved) as opened:
    find = {"newest": opened.restore, "best": opened.best}[which]
    found = find(metajax.programs.on_mesh(like, mesh))
  if found is None:
    if which == "best" and set(recipe.curve_splits) == {"test"}:
      raise ValueError(
        f"{folder.path} has no best checkpoint, which is never chosen on test tasks, and its "
        "learning curve has no others: use --judge=newest"
      )
    advice = "wait" if which == "newest" else "wait, or use --judge=newest"
    raise ValueError(f"{folder.path} has no {which} checkpoint yet: {advice}")
  step = int(found.state.step)
  ways = {name: value for name, value in values_of(recipe, Judging).items() if name != "eval_tasks"}
  path = folder.path / "judged" / f"step{step}"
  other = _is_of_others(path, ways)
  metajax.devices.wait_for_all("all have looked at what was judged before")
  if other and folders.writes():
    folders.set_aside(path)
  metajax.devices.wait_for_all("what was judged in another way is put aside")
  judged = RunFolder(path, ways)
  judged.begin()
  with folders.alone(path):
    judge = judge_of(experiment, judged, f"meta-step {step}: ")
    values = judge(found.state, keys.test, "test", recipe.eval_tasks, TEST_TASKS)
    result = {
      "data": recipe.data_name,
      "cells": cells_of(values),
      "meta_steps": step,
      "versions": folders.versions(),
    }
    build.ship(recipe, experiment, found.state, path / LEARNER, {"accuracy": result["cells"]})
    judged.finish(result)
  return result


def _is_of_others(path: Path, settings: dict[str, Any]) -> bool:
  """Whether a folder is of a run with other settings."""
  try:
    RunFolder(path, settings)
  except ValueError:
    return True
  return False


def of_each_seed(label: str, recipe: Recipe, out: Path, seeds: int) -> list[Job]:
  """The runs of several seeds, each in a folder of its own inside `out`.

  Raises:
    ValueError: if a seed is too large.
  """
  label = f"{label}, " if label else ""
  return [
    Job(f"{label}seed {seed}", replace(recipe, seed=seed), out / f"seed{seed}")
    for seed in range(recipe.seed, recipe.seed + seeds)
  ]
