"""Sine waves (Section 4, Figure 1): learn to regress a wave from ten of its points.

  python -m experiments.sine

Meta-trains by Reptile, first-order MAML, MAML and joint training, with one wave in each iteration.
The results and a random initialization are then judged on the same new waves, by the mean squared
error on 50 equally spaced points after 0 to 32 gradient steps on ten points. The run folder (--out)
gets result.json, figure1.png and figure1.svg, and a folder for the training of each method, in
which the same command resumes an interrupted run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import metajax
from experiments import cli, folders, jobs, plots
from experiments.settings import Settings, option, values_of

GRADIENT_STEPS = 32
_INNER_RATE = 0.02  # from the authors' script, like minibatches of 10 and the outer rate 0.1
_POINTS, _GRID = 10, 50
_CURVE_TASKS = 100
_CONDITION = "sine waves, drawn from the seed"

MODEL = metajax.models.sine()
LOSS = metajax.losses.squared_error(MODEL.apply, reduction="mean")
INNER = optax.sgd(_INNER_RATE)


@dataclass(frozen=True, kw_only=True)
class Waves(Settings):
  """How long each method is trained, and on how many waves it is judged."""

  meta_steps: int = option(100_000, "The number of meta-steps.", at_least=1)
  eval_tasks: int = option(1_000, "New waves of the final result.", at_least=2)
  seed: int = option(0, "Determines everything random.", at_least=0)


class Method(NamedTuple):
  """How one initialization is trained."""

  gradient: metajax.MetaGradient
  outer_rate: float
  outer: Any  # optax.sgd or optax.adam
  sample_task: Any
  make_episode: Any


def methods() -> dict[str, Method]:
  """The four training methods, by name.

  Reptile is the paper's, with minibatches from the whole grid. MAML and FOMAML adapt by 5 steps on
  10 random points, take the loss on the grid as their last loss, and use Adam in the outer loop.
  Joint training is Reptile with a single minibatch.
  """
  sine = metajax.data.sine
  grid = sine.sample_task(sine.grid_points(_GRID))
  few = sine.sample_task(sine.uniform_points(_POINTS), sine.grid_points(_GRID))
  one_pass = metajax.shared_tail(metajax.cycling(_GRID // _POINTS, _POINTS))
  one_batch = metajax.shared_tail(metajax.cycling(1, _POINTS))
  query = metajax.separate_tail(metajax.cycling(1 + _GRID // _POINTS, _POINTS))
  return {
    "reptile": Method(metajax.reptile(LOSS, INNER), 0.1, optax.sgd, grid, one_pass),
    "fomaml": Method(metajax.fomaml(LOSS, INNER), 1e-3, optax.adam, few, query),
    "maml": Method(metajax.maml(LOSS, INNER), 1e-3, optax.adam, few, query),
    "joint": Method(metajax.reptile(LOSS, INNER), 1.0, optax.sgd, grid, one_batch),
  }


def adapt(params: Any, task: metajax.Task) -> tuple[Any, jax.Array]:
  """Returns the parameters after 32 steps, and the test losses after 0 to 32 steps, `[33]`."""

  def body(
    learner: metajax.LearnerState, _: None
  ) -> tuple[metajax.LearnerState, tuple[Any, jax.Array]]:
    test_loss = LOSS(learner.params, task.test)
    after = metajax.inner_step(LOSS, INNER, learner, task.train)[0]
    return after, (learner.params, test_loss)

  start = metajax.LearnerState(params, INNER.init(params))
  _, (path, losses) = jax.lax.scan(body, start, length=GRADIENT_STEPS + 1)
  return jax.tree.map(lambda leaf: leaf[-1], path), losses


def judge(params: Any, key: jax.Array, num_tasks: int) -> dict[str, list[float]]:
  """The mean loss over new waves after each number of steps, with its 95 % interval."""
  return plots.mean_losses(_losses(params, key, num_tasks))


_sample = jax.jit(metajax.data.sine.sample_task())


@partial(jax.jit, static_argnames="num_tasks")
def _losses(params: Any, key: jax.Array, num_tasks: int) -> jax.Array:
  """The losses on every wave, `[num_tasks, 33]`."""
  tasks = jax.vmap(metajax.data.sine.sample_task())(jax.random.split(key, num_tasks))
  return jax.vmap(lambda task: adapt(params, task)[1])(tasks)


@jax.jit
def _fitted(params: Any, wave: metajax.Task) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The predictions before and after the adaptation, and the losses on the way."""
  adapted, losses = adapt(params, wave)
  before, after = (MODEL.apply(phi, wave.test.inputs)[:, 0] for phi in (params, adapted))
  return before, after, losses


