import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import theory

ESTIMATORS = {
  "maml": (lambda loss, alpha: metajax.maml(loss, optax.sgd(alpha)), theory.maml_coefficients),
  "fomaml": (
    lambda loss, alpha: metajax.fomaml(loss, optax.sgd(alpha)),
    theory.fomaml_coefficients,
  ),
  "reptile": (
    lambda loss, alpha: metajax.reptile(loss, optax.sgd(alpha), stepsize=alpha),
    theory.reptile_coefficients,
  ),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def curved(params, batch):
  """Not a quadratic, so that there is something of second order to leave out."""
  return jnp.mean(jnp.square(jnp.sin(batch.inputs @ params["w"]) + params["b"] - batch.targets))


def problem(tasks=3, k=3, batch=4):
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(0.3)}
  inputs, targets = rng.normal(size=(tasks, k, batch, 3)), rng.normal(size=(tasks, k, batch))
  return params, metajax.Examples(jnp.asarray(inputs), jnp.asarray(targets))


def pick(minibatches, task, i):
  return jax.tree.map(lambda leaf: leaf[task, i], minibatches)


def test_both_directions_are_means_over_pairs():
  params, minibatches = problem()
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  loss = lambda flat, batch: curved(unravel(flat), batch)
  grads = {
    (t, i): np.asarray(jax.grad(loss)(flat, pick(minibatches, t, i)))
    for t in range(3)
    for i in range(3)
  }
  hessian = lambda t, i: np.asarray(jax.hessian(loss)(flat, pick(minibatches, t, i)))
  pairs = [
    hessian(t, i) @ grads[t, j] for t in range(3) for i, j in itertools.permutations(range(3), 2)
  ]
  found = theory.expansion(curved, params, minibatches)
  ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
  np.testing.assert_allclose(ravel(found.avg_grad), np.mean(list(grads.values()), 0), rtol=1e-12)
  np.testing.assert_allclose(ravel(found.avg_grad_inner), np.mean(pairs, 0), rtol=1e-12)

  # Section 5.1's other form: half the derivative of the inner product of two gradients.
  def products(flat):
    inner = [
      jax.grad(loss)(flat, pick(minibatches, t, i)) @ jax.grad(loss)(flat, pick(minibatches, t, j))
      for t in range(3)
      for i, j in itertools.permutations(range(3), 2)
    ]
    return sum(inner) / len(inner)

  np.testing.assert_allclose(ravel(found.avg_grad_inner), jax.grad(products)(flat) / 2, rtol=1e-12)


def test_the_expected_gradient_is_over_all_orders_of_three():
  """Three minibatches have 3! = 6 orders: all rotations, forwards and backwards."""
  params, minibatches = problem()
  alpha = 0.1
  total = jax.tree.map(jnp.zeros_like, params)
  for task in range(3):
    for order in itertools.permutations(range(3)):
      phi = params
      for i in order:
        grad = jax.grad(curved)(phi, pick(minibatches, task, i))
        phi = jax.tree.map(lambda p, g: p - alpha * g, phi, grad)
        total = jax.tree.map(lambda t, g: t + g / 18, total, grad)
  estimator = metajax.reptile(curved, optax.sgd(alpha), stepsize=alpha)
  found = theory.expected_gradient(estimator, params, minibatches)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, total)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("k", [2, 4])
def test_equations_37_39_and_41(name, k):
  params, minibatches = problem(k=k)
  found = theory.expansion(curved, params, minibatches)
  estimator, predicted = ESTIMATORS[name]
  residuals = []
  for alpha in (1e-5, 1e-4):
    gradient = theory.expected_gradient(estimator(curved, alpha), params, minibatches)
    fitted, exact = theory.fit(gradient, found), predicted(k, alpha)
    np.testing.assert_allclose(fitted, exact, rtol=1e3 * alpha)
    assert fitted.ratio == pytest.approx(exact.ratio, rel=1e3 * alpha)
    left = jax.tree.map(jnp.subtract, gradient, theory.predict(found, exact))
    residuals.append(float(optax.tree.norm(left)))
  assert 80 < residuals[1] / residuals[0] < 125  # of second order


def test_one_minibatch_has_no_pairs():
  params, minibatches = problem(k=1)
  with pytest.raises(ValueError, match="at least 2"):
    theory.expansion(curved, params, minibatches)


def test_the_gradient_of_half_the_squared_distance_is_the_displacement():
  """Equations 44 to 46, on a circle: also through the projection, which then does not matter."""
  centre, radius = jnp.array([0.5, -0.2]), 1.5
  project = lambda phi: centre + radius * (phi - centre) / jnp.linalg.norm(phi - centre)
  phi = jnp.array([2.0, 3.0])
  distance = theory.half_squared_distance(project)
  np.testing.assert_allclose(distance(phi), (np.hypot(1.5, 3.2) - 1.5) ** 2 / 2, rtol=1e-12)
  np.testing.assert_allclose(jax.grad(distance)(phi), phi - project(phi), rtol=1e-12)
  through = jax.grad(lambda phi: jnp.sum(jnp.square(phi - project(phi))) / 2)
  np.testing.assert_allclose(through(phi), phi - project(phi), rtol=1e-12)
