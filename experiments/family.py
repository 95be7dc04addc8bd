"""Compares the algorithms of the family on the same tasks, by accuracy and by seconds.

  python -m experiments.family --data_dir=DIR --out=DIR

Trains each of them on 5-way 1-shot Omniglot (`few_shot --recipe=family_NAME`) and, but for
prototypical networks, on sine waves. A meta-step takes the same number of gradients of losses for
all of them. They differ in how they compute these, and so in the seconds that a meta-step takes.
Runs are independent: each has its own device, and several run at once. The same command resumes
those on Omniglot that were interrupted. The run folder (--out) gets result.json, family.png and
family.svg, and a folder for each run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metajax
from experiments import algorithms, build, cli, folders, jobs, plots, runs
from experiments.recipes import FAMILY, Cost, Recipe
from experiments.runs import Job
from experiments.settings import option, values_of
from metajax import variants

STEPS = (0, 1, 5, 10)  # gradient steps on a new wave after which it is judged
_POINTS, _TASKS, _LOSSES = 10, 4, 6  # ten points of a wave, T and k
_TIMED, _CALLS = 5, 4  # meta-steps in a call that is timed, and how often it is
_CONTEXT = 5  # inputs of CAVIA's network besides x
WAVE_RATES = {"cavia": 0.3}  # of the inner SGD on waves; of the others 0.02
_STRENGTH = 10.0  # lambda of implicit MAML on waves
_NO_WAVES = ("prototypical",)  # which is for classification
TITLES = {
  "reptile": "Reptile",
  "fomaml": "FOMAML",
  "maml": "MAML",
  "annealed": "FOMAML, then MAML",
  "multi_step": "multi-step loss, then MAML",
  "meta_sgd": "Meta-SGD",
  "layer_rates": "learned rates per layer",
  "anil": "ANIL",
  "boil": "BOIL",
  "cavia": "CAVIA",
  "imaml": "implicit MAML",
  "prototypical": "prototypical networks",
  "joint": "joint training",
  "scratch": "no meta-training",
}


@dataclass(frozen=True, kw_only=True)
class Family(Cost):
  """Which algorithms are compared, and for how long they are trained."""

  methods: tuple[str, ...] = option(tuple(FAMILY), f"Any of {', '.join(FAMILY)}.", among=FAMILY)
  meta_steps: int = option(5_000, "The number of meta-steps on Omniglot.", at_least=1)
  wave_steps: int = option(30_000, "The number of meta-steps on sine waves.", at_least=1)
  eval_tasks: int = option(1_000, "Test tasks and waves of the final result.", at_least=2)
  seed: int = option(0, "Determines everything random.", at_least=0)


def runs_of(family: Family, seeds: int, out: Path) -> dict[str, list[Job]]:
  """The runs of every method on Omniglot, one for each seed."""
  of_all = {"eval_tasks": family.eval_tasks, "seed": family.seed, **values_of(family, Cost)}
  recipes = {
    name: replace(FAMILY[name], **of_all, meta_steps=1 if name == "scratch" else family.meta_steps)
    for name in family.methods
  }
  return {
    name: runs.of_each_seed(name, recipe, out / name, seeds) for name, recipe in recipes.items()
  }


def on_waves(name: str, family: Family, seed: int, out: Path, mesh: jax.sharding.Mesh) -> Any:
  """Trains a method on sine waves and judges it: the loss after each of `STEPS`."""
  kept = {"wave_steps": family.wave_steps, "eval_tasks": family.eval_tasks, "seed": seed}
  folder = folders.RunFolder(out, kept)
  folder.begin("sine waves, drawn from the seed")
  complete = folder.result()
  if complete is not None:
    return complete
  init_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
  model, learner, sample_task, make_episode = wave_learner(name, family.wave_steps)
  state = learner.init(jax.jit(model.init)(init_key))
  if name != "scratch":
    state = metajax.train(
      learner,
      sample_task,
      make_episode,
      state,
      train_key,
      num_steps=family.wave_steps,
      steps_per_call=min(500, family.wave_steps),
      mesh=mesh,
      should_stop=jobs.stopping,
      progress=partial(jobs.progress, mesh=mesh, desc=f"{name}, waves"),
    ).state

  def losses(state: metajax.MetaState, key: jax.Array) -> jax.Array:
    wave = metajax.data.sine.sample_task()(key)
    rows = lambda steps: jnp.tile(jnp.arange(_POINTS, dtype=jnp.int32), (steps, 1))
    error = metajax.losses.squared_error(model.apply, reduction="mean")
    adapted = [learner.adapt(state, wave.train, rows(steps)) for steps in STEPS]
    return jnp.stack([error(params, wave.test) for params in adapted])

  keys = jax.random.split(test_key, family.eval_tasks)
  result = plots.mean_losses(jax.jit(jax.vmap(losses, in_axes=(None, 0)))(state, keys))
  folder.finish(result)
  return result


def wave_learner(
  name: str, meta_steps: int
) -> tuple[metajax.Model, metajax.MetaLearner, Any, Callable[..., Any]]:
  """The network, the learner, and how tasks and episodes are drawn, for a method on sine waves.

  A meta-step draws 24 minibatches for all methods. The outer rate falls to 0.
  """
  plain = metajax.models.sine()
  rate = WAVE_RATES.get(name, 0.02)
  inner = algorithms.moving(optax.sgd(rate), algorithms.not_adapted(name, plain))
  adapting = _with_context() if name == "cavia" else plain  # what the loss is a function of
  loss = metajax.losses.squared_error(adapting.apply, reduction="mean")
  model = algorithms.with_rates(name, adapting, rate)
  gradient, early = algorithms.gradients(
    name, loss, inner, _LOSSES, strength=_STRENGTH, context=jnp.zeros(_CONTEXT)
  )
  as_reptile = name in ("reptile", "joint", "scratch")
  make_outer, start = (optax.sgd, 1.0) if as_reptile else (optax.adam, 1e-3)
  outer = make_outer(optax.linear_schedule(start, 0.0, meta_steps))
  joint = name == "joint"
  execution = metajax.vmapped(_TASKS * _LOSSES if joint else _TASKS)
  learner = metajax.meta_learner(gradient, outer, execution)
  if early is not None:
    learner = variants.switched(
      metajax.meta_learner(early, outer, execution), learner, meta_steps // 2
    )
  schedule = metajax.cycling(1 if joint else _LOSSES, _POINTS)
  sine = metajax.data.sine
  if as_reptile:
    return model, learner, sine.sample_task(sine.grid_points(50)), metajax.shared_tail(schedule)
  return model, learner, sine.sample_task(), metajax.separate_tail(schedule)


def _with_context() -> metajax.Model:
  """The network for sine waves with a context as further inputs, as in Zintgraf et al. (2019)."""
  network = metajax.models.mlp(1 + _CONTEXT, 1, activation="tanh")

  def apply(params: variants.WithContext, x: jax.Array) -> jax.Array:
    context = jnp.broadcast_to(params.context, (x.shape[0], _CONTEXT))
    return network.apply(params.params, jnp.concatenate([x, context], axis=1))

  return metajax.Model(network.init, apply)


def pace(
  learner: metajax.MetaLearner,
  sample_task: Any,
  make_episode: Any,
  params: Any,
  mesh: jax.sharding.Mesh,
) -> float:
  """Milliseconds of a meta-step when nothing else runs; the mean of the first and of late ones."""
  steps = metajax.run(learner, sample_task, make_episode, _TIMED)
  state, key = metajax.programs.on_mesh((learner.init(params), jax.random.key(0)), mesh)
  program = metajax.programs.compiled(steps, mesh, state, key)
  both = []
  for step in (0, 2**30):  # a learner that is switched is another one by then
    there, took = state._replace(step=jnp.full_like(state.step, step)), []
    for _ in range(_CALLS):
      start = time.perf_counter()
      jax.block_until_ready(program(there, key))
      took.append(time.perf_counter() - start)
    both.append(min(took) / _TIMED)
  return round(1e3 * sum(both) / 2, 3)


def paces(name: str, recipe: Recipe) -> dict[str, float]:
  """The pace of a method on Omniglot and on waves, on one device."""
  mesh, key = metajax.task_mesh(jax.devices()[:1]), jax.random.key(0)
  splits = metajax.programs.on_mesh(build.load(recipe), mesh)
  one = build.build(recipe, splits, mesh)
  params = one.model.init(key)
  found = {"omniglot": pace(one.learner, one.sample_task, one.make_episode, params, mesh)}
  if name not in _NO_WAVES:
    model, learner, sample_task, make_episode = wave_learner(name, 1_000)
    found["waves"] = pace(learner, sample_task, make_episode, model.init(key), mesh)
  return found


def run(
  family: Family, by_method: dict[str, list[Job]], folder: folders.RunFolder, seeds: int
) -> folders.Line:
  """Trains what is not complete, and returns the content of result.json."""
  on_both = [(name, seed) for name in by_method for seed in range(seeds) if name not in _NO_WAVES]
  waves = jobs.side_by_side(
    [
      partial(on_waves, name, family, family.seed + seed, folder.path / "sine" / name / f"{seed}")
      for name, seed in on_both
    ]
  )
  many = [one for of_seeds in by_method.values() for one in of_seeds]
  slowest = ("multi_step", "meta_sgd", "layer_rates", "cavia", "maml", "boil", "imaml")
  many.sort(key=lambda job: job.recipe.algorithm not in slowest)  # so that none ends alone
  results = runs.run_all(many)
  methods = folder.earlier("methods", seeds) or {}
  for name, of_seeds in by_method.items():
    methods[name] = {
      "cells": plots.cells_over_seeds([results[job.out] for job in of_seeds]),
      # One by one, after all training.
      "step_ms": methods.get(name, {}).get("step_ms") or paces(name, of_seeds[0].recipe),
    }
    of_waves = [one for (method, _), one in zip(on_both, waves, strict=True) if method == name]
    if of_waves:
      methods[name]["waves"] = {
        key: np.mean([one[key] for one in of_waves], axis=0).round(6).tolist()
        for key in ("loss", "interval95")
      }
  result: folders.Line = {
    "methods": {name: methods[name] for name in FAMILY if name in methods},
    "meta_steps": family.meta_steps,
    "wave_steps": family.wave_steps,
    "steps": list(STEPS),
    "tasks": family.eval_tasks,
    "seeds": seeds,
    "versions": folders.versions(),
  }
  folder.finish(result)
  draw(result, folder.path / "family")
  report(result)
  print(f"  the runs are in {folder.path}")
  return result


def report(result: folders.Line) -> None:
  """Prints the table."""
  print(
    f"accuracy over {result['tasks']} tasks of 5-way 1-shot Omniglot after {result['meta_steps']} "
    f"meta-steps; squared error on {result['tasks']} sine waves after "
    f"{', '.join(map(str, result['steps']))} gradient steps, after {result['wave_steps']} "
    "meta-steps"
  )
  for name, row in result["methods"].items():
    cells = ", ".join(f"{cell} {plots.percent(value)}" for cell, value in row["cells"].items())
    print(f"  {TITLES[name]}: {cells}; {row['step_ms']['omniglot']:.0f} ms a meta-step")
    if "waves" in row:
      losses = zip(row["waves"]["loss"], row["waves"]["interval95"], strict=True)
      shown = ", ".join(f"{loss:.3f} +- {interval:.3f}" for loss, interval in losses)
      print(f"    waves: {shown}; {row['step_ms']['waves']:.2f} ms a meta-step")


def draw(result: folders.Line, path: Path) -> None:
  """Draws accuracy and loss, with their intervals, against training seconds."""
  cell = "1-shot transductive"
  shown = {name: row for name, row in result["methods"].items() if name != "scratch"}
  with plots.drawing(path, figsize=(12.0, 5.0)) as figure:
    omniglot, waves = figure.subplots(1, 2)
    for number, (name, row) in enumerate(shown.items()):
      style = {"fmt": "osD^v<>"[number % 7], "color": f"C{number % 10}", "capsize": 3}
      found = row["cells"][cell]
      interval = plots.interval_of(found)
      at = row["step_ms"]["omniglot"] * result["meta_steps"] / 1e3, 100 * found["accuracy"]
      omniglot.errorbar(*at, yerr=100 * interval, label=TITLES[name], **style)
      if "waves" in row:
        one = row["waves"]
        last = len(one["loss"]) - 1
        at = row["step_ms"]["waves"] * result["wave_steps"] / 1e3, one["loss"][last]
        waves.errorbar(*at, yerr=one["interval95"][last], **style)
    omniglot.set(
      xlabel="training time on one core (s)",
      ylabel="accuracy on test tasks (%)",
      title=f"5-way 1-shot Omniglot, transductive, {result['meta_steps']:,} meta-steps",
    )
    waves.set(
      xlabel="training time on one core (s)",
      ylabel=f"squared error after {result['steps'][-1]} gradient steps",
      title=f"sine waves, {result['wave_steps']:,} meta-steps",
      yscale="log",
    )
    for axes in (omniglot, waves):
      axes.set_xlim(0, None)
      axes.grid(alpha=0.3, which="both")
    title = f"bars: 95 % interval\nover {result['tasks']:,} tasks"
    labelled = omniglot.get_legend_handles_labels()
    figure.legend(*labelled, title=title, fontsize=8, title_fontsize=8, loc="outside right center")


def program(options: cli.Run, family: Family) -> Callable[[], Any]:
  """Checks the flags, and returns the function that runs the experiment."""
  out = Path(options.out or "")
  if options.plot_only:
    return partial(draw, folders.finished(out, "wave_steps"), out / "family")
  by_method = runs_of(family, options.seeds, out)
  kept = {"meta_steps": family.meta_steps, "wave_steps": family.wave_steps, "seed": family.seed}
  folder = folders.RunFolder(out, kept | {"eval_tasks": family.eval_tasks})
  folder.check_seeds(options.seeds, all_of_them=set(family.methods) == set(FAMILY))
  runs.check_all([one for of_seeds in by_method.values() for one in of_seeds])
  folder.begin("a run of each method and seed")
  return folders.locked(out, partial(run, family, by_method, folder, options.seeds))


if __name__ == "__main__":
  cli.main(program, Family(), leave_out=("chunk",))  # its tasks run one after another
