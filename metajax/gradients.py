"""Which combination of the gradients g_1 ... g_k becomes the outer gradient, for ONE task."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.inner import (
  LearnerState,
  forward_over_reverse,
  initial_state,
  inner_step,
  inner_update,
  scalar,
)
from metajax.types import Episode, Examples, InnerState, LossFn, Params, num_steps, take


class Info(NamedTuple):
  """What may be logged of an episode."""

  losses: jax.Array  # L_i(phi_i), [k]


class MetaGradient(NamedTuple):
  """A meta-gradient estimator; every one here is written for a single task.

  Attributes:
    init: `params -> inner_state`, what is carried from one task to the next.
    estimate: `(params, inner_state, episode) -> (gradient, inner_state, Info)`; the gradient has
      the parameters' structure and is meant for any optax optimizer, which subtracts it.

  `init` raises a ValueError if a parameter is not floating point, `estimate` if the inner state,
  the episode or what the loss returns is not of the shape it should have.
  """

  init: Callable[[Params], InnerState]
  estimate: Callable[[Params, InnerState, Episode], tuple[Params, InnerState, Info]]


def reptile(
  loss_fn: LossFn, optimizer: optax.GradientTransformation, *, stepsize: float | jax.Array = 1.0
) -> MetaGradient:
  """Reptile: (phi - U^k(phi)) / stepsize (Algorithm 1, Section 3).

  With `stepsize=1` and outer SGD of rate epsilon this is phi <- phi + epsilon (phi~ - phi). With
  inner SGD of rate alpha and `stepsize=alpha` it is g_1 + ... + g_k.

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: the inner optimizer.
    stepsize: what the displacement is divided by.

  Raises:
    ValueError: if the stepsize is not positive and finite.
  """
  if not isinstance(stepsize, jax.core.Tracer) and not 0 < stepsize < float("inf"):
    raise ValueError(f"stepsize must be positive and finite, not {stepsize}")

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    learner, losses = inner_update(
      loss_fn, optimizer, LearnerState(params, inner_state), episode.pool, episode.schedule
    )
    learner, last = inner_step(loss_fn, optimizer, learner, episode.tail)
    gradient = jax.tree.map(lambda phi, adapted: (phi - adapted) / stepsize, params, learner.params)
    return gradient, learner.opt_state, Info(jnp.append(losses, last.loss))

  return MetaGradient(partial(initial_state, optimizer), estimate)


def fomaml(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> MetaGradient:
  """First-order MAML: g_k = L_k'(U^{k-1}(phi)), Equation 4 with the Jacobian U' taken as I.

  Nothing is differentiated through the inner steps. L_k is the outer loss, so it does not pass
  through the inner optimizer, and the state carried on is the one after `k - 1` steps.

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: the inner optimizer.
  """

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    learner, losses = inner_update(
      loss_fn, optimizer, LearnerState(params, inner_state), episode.pool, episode.schedule
    )
    last, gradient = jax.value_and_grad(scalar(loss_fn))(learner.params, episode.tail)
    return gradient, learner.opt_state, Info(jnp.append(losses, last))

  return MetaGradient(partial(initial_state, optimizer), estimate)


def maml(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  remat: bool = False,
  mixed_mode: bool = False,
) -> MetaGradient:
  """MAML: d/dphi L_k(U^{k-1}(phi)), the full derivative (Equation 3).

  The inner optimizer's state is a constant of the derivative; the one carried on is that after
  `k - 1` steps, as for `fomaml`.

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: the inner optimizer.
    remat: recompute each inner step in the backward pass: less memory, more time.
    mixed_mode: take each inner step's Hessian-vector product forward over reverse, which keeps no
      tape of the inner gradients: less memory still. Not for a `loss_fn` that cannot be
      differentiated forward.

  Raises:
    ValueError: in `init`, if the optimizer's update has no finite derivative at a zero gradient,
      as Adam without `eps_root` (a gradient entry of exactly 0 would give NaN).
  """

  inner_loss = forward_over_reverse(loss_fn) if mixed_mode else loss_fn

  def init(params: Params) -> InnerState:
    state = initial_state(optimizer, params)
    _check_twice_differentiable(optimizer, params)
    return state

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    def objective(params: Params) -> tuple[jax.Array, tuple[InnerState, jax.Array]]:
      learner, losses = inner_update(
        inner_loss,
        optimizer,
        LearnerState(params, inner_state),
        episode.pool,
        episode.schedule,
        remat=remat,
      )
      last = scalar(loss_fn)(learner.params, episode.tail)
      return last, (learner.opt_state, jnp.append(losses, last))

    gradient, (inner_state, losses) = jax.grad(objective, has_aux=True)(params)
    return gradient, inner_state, Info(losses)

  return MetaGradient(init, estimate)


def combine(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  weights: Sequence[float] | jax.Array | np.ndarray,
  *,
  of_updates: bool = False,
) -> MetaGradient:
  """Any linear combination w_1 g_1 + ... + w_k g_k, in memory independent of k (Section 6.2).

  All ones give Reptile's gradient, the last one alone FOMAML's.

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: the inner optimizer.
    weights: `[k]`.
    of_updates: combine -(phi_{i+1} - phi_i), what the optimizer took away at each step, in place of
      g_i. The paper's code does so: its FOMAML applies the last update, which for Adam is not g_k.

  Raises:
    ValueError: if the weights are not a finite vector; in `estimate`, if there are not `k` of them.
  """
  coefficients = _numbers(weights)
  if coefficients is None:
    raise ValueError(f"weights must be k finite numbers, known beforehand, not {weights!r:.80}")

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    k = num_steps(episode.schedule) + 1
    if coefficients.size != k:
      raise ValueError(f"{coefficients.size} weights for an episode of k = {k} losses: give {k}")

    def advance(
      carry: tuple[LearnerState, Params], weight: jax.Array, batch: Examples
    ) -> tuple[tuple[LearnerState, Params], jax.Array]:
      learner, total = carry
      learner, step = inner_step(loss_fn, optimizer, learner, batch)
      terms = jax.tree.map(jnp.negative, step.update) if of_updates else step.grads
      total = jax.tree.map(lambda t, term: t + weight.astype(t.dtype) * term, total, terms)
      return (learner, total), step.loss

    zeros = jax.tree.map(jnp.zeros_like, params)
    carry, losses = jax.lax.scan(
      lambda carry, turn: advance(carry, turn[0], take(episode.pool, turn[1])),
      (LearnerState(params, inner_state), zeros),
      (jnp.asarray(coefficients[:-1]), episode.schedule),
    )
    (learner, gradient), last = advance(carry, jnp.asarray(coefficients[-1]), episode.tail)
    return gradient, learner.opt_state, Info(jnp.append(losses, last))

  return MetaGradient(partial(initial_state, optimizer), estimate)


def stateless(meta_gradient: MetaGradient) -> MetaGradient:
  """The same estimator with a fresh inner optimizer for every task; nothing is carried.

  The paper's code hands Adam's second moment from task to task; this is the ablation.
  """

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, tuple, Info]:
    del inner_state
    gradient, _, info = meta_gradient.estimate(params, meta_gradient.init(params), episode)
    return gradient, (), info

  def init(params: Params) -> tuple:
    meta_gradient.init(params)  # so that what it refuses is refused here, too
    return ()

  return MetaGradient(init, estimate)


def _numbers(weights: Any) -> np.ndarray | None:
  """A vector that is finite as JAX will hold it, or None."""
  if isinstance(weights, jax.core.Tracer):
    return None
  try:
    found = np.asarray(weights)
    with np.errstate(over="ignore"):
      finite = np.isfinite(found.astype(jax.dtypes.canonicalize_dtype(found.dtype)))
  except (TypeError, ValueError):  # not numbers, or a ragged list of lists
    return None
  real = found.dtype != bool and not np.iscomplexobj(found)
  return found if real and found.ndim == 1 and found.size and finite.all() else None


def _check_twice_differentiable(optimizer: optax.GradientTransformation, params: Params) -> None:
  """Probes the update's derivative at a zero gradient on scalars of the parameters' structure."""
  with jax.ensure_compile_time_eval():
    scalars = jax.tree.map(lambda leaf: jnp.zeros((), jnp.result_type(leaf)), params)
    ones = jax.tree.map(jnp.ones_like, scalars)
    state = optimizer.init(scalars)
    _, slopes = jax.jvp(
      lambda grads: optimizer.update(grads, state, scalars)[0], (scalars,), (ones,)
    )
    known = [s for s in jax.tree.leaves(slopes) if not isinstance(s, jax.core.Tracer)]
    finite = all(bool(jnp.isfinite(slope)) for slope in known)  # a traced rate cannot be judged
  if not finite:
    raise ValueError(
      "maml needs an inner optimizer whose update has a finite derivative at a zero gradient: "
      "give optax.adam an eps_root > 0 (say 1e-8), or use optax.sgd"
    )
