"""The operator U^k: k optimizer steps on the losses of one task (Equations 1, 9 and 10)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax import checks
from metajax.types import (
  Examples,
  InnerState,
  LossFn,
  Params,
  num_steps,
  take,
)


class LearnerState(NamedTuple):
  """The state that an inner step takes and returns."""

  params: Params  # phi_i
  opt_state: InnerState


class Step(NamedTuple):
  """The loss, the gradient and the update of one inner step."""

  loss: jax.Array  # L_i(phi_i), a scalar
  grads: Params  # g_i = L_i'(phi_i)
  update: Params  # phi_{i+1} - phi_i


class Carried(optax.GradientTransformationExtraArgs):
  """An inner optimizer whose state is handed from one task to the next: see `carried`."""


def carried(optimizer: optax.GradientTransformation) -> Carried:
  """Makes an inner optimizer keep its state from task to task.

  Without it, every task starts from `optimizer.init(params)`, which is right for momentum, for
  schedules and for most uses of Adam. The paper's code hands the second moment of Adam with
  `b1=0` from task to task in training, and starts evaluations from it; this function is for that.

  Apply it last: the result of `optax.chain` is not carried, even if a part of the chain is.

  Args:
    optimizer: any optax transformation.

  Returns:
    The same transformation, marked. Use it wherever the inner optimizer is asked for:

    >>> gradient = metajax.reptile(loss_fn, metajax.carried(optax.adam(1e-3, b1=0.0)))
  """
  return Carried(*optax.with_extra_args_support(optimizer))


def initial_state(optimizer: optax.GradientTransformation, params: Params) -> InnerState:
  """What is carried from task to task at the start: nothing, unless the optimizer is `carried`.

  Raises:
    ValueError: if a parameter is not floating point, or the optimizer draws random numbers and is
      not `carried`.
  """
  checks.floating_point(params)
  if not isinstance(optimizer, Carried):
    checks.without_keys(jax.eval_shape(optimizer.init, params))
  return optimizer.init(params) if isinstance(optimizer, Carried) else ()


def begin_task(
  optimizer: optax.GradientTransformation, params: Params, inner_state: InnerState
) -> LearnerState:
  """The learner at the start of a task: the shared parameters, and a fresh or a carried state.

  Raises:
    ValueError: if the inner state is not one that `initial_state` returns for these parameters.
  """
  expected = jax.eval_shape(partial(initial_state, optimizer), params)
  checks.state_of("inner", expected, inner_state)
  if isinstance(optimizer, Carried):
    return LearnerState(params, inner_state)
  return LearnerState(params, optimizer.init(params))


def end_task(optimizer: optax.GradientTransformation, learner: LearnerState) -> InnerState:
  """What the next task is handed: nothing, unless the optimizer is `carried`."""
  return learner.opt_state if isinstance(optimizer, Carried) else ()


def finite_or_before(after: InnerState, before: InnerState) -> InnerState:
  """Returns the state after a task, or the state before it if that holds NaN or infinity.

  Otherwise a task that blows up would leave NaN in a carried state for good, even if the outer
  optimizer skips its gradient, as `optax.apply_if_finite` does.
  """
  finite = all_finite(after)
  return jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)


def all_finite(tree: Any) -> jax.Array:
  """Whether no number in a tree is NaN or infinite, a scalar bool."""
  finite = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
  return jax.tree.reduce(jnp.logical_and, finite, jnp.bool_(True))


def inner_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  learner: LearnerState,
  batch: Examples,
) -> tuple[LearnerState, Step]:
  """One step phi_{i+1} = U_i(phi_i); for SGD phi_i - alpha L_i'(phi_i) (Equation 10).

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: any optax transformation; its update is added to the parameters. If it asks for more
      than the gradient, it is given the loss (`value`), its gradient (`grad`) and the loss as a
      function of the parameters (`value_fn`).
    learner: phi_i and the optimizer's state.
    batch: the minibatch of L_i, `[b, ...]`.

  Returns:
    The learner after the step, and the `Step`.

  Raises:
    ValueError: if the parameters are not floating point, the state is not theirs, the loss is not
      a scalar, or the minibatch has no example.
  """
  checks.floating_point(learner.params)
  checks.state_of("inner", jax.eval_shape(optimizer.init, learner.params), learner.opt_state)
  loss_fn = checks.scalar(loss_fn)
  loss, grads = jax.value_and_grad(loss_fn)(learner.params, batch)
  update, opt_state = optax.with_extra_args_support(optimizer).update(
    grads,
    learner.opt_state,
    learner.params,
    value=loss,
    grad=grads,
    value_fn=lambda params: loss_fn(params, batch),
  )
  params = optax.apply_updates(learner.params, update)
  return LearnerState(params, opt_state), Step(loss, grads, update)


def inner_update(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  learner: LearnerState,
  pool: Examples,
  schedule: jax.Array,
  *,
  remat: bool = False,
) -> tuple[LearnerState, jax.Array]:
  """U^k(phi): one step for each row of the schedule, as a single scan (Equation 1).

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: any optax transformation.
    learner: phi and the optimizer's state at the start.
    pool: the task's examples `[n, ...]`.
    schedule: int32 `[k, b]`, the rows of the pool that each step sees.
    remat: recompute the activations of a step when differentiating through it, instead of keeping
      them in memory.

  Returns:
    The learner after `k` steps, and the losses L_i(phi_i), `[k]`.

  Raises:
    ValueError: as `inner_step`, or if the schedule is not rows `[k, b]`.
  """

  def body(learner: LearnerState, rows: jax.Array) -> tuple[LearnerState, jax.Array]:
    learner, step = inner_step(loss_fn, optimizer, learner, take(pool, rows))
    return learner, step.loss

  step = jax.checkpoint(body) if remat else body
  return jax.lax.scan(step, learner, schedule, length=num_steps(schedule))


def forward_over_reverse(loss_fn: LossFn) -> LossFn:
  """Returns the same loss with a second derivative that is computed forward over reverse.

  The derivative of an inner step phi - alpha L'(phi) needs Hessian-vector products L''(phi) v. In
  reverse over reverse mode, each product keeps the tape of the inner gradient. Computed as the
  derivative of L' in the direction v, a product needs only phi and the minibatch, and recomputes
  the activations. The results agree up to rounding.

  Only derivatives with respect to the parameters are defined.
  """
  loss_fn = checks.scalar(loss_fn)
  grad = jax.grad(loss_fn)

  @jax.custom_vjp
  def value_and_grad(params: Params, batch: Examples) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(loss_fn)(params, batch)

  def keep_arguments(params: Params, batch: Examples) -> Any:
    return value_and_grad(params, batch), (params, batch)

  def hessian_vector(arguments: Any, cotangents: Any) -> tuple[Params, None]:
    (params, batch), (of_value, direction) = arguments, cotangents
    params = jax.tree.map(_out_of_the_stack, params)
    grads, product = jax.jvp(lambda params: grad(params, batch), (params,), (direction,))
    # The value matters only to optimizers that use it, such as optax.polyak_sgd.
    return jax.tree.map(lambda p, g: p + of_value * g, product, grads), None

  value_and_grad.defvjp(keep_arguments, hessian_vector)

  @jax.custom_vjp
  def loss(params: Params, batch: Examples) -> jax.Array:
    return loss_fn(params, batch)

  def scale(grads: Params, cotangent: jax.Array) -> tuple[Params, None]:
    return jax.tree.map(lambda g: cotangent * g, grads), None

  loss.defvjp(value_and_grad, scale)
  return loss


def _out_of_the_stack(leaf: jax.Array) -> jax.Array:
  """The same numbers, in a form that XLA computes once.

  In the backward pass of a scan, phi_i is a slice of the stack of all phi. XLA would put that slice
  of a scale or a bias into every elementwise loop that uses it, where it prevents vector
  instructions: on CPU a Hessian-vector product takes three times as long. A sum is not put there.
  """
  return leaf if leaf.ndim > 1 else jnp.sum(jnp.stack([leaf, jnp.zeros_like(leaf)]), axis=0)
