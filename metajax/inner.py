"""The operator U^k: k optimizer steps on the losses of one task (Equations 1, 9 and 10)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.types import (
  Examples,
  InnerState,
  LossFn,
  Params,
  num_examples,
  num_steps,
  shapes,
  take,
)


class LearnerState(NamedTuple):
  """What a learner carries from one inner step to the next."""

  params: Params  # phi_i
  opt_state: InnerState


class Step(NamedTuple):
  """What one inner step did, for whoever combines steps."""

  loss: jax.Array  # L_i(phi_i), a scalar
  grads: Params  # g_i = L_i'(phi_i)
  update: Params  # phi_{i+1} - phi_i


def initial_state(optimizer: optax.GradientTransformation, params: Params) -> InnerState:
  """The inner optimizer's state at the start.

  Raises:
    ValueError: if a parameter is not floating point.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      name = jax.tree_util.keystr(path) or "theirs"
      raise ValueError(
        f"parameters must be floating point, and {name} is {dtype}: convert it, or leave it out"
      )
  return optimizer.init(params)


def scalar(loss_fn: LossFn) -> LossFn:
  """The same loss, refusing what cannot be a minibatch or a loss; it looks at shapes alone.

  Raises:
    ValueError: when called, if there is no example, or the loss is not one floating-point number.
  """

  def checked(params: Params, batch: Examples) -> jax.Array:
    if num_examples(batch) == 0:
      raise ValueError("a minibatch has no example: raise the batch size or the shots")
    loss = loss_fn(params, batch)
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(loss)]
    if not jax.tree_util.all_leaves([loss]) or not (
      types[0].shape == () and jnp.issubdtype(types[0].dtype, jnp.floating)
    ):
      found = ", ".join(map(str, types)) or "nothing"
      raise ValueError(
        f"the loss must be one floating-point number, not {found}: return the sum or the mean over "
        "the minibatch, and nothing else"
      )
    return loss

  return checked


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

  Raises:
    ValueError: if the parameters are not floating point, the state is not theirs, the loss is not
      a scalar, or the minibatch has no example.
  """
  own = jax.eval_shape(partial(initial_state, optimizer), learner.params)
  if shapes(learner.opt_state) != shapes(own):
    raise ValueError(
      "the inner state is not that of this optimizer for these parameters: start from what `init` "
      "returns for them"
    )
  loss, grads = jax.value_and_grad(scalar(loss_fn))(learner.params, batch)
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

  Raises:
    ValueError: as `inner_step`, or if the schedule is not rows `[k, b]`.
  """

  def body(learner: LearnerState, rows: jax.Array) -> tuple[LearnerState, jax.Array]:
    learner, step = inner_step(loss_fn, optimizer, learner, take(pool, rows))
    return learner, step.loss

  step = jax.checkpoint(body) if remat else body
  return jax.lax.scan(step, learner, schedule, length=num_steps(schedule))


def forward_over_reverse(loss_fn: LossFn) -> LossFn:
  """The same loss, its second derivative taken forward over reverse.

  To differentiate an inner step phi - alpha L'(phi) takes Hessian-vector products L''(phi) v. In
  reverse over reverse mode each keeps the tape of the inner gradient; as the derivative of L' in
  the direction v it needs phi and the minibatch alone, and the activations are computed anew. The
  results are equal to rounding. Only derivatives by the parameters are defined.
  """
  loss_fn = scalar(loss_fn)
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