class Keys(NamedTuple):
  """The random keys of a run."""

  init: jax.Array
  train: jax.Array
  curve: jax.Array
  test: jax.Array
  figure: jax.Array


def keys_of(seed: int) -> Keys:
  return Keys(*jax.random.split(jax.random.key(seed), 5))


def report_on(params: Any, keys: Keys, num_tasks: int) -> dict[str, Any]:
  """The entry of an initialization in result.json: its losses, and its lines in Figure 1."""
  before, after, losses = map(np.asarray, _fitted(params, _sample(keys.figure)))
  return {
    **judge(params, keys.test, num_tasks),
    "largest_prediction_before": round(float(np.abs(before).max()), 6),
    "figure1": {
      "before": before.round(5).tolist(),
      "after": after.round(5).tolist(),
      "losses": [round(float(losses[0]), 6), round(float(losses[-1]), 6)],
    },
  }


def train(name: str, waves: Waves, out: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Trains one of `methods()`, with an outer rate that falls linearly to 0, and judges it."""
  folder = folders.RunFolder(out / name, values_of(waves, Waves))
  folder.begin(_CONDITION)
  complete = folder.result()
  if complete is not None:
    return complete
  method, keys = methods()[name], keys_of(waves.seed)
  rate = optax.linear_schedule(method.outer_rate, 0.0, waves.meta_steps)
  learner = metajax.meta_learner(method.gradient, method.outer(rate), metajax.vmapped(1))
  record = jobs.train(
    folder,
    learner,
    method.sample_task,
    method.make_episode,
    learner.init(jax.jit(MODEL.init)(keys.init)),
    keys.train,
    num_steps=waves.meta_steps,
    report_every=max(1, waves.meta_steps // 10),
    steps_per_call=1_000,
    evaluate=lambda state: {"test": judge(state.params, keys.curve, _CURVE_TASKS)},
    summary=lambda line: (
      f"step {line['step']}: loss {line['test']['loss'][0]:.3f}, after {GRADIENT_STEPS} "
      f"gradient steps {line['test']['loss'][-1]:.3f} +- {line['test']['interval95'][-1]:.3f}"
    ),
    score=lambda line: -line["test"]["loss"][-1],
    mesh=mesh,
    label=name,
  )
  result = report_on(record.state.params, keys, waves.eval_tasks)
  result["train_seconds"] = round(record.seconds, 3)
  folder.finish(result)
  return result


def run(waves: Waves, seeds: int, folder: folders.RunFolder) -> dict[str, Any]:
  """Trains and judges all methods for every seed, and returns the content of result.json."""
  numbers = range(waves.seed, waves.seed + seeds)
  inside = lambda seed: folder.path / f"seed{seed}" if seeds > 1 else folder.path
  trained = iter(
    jobs.side_by_side(
      [
        partial(train, name, replace(waves, seed=seed), inside(seed))
        for seed in numbers
        for name in methods()
      ]
    )
  )
  by_seed = []
  for seed in numbers:
    keys = keys_of(seed)
    start = report_on(jax.jit(MODEL.init)(keys.init), keys, waves.eval_tasks)
    by_seed.append({"random": start} | {name: next(trained) for name in methods()})
  keys = keys_of(waves.seed)
  wave = _sample(keys.figure)
  column = lambda values: np.asarray(values)[:, 0].round(5).tolist()
  result: dict[str, Any] = {
    "methods": {name: _over_seeds([found[name] for found in by_seed]) for name in by_seed[0]},
    "figure1": {
      "x": column(wave.test.inputs),
      "wave": column(wave.test.targets),
      "sampled_x": column(wave.train.inputs),
      "sampled": column(wave.train.targets),
    },
    "meta_steps": waves.meta_steps,
    "tasks": waves.eval_tasks,
    "seeds": seeds,
    "versions": folders.versions(),
  }
  folder.finish(result)
  draw(result, folder.path / "figure1")
  report(result)
  print(f"  the run is in {folder.path}")
  return result


def _over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
  """Combines one method's results over seeds; the lines of Figure 1 are the first seed's."""
  if len(found) == 1:
    return found[0]
  column = lambda name: np.array([one[name] for one in found])
  over = {
    "loss": column("loss").mean(axis=0).round(6).tolist(),
    "interval95": column("interval95").mean(axis=0).round(6).tolist(),
    "deviation_between_seeds": column("loss").std(axis=0, ddof=1).round(6).tolist(),
    "largest_prediction_before": float(column("largest_prediction_before").max()),
    "seeds": len(found),
  }
  if "train_seconds" in found[0]:  # the random initialization has none
    over["train_seconds"] = round(float(column("train_seconds").mean()), 3)
  return found[0] | over


def report(result: dict[str, Any]) -> None:
  """Prints the table of losses."""
  shown = (0, 1, 5, 10, GRADIENT_STEPS)
  found = result["methods"]
  seeds = found["random"].get("seeds", 1)
  print(
    f"mean squared error after n gradient steps, {result['tasks']} waves, 95 % intervals over "
    "waves" + (f", (deviation between {seeds} seeds)" if seeds > 1 else "")
  )
  width = 27 if seeds > 1 else 18
  print("  n        " + "".join(f"{n:>{width}d}" for n in shown))
  for name, row in found.items():
    cells = [f"{row['loss'][n]:.3f} +- {row['interval95'][n]:.3f}" for n in shown]
    if seeds > 1:
      between = row["deviation_between_seeds"]
      cells = [f"{cell} ({between[n]:.3f})" for cell, n in zip(cells, shown, strict=True)]
    print(f"  {name:9s}" + "".join(f"{cell:>{width}s}" for cell in cells))
  largest = found["joint"]["largest_prediction_before"]
  print(f"  the largest prediction of joint training, before it adapts, is {largest:.3f}")


def draw(result: dict[str, Any], path: Path) -> None:
  """Draws Figure 1: one wave, fitted from a random initialization, MAML's and Reptile's."""
  shared = result["figure1"]
  titles = {"random": "random initialization", "maml": "MAML", "reptile": "Reptile"}
  with plots.drawing(path, figsize=(11, 3.8)) as figure:
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
      lines = result["methods"][name]["figure1"]
      before, after = lines["losses"]
      axes.plot(shared["x"], shared["wave"], color="tab:green", label="true wave")
      axes.plot(shared["x"], lines["before"], ":", label="before")
      label = f"after {GRADIENT_STEPS} steps"
      axes.plot(shared["x"], lines["after"], "--", color="tab:red", label=label)
      points = shared["sampled_x"], shared["sampled"]
      axes.plot(*points, "k^", markersize=5, label="sampled points")
      axes.set_title(f"{title}: loss {before:.2f} to {after:.3f}")
      axes.set_xlabel("x")
      axes.grid(alpha=0.3)
    panels[0].set_ylabel("f(x)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def program(options: cli.Run, waves: Waves) -> Callable[[], Any]:
  """Checks the flags, and returns the function that runs the experiment."""
  out = Path(options.out or "")
  if options.plot_only:
    return partial(draw, folders.finished(out, "figure1"), out / "figure1")
  folder = folders.RunFolder(out, values_of(waves, Waves))
  folder.check_seeds(options.seeds)
  folder.begin(_CONDITION)
  return folders.locked(out, partial(run, waves, options.seeds, folder))


if __name__ == "__main__":
  cli.main(program, Waves())
