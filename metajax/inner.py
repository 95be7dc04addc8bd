"""The operator U^k: k optimizer steps on the losses of one task (Equations 1, 9 and 10)."""

from typing import Any, NamedTuple

import jax
import optax

from metajax.types import Examples, InnerState, LossFn, Params, take


class LearnerState(NamedTuple):
  """What a learner carries from one inner step to the next."""

  params: Params  # phi_i
  opt_state: InnerState


class Step(NamedTuple):
  """What one inner step did, for whoever combines steps."""

  loss: jax.Array  # L_i(phi_i), a scalar
  grads: Params  # g_i = L_i'(phi_i)
  update: Params  # phi_{i+1} - phi_i


def inner_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  learner: LearnerState,
  batch: Examples,
) -> tuple[LearnerState, Step]:
  """One step phi_{i+1} = U_i(phi_i); for SGD phi_i - alpha L_i'(phi_i) (Equation 10).

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: any optax transformation; its update is added to the parameters.
    learner: phi_i and the optimizer's state.
    batch: the minibatch of L_i, `[b, ...]`.

  Returns:
    The learner after the step, and the `Step`.
  """
  loss, grads = jax.value_and_grad(loss_fn)(learner.params, batch)
  update, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
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
    remat: recompute a step's activations when differentiating through it, rather than keep them.

  Returns:
    The learner after `k` steps, and the losses L_i(phi_i), `[k]`.
  """

  def body(learner: LearnerState, rows: jax.Array) -> tuple[LearnerState, jax.Array]:
    learner, step = inner_step(loss_fn, optimizer, learner, take(pool, rows))
    return learner, step.loss

  return jax.lax.scan(jax.checkpoint(body) if remat else body, learner, schedule)


def forward_over_reverse(loss_fn: LossFn) -> LossFn:
  """The same loss, its second derivative taken forward over reverse.

  To differentiate an inner step phi - alpha L'(phi) takes Hessian-vector products L''(phi) v. In
  reverse over reverse mode each keeps the tape of the inner gradient; as the derivative of L' in
  the direction v it needs phi and the minibatch alone, and the activations are computed anew. The
  results are equal to rounding. Only derivatives by the parameters are defined.
  """
  grad = jax.grad(loss_fn)

  @jax.custom_vjp
  def value_and_grad(params: Params, batch: Examples) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(loss_fn)(params, batch)

  def keep_arguments(params: Params, batch: Examples) -> Any:
    return value_and_grad(params, batch), (params, batch)

  def hessian_vector(arguments: Any, cotangents: Any) -> tuple[Params, None]:
    (params, batch), (of_value, of_grad) = arguments, cotangents
    slope, product = jax.jvp(lambda params: grad(params, batch), (params,), (of_grad,))
    return jax.tree.map(lambda g, hv: of_value * g + hv, slope, product), None

  value_and_grad.defvjp(keep_arguments, hessian_vector)

  @jax.custom_vjp
  def loss(params: Params, batch: Examples) -> jax.Array:
    return loss_fn(params, batch)

  def scale(grads: Params, of_value: jax.Array) -> tuple[Params, None]:
    return jax.tree.map(lambda g: of_value * g, grads), None

  loss.defvjp(value_and_grad, scale)
  return loss
