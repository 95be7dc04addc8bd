"""The binaries that draw the paper's figures, and what they leave behind."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

import metajax
from experiments import cli, combinations, expansions, family, folders, jobs, overlap, runs, sine
from experiments.combinations import Curves
from experiments.overlap import Panels
from experiments.recipes import FAMILY


def execute(module, *groups, **options):
  """What the binary does."""
  return module.program(cli.Run(**options), *groups)()


TINY = {
  "dataset": "glyphs", "ways": 3, "filters": 2, "inner_batch": 3, "meta_steps": 2,
  "eval_shots": (1,), "eval_batch": (3,), "eval_steps": 2, "eval_tasks": 4, "eval_every": 1,
  "curve_tasks": 2,
}  # fmt: skip


def test_combinations_draw_figure_3(tmp_path, glyphs, one_device):
  recipe = replace(combinations.FIGURE, **TINY, seed=7)
  out, curves = str(tmp_path), Curves(curves=("g1", "last2"))
  result = execute(combinations, curves, recipe, out=out, seeds=2)
  assert list(result["curves"]) == ["g1", "last2"]
  for name in result["curves"]:
    assert [len(log) for log in folders.logs_of_seeds(tmp_path / name)] == [3, 3]
  weights = (tmp_path / "last2" / "seed7" / "flags.txt").read_text()
  assert "--weights=0.0,1.0" in weights and "--train_shots=2" in weights
  for suffix in ("png", "svg"):
    (tmp_path / f"figure3.{suffix}").unlink()
  drawn = combinations.program(cli.Run(out=out, plot_only=True), Curves(), combinations.FIGURE)
  assert {name: len(logs) for name, logs in drawn.args[0].items()} == {"g1": 2, "last2": 2}
  drawn()  # all that is there, though neither seeds nor curves are given again
  with pytest.raises(ValueError, match="then --ways=3; now --ways=4"):
    execute(combinations, curves, replace(recipe, ways=4), out=out)
  with pytest.raises(ValueError, match="then --eval_tasks=4; now --eval_tasks=5"):
    execute(combinations, curves, replace(recipe, eval_tasks=5), out=out, seeds=2)
  assert (tmp_path / "figure3.png").exists() and (tmp_path / "figure3.svg").exists()


@pytest.mark.parametrize(
  ("module", "settings"),
  [
    (overlap, (Panels(), overlap.FIGURE)),
    (family, (family.Family(),)),
    (expansions, (expansions.Measurement(),)),
    (sine, (sine.Waves(),)),
  ],
)
def test_the_result_of_another_experiment_is_not_drawn(module, settings, tmp_path):
  (tmp_path / "result.json").write_text(json.dumps({"cells": {}, "versions": {}}))
  with pytest.raises(ValueError, match="holds a run of another experiment: give the --out"):
    execute(module, *settings, out=str(tmp_path), plot_only=True)


def test_the_family_is_compared(tmp_path, glyphs, one_device, monkeypatch):
  tiny = {**TINY, "train_shots": 3, "tail_shots": 1}
  for name, recipe in FAMILY.items():
    monkeypatch.setitem(FAMILY, name, replace(recipe, **{**tiny, "meta_steps": 1}))
  monkeypatch.setattr(family, "_TIMED", 1)
  monkeypatch.setattr(family, "_CALLS", 1)
  methods = ("meta_sgd", "prototypical")
  chosen = family.Family(methods=methods, meta_steps=2, wave_steps=2, eval_tasks=4, seed=3)
  result = execute(family, chosen, out=str(tmp_path))
  assert tuple(result["methods"]) == methods
  for name, row in result["methods"].items():
    assert set(row["cells"]) == {"1-shot transductive", "1-shot inductive"}
    assert ("waves" in row) == ("waves" in row["step_ms"]) == (name != "prototypical")
    assert all(pace > 0 for pace in row["step_ms"].values())
    assert f"--algorithm={name}" in (tmp_path / name / "seed3" / "flags.txt").read_text()
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed*/result.json")}
  again = execute(family, replace(chosen, methods=("meta_sgd",)), out=str(tmp_path))
  assert again["methods"] == result["methods"]
  assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed*/result.json")}
  (tmp_path / "family.png").unlink()
  execute(family, family.Family(), out=str(tmp_path), plot_only=True)
  assert (tmp_path / "family.png").exists() and (tmp_path / "family.svg").exists()


def test_the_pace_is_the_mean_of_early_and_late_meta_steps(monkeypatch):
  """By a clock that goes 10 ms in an early meta-step and 30 ms in a late one, or more."""
  clock, calls = [0.0], []

  def program(state, key):
    calls.append(int(state.step))
    clock[0] += family._TIMED * (0.01 if state.step == 0 else 0.03) + 0.001 * (len(calls) == 1)
    return state

  monkeypatch.setattr(metajax.programs, "compiled", lambda *arguments: program)
  monkeypatch.setattr(family, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
  model, *rest = family.wave_learner("annealed", 10)
  mesh = metajax.task_mesh(jax.devices()[:1])
  assert family.pace(*rest, model.init(jax.random.key(0)), mesh) == pytest.approx(20.0)
  assert set(calls) == {0, 2**30} and len(calls) == 2 * family._CALLS


def test_all_methods_of_the_family_take_the_gradients_of_as_many_losses():
  for name, recipe in FAMILY.items():
    each = 1 if name in ("joint", "prototypical") else recipe.inner_steps
    assert recipe.meta_batch * each == 16, name
  assert set(FAMILY) == set(family.TITLES)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "prototypical"])
def test_every_method_composes_on_waves(name):
  model, learner, sample_task, make_episode = family.wave_learner(name, 10)
  state = learner.init(model.init(jax.random.key(0)))
  many_steps = metajax.run(learner, sample_task, make_episode, 1)
  after, info = jax.eval_shape(many_steps, state, jax.random.key(1))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  tasks_and_losses = learner.execution.num_tasks * info.losses.shape[1]
  assert tasks_and_losses == 24


def check_plain_sgd(recipe):
  """The settings that Figures 3 and 4 share, by hand: plain SGD on sums, a task in each step."""
  assert (recipe.dataset, recipe.ways, recipe.meta_batch) == ("omniglot", 5, 1)
  assert (recipe.algorithm, recipe.network, recipe.adapt_norm) == ("combine", "paper", True)
  assert (recipe.inner_optimizer, recipe.inner_rate, recipe.loss_reduction) == ("sgd", 0.003, "sum")
  assert (recipe.outer_optimizer, recipe.outer_schedule) == ("sgd", "linear")
  assert (recipe.outer_rate_final, recipe.outer_clip, recipe.meta_steps) == (0.0, None, 40_000)
  assert (recipe.eval_shots, recipe.eval_batch, recipe.eval_steps) == ((5,), (25,), 5)


def test_the_ten_curves_of_figure_3():
  recipes = combinations.recipes(combinations.FIGURE, Curves())
  assert {name: recipe.weights for name, recipe in recipes.items()} == {
    "g1": (1,),
    "mean2": (1 / 2, 1 / 2), "sum2": (1, 1), "last2": (0, 1),
    "mean3": (1 / 3,) * 3, "sum3": (1,) * 3, "last3": (0, 0, 1),
    "mean4": (1 / 4,) * 4, "sum4": (1,) * 4, "last4": (0, 0, 0, 1),
  }  # fmt: skip
  for one in recipes.values():
    assert one.train_shots * one.ways == one.inner_steps * one.inner_batch  # no overlap
    check_plain_sgd(one)
    assert (one.inner_batch, one.outer_rate, one.minibatches) == (25, 0.25, "cycling")


def test_overlap_draws_figure_4(tmp_path, glyphs, monkeypatch):
  """From results made up: that a run is trained as its settings say is shown above."""

  def made_up(many, *, diverging_guesses):
    assert diverging_guesses
    asked.extend(job.label for job in many)
    cell = lambda one: {"accuracy": 1 / one.inner_steps, "interval95": 0.01, "tasks": 4}
    return {job.out: {"cells": {"1-shot transductive": cell(job.recipe)}} for job in many}

  asked = []
  monkeypatch.setattr(runs, "run_all", made_up)
  recipe = replace(overlap.FIGURE, dataset="glyphs", ways=3, train_shots=10, eval_shots=(1,))
  a_and_c, out = Panels(panels=("a", "c")), str(tmp_path)
  monkeypatch.setitem(overlap.PANELS, "a", ("inner_steps", (2, 4)))
  monkeypatch.setitem(overlap.PANELS, "b", ("inner_batch", (10, 30)))
  result = execute(overlap, a_and_c, recipe, out=out)
  assert len(result["points"]) == 2 * 4 + 4 and len(asked) == len(set(asked)) == 2 * 4 + 4
  accuracies = {p["x"]: p["cells"]["1-shot transductive"]["accuracy"] for p in result["points"]}
  assert (accuracies[2], accuracies[4]) == (1 / 2, 1 / 4)
  asked.clear()
  execute(overlap, Panels(panels=("b",)), recipe, out=out)
  both = json.loads((tmp_path / "result.json").read_text())["points"]
  assert [point["panel"] for point in both] == ["a"] * 8 + ["b"] * 8 + ["c"] * 4  # added to
  (tmp_path / "figure4.png").unlink()
  execute(overlap, a_and_c, recipe, out=out, plot_only=True)
  assert (tmp_path / "figure4.png").exists() and (tmp_path / "figure4.svg").exists()


# (a shared or separate tail, cycling or replacement) of every curve, from the paper's legend
FIGURE_4 = {
  "Reptile (cycling)": ("shared", "cycling"),
  "FOMAML (separate tail, cycling)": ("separate", "cycling"),
  "FOMAML (shared tail, replacement)": ("shared", "replacement"),
  "FOMAML (shared tail, cycling)": ("shared", "cycling"),
}


def test_the_points_of_figure_4():
  found = overlap.points(overlap.FIGURE, Panels(), 1, Path("nowhere"))
  assert len({(point.panel, point.curve) for point in found}) == 4 + 4 + 1
  # (a) and (b) share four runs, (b) and (c) one
  assert len({out for point in found for _, _, out in point.runs}) == len(found) - 5
  for panel, curve, x, ((_, one, _),) in found:
    last = (0,) * (one.inner_steps - 1) + (1,)
    assert one.weights == ((1,) * one.inner_steps if curve.startswith("Reptile") else last)
    assert (one.tail, one.minibatches) == FIGURE_4[curve]
    check_plain_sgd(one)
    assert one.ways * one.train_shots == 100
    assert one.ways * one.held_back == (25 if one.tail == "separate" else 0)
    varied = {"a": (x, 25, 0.25), "b": (4, x, 0.25), "c": (4, 100, x)}[panel]
    assert (one.inner_steps, one.inner_batch, one.outer_rate) == varied
  assert {curve for panel, curve, *_ in found if panel == "c"} == {"FOMAML (shared tail, cycling)"}
  assert max(x for panel, _, x, _ in found if panel == "c") == 32


def test_expansions_leave_their_tables_and_figures(tmp_path, monkeypatch):
  monkeypatch.setattr(expansions, "KS", (3,))
  monkeypatch.setattr(expansions, "SHOWN_K", 3)
  monkeypatch.setattr(expansions, "ALPHAS", expansions.ALPHAS[::2])
  small = expansions.Measurement(waves=2, points=3, meta_steps=150)
  result = execute(expansions, small, out=str(tmp_path))
  for row in result["coefficients"]:
    for term in ("avg_grad", "avg_grad_inner_over_alpha"):
      assert row[term]["measured"] == pytest.approx(row[term]["predicted"], rel=0.02)
  assert all(1.9 < slope < 2.1 for slope in result["slopes"].values())
  assert result["order_holds_to_alpha"] > 1e-3
  found = result["manifolds"]
  least = found["least_half_mean_squared_distance"]
  assert least < found["half_mean_squared_distance"][-1] < 1.1 * least
  assert found["largest_difference_of_gradients"] < 1e-12
  names = {path.name for path in tmp_path.iterdir()}
  pictures = {f"{name}.{suffix}" for name in ("expansions", "figure2") for suffix in ("png", "svg")}
  assert names == {"flags.txt", "result.json"} | pictures


def test_expansions_stop_when_asked(tmp_path, monkeypatch):
  monkeypatch.setattr(jobs, "stopping", lambda: True)
  with pytest.raises(jobs.StoppedError, match="the same command starts over"):
    execute(expansions, expansions.Measurement(waves=2, points=3), out=str(tmp_path))
  assert not (tmp_path / "result.json").exists()


def test_sine_leaves_its_table_and_figure(tmp_path, one_device, monkeypatch):
  monkeypatch.setattr(sine, "_CURVE_TASKS", 4)
  few = sine.Waves(meta_steps=3, eval_tasks=4)
  result = execute(sine, few, out=str(tmp_path))
  trained = {"reptile", "fomaml", "maml", "joint"}
  figures = {"figure1.png", "figure1.svg"}
  assert {path.name for path in tmp_path.iterdir()} == trained | figures | {
    "flags.txt",
    "result.json",
  }
  assert set(result["methods"]) == trained | {"random"}
  for found in result["methods"].values():
    assert len(found["loss"]) == len(found["interval95"]) == sine.GRADIENT_STEPS + 1
    assert np.all(np.isfinite(found["loss"]))
  assert [record["step"] for record in folders.logged(tmp_path / "maml")] == [0, 1, 2, 3]
  (tmp_path / "figure1.svg").unlink()
  execute(sine, few, out=str(tmp_path), plot_only=True)
  assert (tmp_path / "figure1.svg").exists()


def test_sine_has_the_settings_of_the_authors_script():
  """One pass over the 50 points in minibatches of 10, and an outer rate that begins at 0.1."""
  reptile = sine.methods()["reptile"]
  assert (reptile.outer_rate, reptile.outer, sine.Waves().eval_tasks) == (0.1, optax.sgd, 1_000)
  task = reptile.sample_task(jax.random.key(0))
  episode = reptile.make_episode(jax.random.key(1), task)
  assert episode.schedule.shape == (4, 10) and episode.tail.inputs.shape == (10, 1)
  earlier = task.train.inputs[episode.schedule].reshape(-1)
  seen = np.sort(np.append(earlier, episode.tail.inputs))
  np.testing.assert_allclose(seen, np.linspace(-5, 5, 50), atol=1e-5)


def test_sine_adapts_by_gradient_steps_on_the_samples():
  task = metajax.data.sine.sample_task()(jax.random.key(0))
  params = sine.MODEL.init(jax.random.key(1))
  adapted, losses = jax.jit(sine.adapt)(params, task)
  step = jax.jit(
    lambda phi: jax.tree.map(lambda p, g: p - 0.02 * g, phi, jax.grad(sine.LOSS)(phi, task.train))
  )
  for n in range(sine.GRADIENT_STEPS + 1):
    np.testing.assert_allclose(losses[n], sine.LOSS(params, task.test), rtol=1e-3)
    if n < sine.GRADIENT_STEPS:
      params = step(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), adapted, params)
