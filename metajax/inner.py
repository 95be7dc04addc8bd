"""The operator U^k: k optimizer steps on the losses of one task (Equations 1, 9 and 10)."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from metajax import checks
from metajax.programs import traced
from metajax.types import (
  Examples,
  InnerState,
  LossFn,
  Params,
  PRNGKey,
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
  metrics: dict[str, jax.Array]  # what the loss returned beside its value


class Turn(NamedTuple):
  """What an inner step is given, besides the learner."""

  rows: jax.Array  # int32 [b], the minibatch's rows of the pool
  key: PRNGKey | None  # for a loss that draws random numbers
  taken: jax.Array | None  # whether the step is taken; None for yes


class Info(NamedTuple):
  """What may be logged about the losses of a task.

  Attributes:
    losses: L_i(phi_i), `[k]`.
    metrics: what the losses returned beside their values, by name, `[k, ...]`; or None. A metric
      that only the inner loss returns is `[k - 1, ...]`, and one of the outer loss `[1, ...]`.
    skipped: the fraction of tasks that `skip_nonfinite` skipped, or None.
  """

  losses: jax.Array
  metrics: dict[str, jax.Array] | None = None
  skipped: jax.Array | None = None


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
  checks.is_optimizer(optimizer)
  return Carried(*checks.with_extra_args(optimizer))


def initial_state(optimizer: optax.GradientTransformation, params: Params) -> InnerState:
  """What is carried from task to task at the start: nothing, unless the optimizer is `carried`.

  Raises:
    ValueError: if a parameter is not floating point, or the optimizer returns a gradient as it is,
      or draws random numbers and is not `carried`.
  """
  checks.is_optimizer(optimizer)
  checks.floating_point(params)
  checks.no_raw_gradients("inner", optimizer, params)
  if not isinstance(optimizer, Carried):
    checks.without_keys(jax.eval_shape(optimizer.init, params))
  return _carried_state(optimizer, params)


def _carried_state(optimizer: optax.GradientTransformation, params: Params) -> InnerState:
  return optimizer.init(params) if isinstance(optimizer, Carried) else ()


def begin_task(
  optimizer: optax.GradientTransformation, params: Params, inner_state: InnerState
) -> LearnerState:
  """The learner at the start of a task: the shared parameters, and a fresh or a carried state.

  Raises:
    ValueError: if the inner state is not one that `initial_state` returns for these parameters.
  """
  expected = jax.eval_shape(partial(_carried_state, optimizer), params)
  checks.state_of("inner", expected, inner_state)
  if isinstance(optimizer, Carried):
    return LearnerState(params, inner_state)
  return LearnerState(params, optimizer.init(params))


def end_task(optimizer: optax.GradientTransformation, learner: LearnerState) -> InnerState:
  """What the next task is handed: nothing, unless the optimizer is `carried`."""
  return learner.opt_state if isinstance(optimizer, Carried) else ()


def finite_or_before(after: InnerState, before: InnerState) -> InnerState:
  """Returns the state after a task, or the state before it if the task `spoiled` it.

  Otherwise a task that blows up would leave NaN in a carried state for good, even if the outer
  optimizer skips its gradient, as `optax.apply_if_finite` does.
  """
  lost = spoiled(after, before)
  return jax.tree.map(lambda a, b: jnp.where(lost, b, a), after, before)


def spoiled(after: InnerState, before: InnerState) -> jax.Array:
  """Whether a task left NaN or infinity in a state where the state before had something else.

  Some optimizers begin with infinity, as `optax.contrib.reduce_on_plateau` does.
  """
  equal = lambda a, b: (a == b) | ((a != a) & (b != b))  # NaN is not equal to itself
  kept = jax.tree.map(lambda a, b: (jnp.isfinite(a) | equal(a, b)).all(), after, before)
  return ~jax.tree.reduce(jnp.logical_and, kept, jnp.bool_(True))


def all_finite(tree: Any) -> jax.Array:
  """Whether no number in a tree is NaN or infinite, a scalar bool."""
  finite = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
  return jax.tree.reduce(jnp.logical_and, finite, jnp.bool_(True))


def inner_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  learner: LearnerState,
  batch: Examples,
  key: PRNGKey | None = None,
  *,
  taken: jax.Array | None = None,
) -> tuple[LearnerState, Step]:
  """One step phi_{i+1} = U_i(phi_i); for SGD phi_i - alpha L_i'(phi_i) (Equation 10).

  Args:
    loss_fn: `(params, batch) -> scalar`, or a scalar and a dict of metrics. If a parameter after
      these is named `key`, it is given the key.
    optimizer: any optax transformation; its update is added to the parameters. If it asks for more
      than the gradient, it is given the loss (`value`), its gradient (`grad`) and the loss as a
      function of the parameters (`value_fn`).
    learner: phi_i and the optimizer's state.
    batch: the minibatch of L_i, `[b, ...]`.
    key: for a loss that draws random numbers.
    taken: a bool. If it is False, the learner stays as it was, and the gradient and the update of
      the `Step` are zero. None is True.

  Returns:
    The learner after the step, and the `Step`.

  Raises:
    ValueError: if the parameters are not floating point, the state is not theirs, the loss is not
      a scalar, its metrics are not a dict of arrays, it needs a key and there is none, or the
      minibatch has no example.
  """
  checks.floating_point(learner.params)
  checks.state_of("inner", jax.eval_shape(optimizer.init, learner.params), learner.opt_state)
  loss_fn = checks.loss(loss_fn)
  (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(learner.params, batch, key)
  update, opt_state = checks.with_extra_args(optimizer).update(
    grads,
    learner.opt_state,
    learner.params,
    value=loss,
    grad=grads,
    value_fn=lambda params: loss_fn(params, batch, key)[0],
  )
  if taken is not None:
    where = lambda new, old: jnp.where(taken, new, old)
    opt_state = jax.tree.map(where, opt_state, learner.opt_state)
    grads, update = jax.tree.map(lambda leaf: where(leaf, jnp.zeros_like(leaf)), (grads, update))
  params = optax.apply_updates(learner.params, update)
  return LearnerState(params, opt_state), Step(loss, grads, update, metrics)


def inner_update(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  learner: LearnerState,
  pool: Examples,
  schedule: jax.Array,
  key: PRNGKey | None = None,
  *,
  steps: jax.Array | None = None,
  remat: bool = False,
) -> tuple[LearnerState, Info]:
  """U^k(phi): one step for each row of the schedule, as a single scan (Equation 1).

  Args:
    loss_fn: as for `inner_step`.
    optimizer: any optax transformation.
    learner: phi and the optimizer's state at the start.
    pool: the task's examples `[n, ...]`.
    schedule: int32 `[k, b]`, the rows of the pool that each step sees.
    key: for a loss that draws random numbers; step i is given `fold_in(key, i)`, counted from 0.
    steps: how many steps are taken, on the first rows, as an int32; None for all. The further
      losses are those of the first minibatch at the final parameters.
    remat: recompute the activations of a step when differentiating through it, instead of keeping
      them in memory.

  Returns:
    The learner after the steps, and the `Info` of the `k` losses.

  Raises:
    ValueError: as `inner_step`, or if the schedule is not rows `[k, b]`.
  """

  def body(learner: LearnerState, turn: Turn) -> tuple[LearnerState, Info]:
    batch = take(pool, turn.rows)
    learner, step = inner_step(loss_fn, optimizer, learner, batch, turn.key, taken=turn.taken)
    return learner, Info(step.loss, step.metrics)

  step = jax.checkpoint(body) if remat else body
  return scan(step, learner, turns(loss_fn, schedule, key, steps), num_steps(schedule))


def scan(body: Callable[..., Any], carry: Any, xs: Any, length: int) -> Any:
  """The same as `jax.lax.scan`, but also of length 0 under `jax.disable_jit`.

  JAX raises an error there. With k = 1, no inner step comes before the tail.
  """
  with nullcontext() if length else jax.disable_jit(False):
    return jax.lax.scan(body, carry, xs, length)


def turns(
  loss_fn: LossFn, schedule: jax.Array, key: PRNGKey | None, steps: jax.Array | None
) -> Turn:
  """The turns of the inner steps on a schedule `[k, b]`, to be scanned over: see `inner_update`."""
  numbers, keys, taken = jnp.arange(num_steps(schedule)), None, None
  if key is not None and checks.asks_for_key(loss_fn):
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
  if steps is not None:
    taken = numbers < steps
    # A step that is not taken must not see what could make its gradient NaN: 0 * NaN is NaN.
    schedule = jnp.where(taken[:, None], schedule, schedule[:1])
  return Turn(schedule, keys, taken)


def forward_over_reverse(loss_fn: LossFn) -> LossFn:
  """Returns the same loss with a second derivative that is computed forward over reverse.

  The derivative of an inner step phi - alpha L'(phi) needs Hessian-vector products L''(phi) v. In
  reverse over reverse mode, each product keeps the tape of the inner gradient. Computed as the
  derivative of L' in the direction v, a product needs only phi and the minibatch, and recomputes
  the activations. The results agree up to rounding.

  Only derivatives of the value, with respect to the parameters, are defined; metrics have none. A
  derivative with respect to anything else, such as a number that the loss closes over, is refused.
  """
  asks_for_key, checked = checks.asks_for_key(loss_fn), checks.loss(loss_fn)

  def loss(params: Params, batch: Examples, key: PRNGKey | None = None) -> Any:
    # A custom derivative may not close over values of an outer `jit` or `vmap`: they are arguments.
    call, constants = traced(checked, params, batch, key)
    is_outer = lambda constant: isinstance(constant, jax.core.Tracer)
    outer = [constant for constant in constants if is_outer(constant)]

    def with_outer(params: Params, arguments: Any) -> Any:
      (batch, key), outer = arguments
      left = iter(outer)
      filled = [next(left) if is_outer(constant) else constant for constant in constants]
      return call(filled, params, batch, key)

    return _forward_over_reverse(with_outer)(params, ((batch, key), outer))

  return loss if asks_for_key else lambda params, batch: loss(params, batch)


def _forward_over_reverse(loss_fn: Callable[[Params, Any], Any]) -> Callable[[Params, Any], Any]:
  """The same for a loss with metrics that closes over nothing traced: all else is an argument."""
  differentiated = jax.value_and_grad(loss_fn, has_aux=True)

  @jax.custom_vjp
  def value_and_grad(params: Params, arguments: Any) -> tuple[Any, Params]:
    return differentiated(params, arguments)

  def keep_arguments(params: Params, arguments: Any) -> Any:
    values = _of_parameters_only(params, arguments)
    return value_and_grad(*values), values

  def hessian_vector(kept: Any, cotangents: Any) -> tuple[Params, None]:
    (params, arguments), ((of_value, _), direction) = kept, _instantiated(cotangents)
    params = jax.tree.map(_out_of_the_stack, params)
    grad = lambda params: differentiated(params, arguments)[1]
    grads, product = jax.jvp(grad, (params,), (direction,))
    # The value matters only to optimizers that use it, such as optax.polyak_sgd.
    return jax.tree.map(lambda p, g: p + (of_value * g).astype(p.dtype), product, grads), None

  value_and_grad.defvjp(keep_arguments, hessian_vector, symbolic_zeros=True)

  @jax.custom_vjp
  def loss(params: Params, arguments: Any) -> Any:
    return loss_fn(params, arguments)

  def keep_gradient(params: Params, arguments: Any) -> Any:
    return value_and_grad(*_of_parameters_only(params, arguments))

  def scale(grads: Params, cotangents: Any) -> tuple[Params, None]:
    of_value = _instantiated(cotangents[0])
    return jax.tree.map(lambda g: (of_value * g).astype(g.dtype), grads), None

  loss.defvjp(keep_gradient, scale, symbolic_zeros=True)
  return loss


def _of_parameters_only(params: Any, arguments: Any) -> tuple[Params, Any]:
  """The values of what a custom derivative is asked for.

  Raises:
    ValueError: if it is asked for derivatives with respect to the arguments.
  """
  if any(leaf.perturbed for leaf in jax.tree.leaves(arguments)):
    raise ValueError(
      "maml in mixed mode has derivatives with respect to the parameters only, and is asked here "
      "for one with respect to the data or to what the loss closes over: use mixed_mode=False"
    )
  return jax.tree.map(lambda leaf: leaf.value, (params, arguments))


def _instantiated(cotangents: Any) -> Any:
  """The same with arrays in place of JAX's symbolic zeros."""
  is_zero = lambda leaf: isinstance(leaf, SymbolicZero)
  as_array = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_zero(leaf) else leaf
  return jax.tree.map(as_array, cotangents, is_leaf=is_zero)


def _out_of_the_stack(leaf: jax.Array) -> jax.Array:
  """The same numbers, in a form that XLA computes once.

  In the backward pass of a scan, phi_i is a slice of the stack of all phi. XLA would put that slice
  of a scale or a bias into every elementwise loop that uses it, where it prevents vector
  instructions: on CPU a Hessian-vector product takes three times as long. A sum is not put there.
  """
  return leaf if leaf.ndim > 1 else jnp.sum(jnp.stack([leaf, jnp.zeros_like(leaf)]), axis=0)
