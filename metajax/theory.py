"""The analysis of Section 5: expansions of meta-gradients to first order in the inner stepsize, and
Reptile as descent on the distance to the solutions of the tasks.

For inner SGD with stepsize alpha on minibatches in random order, MAML, FOMAML and Reptile all have
the expectation `a AvgGrad - b AvgGradInner + O(alpha^2)`. They differ in the coefficients a and b
(Equations 37, 39 and 41).

The terms that are left out are small, so compute on a CPU or in float64. The products of a GPU or
TPU are rounded by default, which hides them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metajax.gradients import MetaGradient
from metajax.types import Episode, Examples, LossFn, Params


class Expansion(NamedTuple):
  """The two directions of Section 5.1, each a pytree like the parameters.

  Attributes:
    avg_grad: E[L'], the gradient of the expected loss.
    avg_grad_inner: E[L_i'' L_j'] over two minibatches of a task, half the gradient of the inner
      product of their gradients. It has a minus sign in every estimator, so descent increases the
      inner product, and a step on one minibatch then also lowers the loss of the other.
  """

  avg_grad: Params
  avg_grad_inner: Params


class Coefficients(NamedTuple):
  """The coefficients a and b of `a AvgGrad - b AvgGradInner`."""

  avg_grad: float
  avg_grad_inner: float

  @property
  def ratio(self) -> float:
    """b / a, the weight of the second term relative to the first."""
    return self.avg_grad_inner / self.avg_grad


def maml_coefficients(k: int, alpha: float) -> Coefficients:
  """MAML: a = 1 and b = 2 (k - 1) alpha (Equation 37)."""
  return Coefficients(1.0, 2 * (k - 1) * alpha)


def fomaml_coefficients(k: int, alpha: float) -> Coefficients:
  """First-order MAML: a = 1 and b = (k - 1) alpha (Equation 39)."""
  return Coefficients(1.0, (k - 1) * alpha)


def reptile_coefficients(k: int, alpha: float) -> Coefficients:
  """Reptile, g_1 + ... + g_k: a = k and b = k (k - 1) alpha / 2 (Equation 41)."""
  return Coefficients(float(k), k * (k - 1) / 2 * alpha)


def expansion(loss_fn: LossFn, params: Params, minibatches: Examples) -> Expansion:
  """Computes both directions at phi, exactly, over the given tasks and all minibatch orders.

  Args:
    loss_fn: `(params, batch) -> scalar`.
    params: phi.
    minibatches: `[T, k, b, ...]`, k >= 2 minibatches of b examples for each of T tasks.

  Raises:
    ValueError: if k is 1, so that there is no pair of minibatches.
  """
  k = _num_minibatches(minibatches)
  if k < 2:
    raise ValueError("AvgGradInner is over pairs of minibatches: give at least 2 of each task")
  gradient = jax.grad(loss_fn)

  def of_task(minibatches: Examples) -> Expansion:
    grads = jax.vmap(gradient, in_axes=(None, 0))(params, minibatches)
    total = jax.tree.map(lambda leaf: leaf.sum(axis=0), grads)

    def hessian_others(batch: Examples, grad: Params) -> Params:
      others = jax.tree.map(jnp.subtract, total, grad)
      return jax.jvp(lambda phi: gradient(phi, batch), (params,), (others,))[1]

    products = jax.vmap(hessian_others)(minibatches, grads)
    return Expansion(
      jax.tree.map(lambda leaf: leaf / k, total),
      jax.tree.map(lambda leaf: leaf.sum(axis=0) / (k * (k - 1)), products),
    )

  return _mean(jax.vmap(of_task)(minibatches))


def expected_gradient(meta_gradient: MetaGradient, params: Params, minibatches: Examples) -> Params:
  """Averages an estimator over tasks and over orders of their minibatches.

  The average is over 2 k orders: all rotations, forwards and backwards. Every minibatch comes last
  in equally many of them, and of any two minibatches, each comes before the other in half of them.
  For MAML, FOMAML and Reptile, this average equals the expectation over all k! orders, to first
  order in the stepsize. An estimator that weighs the inner steps otherwise needs all orders.

  Args:
    meta_gradient: the estimator, for one task.
    params: phi.
    minibatches: `[T, k, b, ...]`, k minibatches of b examples for each of T tasks.
  """
  k = _num_minibatches(minibatches)
  forwards = (np.arange(k) + np.arange(k)[:, None]) % k
  orders = jnp.asarray(np.concatenate([forwards, forwards[:, ::-1]]))
  inner_state = meta_gradient.init(params)

  def one(minibatches: Examples, order: jax.Array) -> Params:
    size = jax.tree.leaves(minibatches)[0].shape[1]
    pool = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), minibatches)
    schedule = order[:-1, None] * size + jnp.arange(size)
    tail = jax.tree.map(lambda leaf: leaf[order[-1]], minibatches)
    return meta_gradient.estimate(params, inner_state, Episode(pool, schedule, tail))[0]

  over_orders = jax.vmap(one, in_axes=(None, 0))
  return _mean(jax.lax.map(lambda task: _mean(over_orders(task, orders)), minibatches))


def predict(found: Expansion, coefficients: Coefficients) -> Params:
  """Computes `a AvgGrad - b AvgGradInner`."""
  return jax.tree.map(
    lambda g, h: coefficients.avg_grad * g - coefficients.avg_grad_inner * h,
    found.avg_grad,
    found.avg_grad_inner,
  )


def fit(gradient: Params, found: Expansion) -> Coefficients:
  """Fits the coefficients a and b to a gradient by least squares."""
  flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
  directions = np.stack([flat(found.avg_grad), -flat(found.avg_grad_inner)], axis=1)
  a, b = np.linalg.lstsq(directions, flat(gradient), rcond=None)[0]
  return Coefficients(float(a), float(b))


def half_squared_distance(project: Callable[[Params], Params]) -> Callable[[Params], jax.Array]:
  """Returns phi -> D(phi, W)^2 / 2, where W is the set of solutions of a task (Section 5.2).

  Its gradient is phi - P(phi) (Equations 44 to 46). Descent on its mean over tasks is therefore
  Reptile with an inner loop that reaches the nearest solution P(phi) (Equation 47). Only first
  derivatives are correct: P(phi) is treated as a constant, since to first order it moves along W,
  at right angles to phi - P(phi).

  Args:
    project: P, from phi to the nearest point of W.
  """

  def half_square(params: Params) -> jax.Array:
    nearest = jax.lax.stop_gradient(project(params))
    squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), params, nearest)
    return 0.5 * jax.tree.reduce(jnp.add, squares)

  return half_square


def _num_minibatches(minibatches: Examples) -> int:
  return jax.tree.leaves(minibatches)[0].shape[1]


def _mean(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.mean(axis=0), tree)
