"""Measures the expansions of Section 5, and runs Reptile between two curves (Figure 2).

  python -m experiments.expansions

The expansions are measured in float64, on sine waves with a small network:

  - for k = 2 ... 8, the coefficients of AvgGrad and AvgGradInner that fit the expected gradients of
    MAML, FOMAML and Reptile best, and those that Equations 37, 39 and 41 predict;
  - the residual of the prediction against the inner stepsize alpha;
  - the largest alpha up to which the ratios of the coefficients are in the order MAML > FOMAML >
    Reptile.

For Figure 2, Reptile takes alternating steps toward two curves in the plane, and ends near the
point of least mean squared distance to both. The run folder (--out) gets result.json,
expansions.png and .svg, figure2.png and .svg.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import metajax
from experiments import cli, folders, jobs, plots
from experiments.settings import Settings, option, values_of
from metajax import theory

KS = tuple(range(2, 9))
SHOWN_K = 4
SMALL = 1e-5  # the stepsize at which coefficients are fitted
ALPHAS = tuple(float(alpha) for alpha in np.logspace(-4, -0.5, 15))

_MODEL = metajax.models.sine((20, 20, 1))
_LOSS = metajax.losses.squared_error(_MODEL.apply, reduction="mean")
ALGORITHMS: dict[
  str, tuple[Callable, Callable]
] = {  # (alpha -> estimator, (k, alpha) -> predicted coefficients)
  "MAML": (lambda alpha: metajax.maml(_LOSS, optax.sgd(alpha)), theory.maml_coefficients),
  "FOMAML": (lambda alpha: metajax.fomaml(_LOSS, optax.sgd(alpha)), theory.fomaml_coefficients),
  "Reptile": (
    lambda alpha: metajax.reptile(_LOSS, optax.sgd(alpha), stepsize=alpha),
    theory.reptile_coefficients,
  ),
}


@dataclass(frozen=True, kw_only=True)
class Measurement(Settings):
  """The size of the measurement."""

  waves: int = option(20, "Tasks that expectations are over.", at_least=1)
  points: int = option(10, "Samples of a wave in a minibatch.", at_least=1)
  meta_steps: int = option(400, "The number of meta-steps of Figure 2.", at_least=1)
  seed: int = option(0, "Determines everything random.", at_least=0)


def problem(key: jax.Array, tasks: int, batch: int) -> tuple[Any, metajax.Examples]:
  """Returns parameters, and minibatches `[tasks, 8, batch, 1]`, where each task is a wave."""
  init_key, task_key = jax.random.split(key)
  points = max(KS) * batch
  sample = metajax.data.sine.sample_task(metajax.data.sine.uniform_points(points))
  train = jax.vmap(sample)(jax.random.split(task_key, tasks)).train
  double = lambda leaf: jnp.asarray(leaf, jnp.float64)
  cut = lambda leaf: double(leaf).reshape(tasks, max(KS), batch, 1)
  return jax.tree.map(double, _MODEL.init(init_key)), jax.tree.map(cut, train)


def expand(params: Any, minibatches: metajax.Examples) -> dict[str, Any]:
  """Measures coefficients for every k at a small stepsize; residuals and ratios against alpha."""
  coefficients: list[dict[str, Any]] = []
  series: list[dict[str, Any]] = []
  for k in KS:
    _stop_if_asked()
    first = jax.tree.map(lambda leaf, k=k: leaf[:, :k], minibatches)
    found = jax.jit(partial(theory.expansion, _LOSS))(params, first)
    for name, (estimator, predicted) in ALGORITHMS.items():
      # The stepsize is an argument, so that one compiled program serves all stepsizes.
      measure = jax.jit(
        lambda alpha, first, estimator=estimator: theory.expected_gradient(
          estimator(alpha), params, first
        )
      )
      fitted, exact = theory.fit(measure(SMALL, first), found), predicted(k, SMALL)
      coefficients.append(
        {
          "algorithm": name,
          "k": k,
          "avg_grad": {"predicted": exact.avg_grad, "measured": fitted.avg_grad},
          "avg_grad_inner_over_alpha": {
            "predicted": exact.avg_grad_inner / SMALL,
            "measured": fitted.avg_grad_inner / SMALL,
          },
        }
      )
      if k == SHOWN_K:
        for alpha in ALPHAS:
          gradient = measure(alpha, first)
          difference = jax.tree.map(
            jnp.subtract, gradient, theory.predict(found, predicted(k, alpha))
          )
          series.append(
            {
              "algorithm": name,
              "alpha": alpha,
              "residual": _norm(difference) / _norm(gradient),
              "ratio": theory.fit(gradient, found).ratio,
              "predicted_ratio": predicted(k, alpha).ratio,
            }
          )
  return {"coefficients": coefficients, "against_alpha": series}


def _stop_if_asked() -> None:
  if jobs.stopping():
    raise jobs.StoppedError("stopped, and nothing is kept: the same command starts over")


def _norm(tree: Any) -> float:
  return float(jnp.linalg.norm(ravel_pytree(tree)[0]))


def slope(result: dict[str, Any], name: str) -> float:
  """The slope of log residual against log alpha, up to alpha = 1e-3."""
  rows = [r for r in result["against_alpha"] if r["algorithm"] == name and r["alpha"] <= 1e-3]
  return float(
    np.polyfit(np.log([r["alpha"] for r in rows]), np.log([r["residual"] for r in rows]), 1)[0]
  )


def order_holds_to(result: dict[str, Any]) -> float | None:
  """The largest alpha up to which the ratios are in the order MAML > FOMAML > Reptile > 0."""
  last = None
  for alpha in ALPHAS:
    row = {r["algorithm"]: r["ratio"] for r in result["against_alpha"] if r["alpha"] == alpha}
    if not row["MAML"] > row["FOMAML"] > row["Reptile"] > 0:
      break
    last = round(alpha, 6)
  return last


# Section 5.2: the solutions of one task are a line, those of the other a circle, in the plane.
_LINE = np.array([[0.0, 0.0], [np.cos(0.35), np.sin(0.35)]])  # a point, and the direction
_CENTRE, _RADIUS = np.array([0.6, 2.6]), 1.3


def to_line(phi: jax.Array) -> jax.Array:
  """The point of the line that is nearest to phi."""
  origin, direction = _LINE
  return origin + ((phi - origin) @ direction) * direction


def to_circle(phi: jax.Array) -> jax.Array:
  """The point of the circle that is nearest to phi."""
  outwards = phi - _CENTRE
  return _CENTRE + _RADIUS * outwards / jnp.linalg.norm(outwards)


def alternate(steps: int) -> dict[str, Any]:
  """Runs Reptile with inner loops that reach the nearest solution.

  Meta-steps toward the line and toward the circle alternate. Their rate falls linearly to 0.
  """
  distances = [theory.half_squared_distance(project) for project in (to_line, to_circle)]
  mean = jax.jit(lambda phi: sum(distance(phi) for distance in distances) / 2)
  toward = [jax.jit(partial(_displacement, project)) for project in (to_line, to_circle)]
  phi = jnp.array([-2.6, 1.6])
  path, means, apart = [phi.tolist()], [float(mean(phi))], 0.0
  for step in range(steps):
    _stop_if_asked()
    displacement, difference = toward[step % 2](phi)
    apart = max(apart, float(difference))
    phi = phi - 0.3 * (1 - step / steps) * displacement
    path.append(phi.tolist())
    means.append(float(mean(phi)))
  optimum = _optimum(phi)
  return {
    "path": path,
    "half_mean_squared_distance": means,
    "optimum": optimum.tolist(),
    "least_half_mean_squared_distance": float(mean(optimum)),
    "largest_difference_of_gradients": apart,
  }


def _displacement(
  project: Callable[[jax.Array], jax.Array], phi: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """phi minus its projection, and how far the gradients of half the squared distance are from it.

  Differentiating through the projection as well gives the same gradient: the projection moves along
  the solutions, at right angles to the step.
  """
  displacement = phi - project(phi)
  through = lambda phi: 0.5 * jnp.sum(jnp.square(phi - project(phi)))
  gradients = [jax.grad(half)(phi) for half in (theory.half_squared_distance(project), through)]
  return displacement, jnp.abs(jnp.stack(gradients) - displacement).max()


@jax.jit
def _optimum(phi: jax.Array) -> jax.Array:
  """The point of least mean squared distance, by Newton's method.

  Derivatives are taken through the projections.
  """
  square = lambda phi: sum(jnp.sum(jnp.square(phi - p(phi))) for p in (to_line, to_circle))
  newton = lambda _, phi: phi - jnp.linalg.solve(jax.hessian(square)(phi), jax.grad(square)(phi))
  return jax.lax.fori_loop(0, 50, newton, phi)


def draw_expansions(result: dict[str, Any], path: Path) -> None:
  """Draws ratios of coefficients against k, and residuals and ratios against alpha."""
  with plots.drawing(path, figsize=(13, 4.0)) as figure:
    of_k, residual, ratio = figure.subplots(1, 3)
    for number, name in enumerate(ALGORITHMS):
      color = f"C{number}"
      rows = [row for row in result["coefficients"] if row["algorithm"] == name]
      ratios = {
        kind: [row["avg_grad_inner_over_alpha"][kind] / row["avg_grad"][kind] for row in rows]
        for kind in ("predicted", "measured")
      }
      ks = [row["k"] for row in rows]
      of_k.plot(ks, ratios["predicted"], "-", color=color, lw=1)
      of_k.plot(ks, ratios["measured"], "o", color=color, label=name)
      rows = [row for row in result["against_alpha"] if row["algorithm"] == name]
      alphas = [row["alpha"] for row in rows]
      residual.loglog(alphas, [row["residual"] for row in rows], ".-", color=color, label=name)
      ratio.loglog(alphas, [row["predicted_ratio"] for row in rows], "-", color=color, lw=1)
      positive = [row["ratio"] if row["ratio"] > 0 else np.nan for row in rows]
      ratio.loglog(alphas, positive, "o", color=color, ms=4, label=name)
    guide = np.array([ALPHAS[0], 1e-2])
    residual.loglog(
      guide,
      0.1 * result["against_alpha"][0]["residual"] * (guide / guide[0]) ** 2,
      "k:",
      label="slope 2",
    )
    of_k.set(
      xlabel="k",
      ylabel="AvgGradInner / (alpha AvgGrad)",
      title="coefficients: fitted (dots), predicted (lines)",
    )
    residual.set(
      xlabel="inner stepsize alpha",
      ylabel="relative residual",
      title=f"prediction against expected gradient, k = {SHOWN_K}",
    )
    ratio.set(
      xlabel="inner stepsize alpha",
      ylabel="AvgGradInner / AvgGrad",
      title=f"ratio: fitted (dots), predicted (lines), k = {SHOWN_K}",
    )
    for axes in (of_k, residual, ratio):
      axes.grid(alpha=0.3)
      axes.legend(fontsize=8)


def draw_figure2(result: dict[str, Any], path: Path) -> None:
  """Draws Figure 2: the path in the plane, and the mean squared distance along it."""
  found = result["manifolds"]
  with plots.drawing(path, figsize=(9.5, 4.2)) as figure:
    plane, curve = figure.subplots(1, 2)
    along = np.linspace(-3.2, 3.2, 2)[:, None]
    plane.plot(*(_LINE[0] + along * _LINE[1]).T, color="C0", label="solutions of task 1")
    angles = np.linspace(0, 2 * np.pi, 200)
    circle = _CENTRE[:, None] + _RADIUS * np.stack([np.cos(angles), np.sin(angles)])
    plane.plot(*circle, color="C1", label="solutions of task 2")
    plane.plot(*np.array(found["path"]).T, "k.-", ms=3, lw=0.8, label="Reptile")
    plane.plot(*found["optimum"], "r*", ms=12, label="least mean squared distance")
    plane.set(xlabel="first parameter", ylabel="second parameter", aspect="equal")
    figure.legend(
      *plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    least = found["least_half_mean_squared_distance"]
    curve.plot(found["half_mean_squared_distance"], "k-", label="along the path")
    curve.axhline(least, color="r", ls=":", label=f"least, {least:.4f}")
    curve.set(xlabel="meta-steps", ylabel="E[D(phi, W)^2] / 2", yscale="log")
    curve.legend(fontsize=8)
    for axes in (plane, curve):
      axes.grid(alpha=0.3)


def run(settings: Measurement, folder: folders.RunFolder) -> dict[str, Any]:
  """Measures and draws, and returns the content of result.json."""
  with jax.enable_x64(True):
    key = jax.random.key(settings.seed)
    result = expand(*problem(key, settings.waves, settings.points))
    result["manifolds"] = alternate(settings.meta_steps)
  result |= {
    "slopes": {name: round(slope(result, name), 4) for name in ALGORITHMS},
    "order_holds_to_alpha": order_holds_to(result),
    "versions": folders.versions(),
  }
  folder.finish(result)
  draw(result, folder.path)
  report(result)
  print(f"the run is in {folder.path}")
  return result


def draw(result: dict[str, Any], folder: Path) -> None:
  draw_expansions(result, folder / "expansions")
  draw_figure2(result, folder / "figure2")


def report(result: dict[str, Any]) -> None:
  """Prints the results."""
  print("coefficients of AvgGrad and of -alpha AvgGradInner, predicted and measured")
  for row in result["coefficients"]:
    grad, inner = row["avg_grad"], row["avg_grad_inner_over_alpha"]
    print(
      f"  {row['algorithm']:8s} k = {row['k']}: {grad['predicted']:g} {grad['measured']:.5f}, "
      f"{inner['predicted']:g} {inner['measured']:.4f}"
    )
  slopes = ", ".join(f"{name} {value:.3f}" for name, value in result["slopes"].items())
  print(f"slope of log residual against log alpha: {slopes}")
  print(f"MAML > FOMAML > Reptile up to alpha = {result['order_holds_to_alpha']}")
  found = result["manifolds"]
  print(
    f"E[D^2] / 2 falls from {found['half_mean_squared_distance'][0]:.4f} to "
    f"{found['half_mean_squared_distance'][-1]:.6f}; the least is "
    f"{found['least_half_mean_squared_distance']:.6f}; gradient and displacement differ by at most "
    f"{found['largest_difference_of_gradients']:.1e}"
  )


def program(options: cli.Run, settings: Measurement) -> Callable[[], Any]:
  """Checks the flags, and returns the function that runs the experiment."""
  out = Path(options.out or "")
  if options.plot_only:
    return partial(draw, folders.finished(out, "coefficients"), out)
  folder = folders.RunFolder(out, values_of(settings, Measurement))
  folder.begin("sine waves, drawn from the seed")
  return folders.locked(out, partial(run, settings, folder))


if __name__ == "__main__":
  cli.main(program, Measurement(), leave_out=("seeds",))
