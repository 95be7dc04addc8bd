"""Sine waves (Section 4, Figure 1): learn to regress a wave from ten of its points.

  python -m experiments.sine

Meta-trains by Reptile, first-order MAML, MAML and joint training, one wave an iteration, and judges
each, and a random initialization, on the same new waves: the mean squared error on 50 equally
spaced points after 0 to 32 gradient steps on the ten. The run folder (--out) gets flags.txt,
result.json, figure1.png and figure1.svg.
"""

import json
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from absl import app
from tqdm import tqdm

import metajax
from experiments import common

GRADIENT_STEPS = 32
_INNER_RATE = 0.02  # of the authors' script, as the 10 points of a minibatch and the outer step 0.1
_POINTS, _GRID = 10, 50
_DEFAULTS = {"meta_steps": 30_000, "eval_tasks": 1_000}

MODEL = metajax.models.sine()
LOSS = metajax.losses.squared_error(MODEL.apply, reduction="mean")
INNER = optax.sgd(_INNER_RATE)


class Method(NamedTuple):
  """How one initialization is trained."""

  gradient: metajax.MetaGradient
  outer_rate: float
  outer: Any  # optax.sgd or optax.adam
  sample_task: Any
  make_episode: Any


def methods() -> dict[str, Method]:
  """The paper's Reptile (minibatches of the whole grid) and, with Adam outside, MAML and FOMAML.

  The latter adapt by 5 steps on 10 random points; their last loss is that on the grid.
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


def train(method: Method, params: Any, key: jax.Array, meta_steps: int, label: str) -> Any:
  """The initialization that a method finds, its outer step falling linearly to 0."""
  rate = optax.linear_schedule(method.outer_rate, 0.0, meta_steps)
  learner = metajax.meta_learner(metajax.batched(method.gradient, 1), method.outer(rate))
  sample = metajax.sample_episodes(method.sample_task, method.make_episode, 1)
  state, done = learner.init(params), 0
  programs: dict[int, Any] = {}
  with tqdm(total=meta_steps, unit="step", desc=f"{label:8s}") as bar:
    while done < meta_steps:
      steps = min(1_000, meta_steps - done)
      if steps not in programs:
        programs[steps] = jax.jit(metajax.run(learner, sample, steps))
      state, _ = jax.block_until_ready(programs[steps](state, key))
      done += steps
      bar.update(steps)
  return state.params


def adapt(params: Any, task: metajax.Task) -> tuple[Any, jax.Array]:
  """The parameters after 32 steps on the task's points, and the loss on its grid, `[33]`."""

  def body(
    learner: metajax.LearnerState, _: None
  ) -> tuple[metajax.LearnerState, tuple[Any, jax.Array]]:
    test_loss = LOSS(learner.params, task.test)
    after = metajax.inner_step(LOSS, INNER, learner, task.train)[0]
    return after, (learner.params, test_loss)

  start = metajax.LearnerState(params, INNER.init(params))
  _, (path, losses) = jax.lax.scan(body, start, length=GRADIENT_STEPS + 1)
  return jax.tree.map(lambda leaf: leaf[-1], path), losses


def judge(params: Any, key: jax.Array, num_tasks: int) -> dict[str, Any]:
  """Mean loss with its 95 % interval after each number of steps, over new waves."""
  sample = metajax.data.sine.sample_task()
  losses = jax.jit(jax.vmap(lambda key: adapt(params, sample(key))[1]))(
    jax.random.split(key, num_tasks)
  )
  summary = [metajax.mean_and_interval(column) for column in np.asarray(losses).T]
  grid = metajax.data.sine.grid_points(_GRID)(key)
  return {
    "loss": [round(cell.mean, 6) for cell in summary],
    "interval95": [round(cell.interval, 6) for cell in summary],
    "largest_prediction_before": round(float(jnp.abs(MODEL.apply(params, grid)).max()), 6),
  }


def draw(found: dict[str, Any], key: jax.Array, path: Any) -> None:
  """Figure 1: one wave, fitted from a random initialization, MAML's and Reptile's."""
  task = metajax.data.sine.sample_task()(key)
  x = task.test.inputs[:, 0]
  figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
  titles = {"random": "random initialization", "maml": "MAML", "reptile": "Reptile"}
  for axes, (name, title) in zip(panels, titles.items(), strict=True):
    adapted, losses = jax.jit(adapt)(found[name], task)
    axes.plot(x, task.test.targets[:, 0], color="tab:green", label="true wave")
    axes.plot(x, MODEL.apply(found[name], task.test.inputs)[:, 0], ":", label="before")
    after = MODEL.apply(adapted, task.test.inputs)[:, 0]
    axes.plot(x, after, "--", color="tab:red", label=f"after {GRADIENT_STEPS} steps")
    axes.plot(task.train.inputs, task.train.targets, "k^", markersize=5, label="sampled points")
    axes.set_title(f"{title}: loss {losses[0]:.2f} to {losses[-1]:.3f}")
    axes.set_xlabel("x")
    axes.grid(alpha=0.3)
  panels[0].set_ylabel("f(x)")
  figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
  for suffix in ("png", "svg"):
    figure.savefig(f"{path}.{suffix}", dpi=150)
  plt.close(figure)


def run(settings: SimpleNamespace, folder: common.RunFolder) -> dict[str, Any]:
  """Trains and judges all methods; returns what it writes to result.json."""
  key = jax.random.key(settings.seed)
  init_key, train_key, test_key, figure_key = jax.random.split(key, 4)
  start = jax.jit(MODEL.init)(init_key)
  found = {"random": start}
  seconds = {}
  for name, method in methods().items():
    began = time.perf_counter()
    found[name] = train(method, start, train_key, settings.meta_steps, name)
    seconds[name] = round(time.perf_counter() - began, 3)
  result: dict[str, Any] = {
    name: judge(params, test_key, settings.eval_tasks) for name, params in found.items()
  }
  shown = (0, 1, 5, 10, GRADIENT_STEPS)
  print(f"mean squared error after n gradient steps, {settings.eval_tasks} waves, 95 % intervals")
  print("  n        " + "".join(f"{n:>18d}" for n in shown))
  for name, row in result.items():
    cells = [f"{row['loss'][n]:.3f} +- {row['interval95'][n]:.3f}" for n in shown]
    print(f"  {name:9s}" + "".join(f"{cell:>18s}" for cell in cells))
  largest = result["joint"]["largest_prediction_before"]
  print(f"  joint training predicts 0: its largest prediction is {largest:.3f}")
  result |= {
    "meta_steps": settings.meta_steps,
    "tasks": settings.eval_tasks,
    "train_seconds": seconds,
    "versions": common.versions(),
  }
  common.replace_file(folder.path / "result.json", json.dumps(result, indent=2) + "\n")
  draw(found, figure_key, folder.path / "figure1")
  print(f"  the run is in {folder.path}")
  return result


def prepare(settings: SimpleNamespace) -> tuple[common.RunFolder]:
  """Checks the flags and opens the run folder."""
  common.check_numbers(settings)
  folder = common.open_folder("sine", settings)
  folder.begin("sine waves, drawn from the seed")
  return (folder,)


def main(argv: list[str]) -> None:
  common.main("sine", argv, (), _DEFAULTS, prepare, run)


if __name__ == "__main__":
  app.run(main)
