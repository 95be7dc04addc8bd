"""Estimators of the meta-gradient of one task, from its losses L_1 ... L_k."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import checks
from metajax.inner import (
  Info,
  LearnerState,
  Turn,
  all_finite,
  begin_task,
  end_task,
  forward_over_reverse,
  initial_state,
  inner_step,
  inner_update,
  scan,
  spoiled,
  turns,
)
from metajax.types import (
  Episode,
  Examples,
  InnerState,
  LossFn,
  Params,
  PRNGKey,
  num_steps,
  take,
)


class MetaGradient(NamedTuple):
  """A meta-gradient estimator. Every estimator in this module is written for a single task.

  Attributes:
    init: `params -> inner_state`, what is carried from one task to the next. It is empty unless
      the inner optimizer is `carried`.
    estimate: `(params, inner_state, episode) -> (gradient, inner_state, Info)`. The gradient has
      the structure of the parameters and is meant for any optax optimizer, which subtracts it.
    adapt: `(params, inner_state, examples, schedule, key) -> params`, how this algorithm adapts to
      a new task: one inner step for each row of the schedule (int32 `[k, b]`). The key is for a
      loss that draws random numbers, else None.

  `init` raises a ValueError if a parameter is not floating point, or the inner optimizer returns a
  gradient as it is, or draws random numbers and is not `carried`. `estimate` and `adapt` raise one
  if the inner state, the episode, or the value or a metric of the loss does not have the shape it
  should have, or if the loss has a third parameter without a default that is not named `key`.
  """

  init: Callable[[Params], InnerState]
  estimate: Callable[[Params, InnerState, Episode], tuple[Params, InnerState, Info]]
  adapt: Callable[[Params, InnerState, Examples, jax.Array, PRNGKey | None], Params]


def reptile(
  loss_fn: LossFn, optimizer: optax.GradientTransformation, *, stepsize: float | jax.Array = 1.0
) -> MetaGradient:
  """Reptile: (phi - U^k(phi)) / stepsize, with U^k the k inner steps (Algorithm 1, Section 3).

  With `stepsize=1` and outer SGD of rate epsilon, the outer update is
  phi <- phi + epsilon (phi~ - phi), where phi~ are the adapted parameters. With inner SGD of rate
  alpha and `stepsize=alpha`, the estimate is g_1 + ... + g_k.

  Args:
    loss_fn: `(params, batch) -> scalar`; see `inner_step` for metrics and keys.
    optimizer: the inner optimizer.
    stepsize: the number that the displacement is divided by.

  Raises:
    ValueError: if the stepsize is not positive and finite.
  """
  if not isinstance(stepsize, jax.core.Tracer) and not 0 < stepsize < float("inf"):
    raise ValueError(f"stepsize must be positive and finite, not {stepsize}")

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    start = begin_task(optimizer, params, inner_state)
    learner, info = _until_tail(loss_fn, optimizer, start, episode)
    learner, last = inner_step(loss_fn, optimizer, learner, episode.tail, tail_key(episode))
    gradient = jax.tree.map(lambda phi, adapted: (phi - adapted) / stepsize, params, learner.params)
    return gradient, end_task(optimizer, learner), appended(info, last.loss, last.metrics)

  return MetaGradient(
    partial(initial_state, optimizer), estimate, partial(_adapt, loss_fn, optimizer)
  )


def fomaml(
  loss_fn: LossFn, optimizer: optax.GradientTransformation, *, outer_loss: LossFn | None = None
) -> MetaGradient:
  """First-order MAML: g_k = L_k'(U^{k-1}(phi)), Equation 4 with the Jacobian U' taken as I.

  Nothing is differentiated through the inner steps. L_k is the outer loss and does not pass
  through the inner optimizer. If the inner optimizer is `carried`, its state after `k - 1` steps is
  handed on. With k = 1 there is no inner step: that is joint training on all tasks.

  Args:
    loss_fn: `(params, batch) -> scalar`; see `inner_step` for metrics and keys.
    optimizer: the inner optimizer.
    outer_loss: L_k, if it is another function than the loss of the inner steps.
  """
  last_loss = checks.loss(outer_loss or loss_fn)

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    start = begin_task(optimizer, params, inner_state)
    learner, info = _until_tail(loss_fn, optimizer, start, episode)
    of_tail = jax.value_and_grad(last_loss, has_aux=True)
    (last, metrics), gradient = of_tail(learner.params, episode.tail, tail_key(episode))
    return gradient, end_task(optimizer, learner), appended(info, last, metrics)

  return MetaGradient(
    partial(initial_state, optimizer), estimate, partial(_adapt, loss_fn, optimizer)
  )


def maml(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  outer_loss: LossFn | None = None,
  remat: bool = False,
  mixed_mode: bool = True,
) -> MetaGradient:
  """MAML: d/dphi L_k(U^{k-1}(phi)), the full derivative through the inner steps (Equation 3).

  Everything that happens within a task is differentiated through. If the inner optimizer's first
  state depends on phi, so is that. The state of a `carried` optimizer at the start of a task is
  held constant; its state after `k - 1` steps is handed on, as for `fomaml`. With k = 1 there is no
  inner step.

  Args:
    loss_fn: `(params, batch) -> scalar`; see `inner_step` for metrics and keys.
    optimizer: the inner optimizer.
    outer_loss: L_k, if it is another function than the loss of the inner steps.
    remat: compute each inner step again in the backward pass, which takes less memory. It is meant
      for `mixed_mode=False`; mixed mode keeps no activations that could be computed again.
    mixed_mode: compute the Hessian-vector product of each inner step forward over reverse. This
      keeps no tape of the inner gradients, so with more than one inner step it takes less memory,
      and no more time. False differentiates through the inner gradients in reverse mode. It is
      needed if `loss_fn` has a derivative rule for reverse mode only (`jax.custom_vjp`), which JAX
      refuses otherwise, and for derivatives of the meta-gradient in forward mode, or with respect
      to the data or to what the loss closes over.

  Raises:
    ValueError: in `init`, if JAX cannot differentiate the optimizer's update, as that of a line
      search, or it has no finite derivative at a zero gradient, as Adam without `eps_root` (a
      gradient entry of exactly 0 would give NaN); in mixed mode, if the meta-gradient is
      differentiated with respect to the data or to what the loss closes over.
  """

  inner_loss = forward_over_reverse(loss_fn) if mixed_mode else loss_fn
  last_loss = checks.loss(outer_loss or loss_fn)

  def init(params: Params) -> InnerState:
    state = initial_state(optimizer, params)
    checks.twice_differentiable(optimizer, params)
    return state

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    def objective(params: Params) -> tuple[jax.Array, tuple[InnerState, Info]]:
      start = begin_task(optimizer, params, inner_state)
      learner, info = _until_tail(inner_loss, optimizer, start, episode, remat=remat)
      last, metrics = last_loss(learner.params, episode.tail, tail_key(episode))
      return last, (end_task(optimizer, learner), appended(info, last, metrics))

    gradient, (inner_state, info) = jax.grad(objective, has_aux=True)(params)
    return gradient, inner_state, info

  return MetaGradient(init, estimate, partial(_adapt, loss_fn, optimizer))


def combine(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  weights: Sequence[float] | jax.Array | np.ndarray,
  *,
  of_updates: bool = False,
) -> MetaGradient:
  """Any linear combination w_1 g_1 + ... + w_k g_k, in memory independent of k (Section 6.2).

  With inner SGD of rate alpha, weights that are all 1 give the gradient of `reptile` with
  `stepsize=alpha`. The weights [0, ..., 0, 1] give g_k as `fomaml` does, but a `carried` optimizer
  hands on its state after k steps instead of k - 1. The gradients of steps that a task does not
  take (`Episode.steps`) count as zero.

  Args:
    loss_fn: `(params, batch) -> scalar`; see `inner_step` for metrics and keys.
    optimizer: the inner optimizer.
    weights: `[k]`.
    of_updates: combine the optimizer's updates, as phi_i - phi_{i+1}, in place of the gradients
      g_i. The paper's code does so: its FOMAML applies the last update, which for Adam is not g_k.

  Raises:
    ValueError: if the weights are not a finite vector; in `estimate`, if there are not `k` of them.
  """
  coefficients = checks.finite_vector(weights)

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    k = num_steps(episode.schedule) + 1
    if coefficients.size != k:
      raise ValueError(f"{coefficients.size} weights for an episode of k = {k} losses: give {k}")

    def advance(
      carry: tuple[LearnerState, Params],
      weight: jax.Array,
      batch: Examples,
      key: PRNGKey | None,
      taken: jax.Array | None = None,
    ) -> tuple[tuple[LearnerState, Params], Info]:
      learner, total = carry
      learner, step = inner_step(loss_fn, optimizer, learner, batch, key, taken=taken)
      terms = jax.tree.map(jnp.negative, step.update) if of_updates else step.grads
      total = jax.tree.map(lambda t, term: t + (weight * term).astype(t.dtype), total, terms)
      return (learner, total), Info(step.loss, step.metrics)

    def until_tail(
      carry: tuple[LearnerState, Params], weight_and_turn: tuple[jax.Array, Turn]
    ) -> tuple[tuple[LearnerState, Params], Info]:
      weight, turn = weight_and_turn
      return advance(carry, weight, take(episode.pool, turn.rows), turn.key, turn.taken)

    start = begin_task(optimizer, params, inner_state), jax.tree.map(jnp.zeros_like, params)
    each = turns(loss_fn, episode.schedule, episode.key, episode.steps)
    carry, info = scan(until_tail, start, (jnp.asarray(coefficients[:-1]), each), k - 1)
    (learner, gradient), last = advance(
      carry, jnp.asarray(coefficients[-1]), episode.tail, tail_key(episode)
    )
    return gradient, end_task(optimizer, learner), appended(info, last.losses, last.metrics)

  return MetaGradient(
    partial(initial_state, optimizer), estimate, partial(_adapt, loss_fn, optimizer)
  )


def skip_nonfinite(meta_gradient: MetaGradient) -> MetaGradient:
  """Skips tasks whose gradient or losses are not finite, or that spoil the inner state.

  The inner state is spoiled if a number in it is no longer finite that was finite before.

  Such a task counts as one with a gradient of zero and losses of zero, and what is carried stays as
  it was before. `Info.skipped` is the fraction of the tasks that were skipped.
  """

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    gradient, after, info = meta_gradient.estimate(params, inner_state, episode)
    finite = all_finite((gradient, info.losses)) & ~spoiled(after, inner_state)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    info = keep(info, zeros(info))._replace(skipped=1.0 - finite.astype(info.losses.dtype))
    return keep(gradient, zeros(gradient)), keep(after, inner_state), info

  return meta_gradient._replace(estimate=estimate)


def _until_tail(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  start: LearnerState,
  episode: Episode,
  **options: bool,
) -> tuple[LearnerState, Info]:
  """The first k - 1 inner steps of an episode."""
  pool, schedule, _, key, steps = episode
  return inner_update(loss_fn, optimizer, start, pool, schedule, key, steps=steps, **options)


def tail_key(episode: Episode) -> PRNGKey | None:
  """The key of L_k, the next after those of the other losses."""
  if episode.key is None:
    return None
  return jax.random.fold_in(episode.key, num_steps(episode.schedule))


def appended(info: Info, loss: jax.Array, metrics: dict[str, jax.Array] | None) -> Info:
  """The Info of all k losses. A metric that only some of them return has fewer entries."""
  parts = [info.metrics or {}, jax.tree.map(lambda leaf: leaf[None], metrics or {})]
  together = {}
  for name in {**parts[0], **parts[1]}:
    values = [part[name] for part in parts if name in part]
    if len({value.shape[1:] for value in values}) > 1:
      shapes = " and ".join(str(value.shape[1:]) for value in values)
      raise ValueError(
        f"the metric {name!r} is {shapes} in different steps: reduce it over the minibatch"
      )
    together[name] = jnp.concatenate(values)
  return Info(jnp.append(info.losses, loss), together)


def _adapt(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  params: Params,
  inner_state: InnerState,
  examples: Examples,
  schedule: jax.Array,
  key: PRNGKey | None = None,
) -> Params:
  """Plain inner steps, with which all algorithms of this module adapt to a new task."""
  start = begin_task(optimizer, params, inner_state)
  learner, _ = inner_update(loss_fn, optimizer, start, examples, schedule, key)
  return learner.params
