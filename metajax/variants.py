"""Further algorithms of the family, as compositions of meta-gradients and inner optimizers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metajax import checks
from metajax.gradients import MetaGradient, appended, maml, reptile, tail_key
from metajax.inner import (
  Carried,
  Info,
  LearnerState,
  Turn,
  begin_task,
  carried,
  end_task,
  forward_over_reverse,
  inner_step,
  inner_update,
  scan,
  turns,
)
from metajax.losses import cross_entropy
from metajax.meta import MetaLearner, MetaState
from metajax.types import (
  Apply,
  Episode,
  Examples,
  InnerState,
  LossFn,
  Params,
  Predict,
  PRNGKey,
  Task,
  leaf_name,
  num_examples,
  num_steps,
  take,
)


def only(
  optimizer: optax.GradientTransformation, adapted: Callable[[str], bool]
) -> optax.GradientTransformation:
  """An inner optimizer that moves some of the parameters and leaves the others as they are.

  With it, `maml` becomes ANIL (Raghu et al. 2020), which adapts the last layer only, and BOIL (Oh
  et al. 2021), which adapts everything else. All parameters are still meta-learned:

  >>> anil = metajax.maml(loss_fn, only(optax.sgd(0.1), lambda name: "Dense" in name))
  >>> boil = metajax.maml(loss_fn, only(optax.sgd(0.1), lambda name: "Dense" not in name))

  `optax.masked(optimizer, mask)` is not the same: it passes the gradient of the other parameters
  through, which would then be added to them.

  Args:
    optimizer: moves the adapted parameters. If it is `carried`, so is the result.
    adapted: from the name of a parameter, such as `Dense_0/kernel`, to whether it is adapted.

  Raises:
    ValueError: if `adapted` is no function; when a state is made, if no parameter is adapted.
  """

  checks.is_optimizer(optimizer)
  if not callable(adapted):
    raise ValueError(
      f"adapted must be a function of names, such as lambda name: {adapted!r} in name"
    )

  def labels(params: Params) -> Any:
    chosen = jax.tree.map_with_path(lambda path, _: bool(adapted(leaf_name(path))), params)
    if not any(jax.tree.leaves(chosen)):
      names = ", ".join(leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
      raise ValueError(f"no parameter would be adapted: choose some of {names}")
    return chosen

  adapting = checks.with_extra_args(optimizer)
  moving = optax.partition({True: adapting, False: optax.set_to_zero()}, labels)
  return carried(moving) if isinstance(optimizer, Carried) else moving


class WithRates(NamedTuple):
  """The parameters of a learner that also learns its inner rates.

  Attributes:
    params: phi.
    rates: alpha; for each array of parameters, an array of rates of the same shape, or of one that
      broadcasts to it.
  """

  params: Params
  rates: Any


def with_rates(params: Params, rate: float) -> WithRates:
  """Parameters with equal rates, one for each number, to begin Meta-SGD with."""
  return WithRates(params, jax.tree.map(lambda leaf: jnp.full_like(leaf, rate), params))


def meta_sgd(loss_fn: LossFn, *, outer_loss: LossFn | None = None, **options: bool) -> MetaGradient:
  """Meta-SGD (Li et al. 2017): MAML that also learns the inner rates, one for each number in phi.

  The inner step is phi_{i+1} = phi_i - alpha * L_i'(phi_i), elementwise, and the meta-gradient is
  that of L_k(phi_k) with respect to both phi and alpha. A rate may also be a scalar, which a whole
  array of parameters shares. This resembles the rates of Antoniou et al. (2019), who learn one for
  each layer and inner step.

  Args:
    loss_fn: as for `maml`, a function of phi.
    outer_loss: L_k, if it is another function than the loss of the inner steps.
    **options: of `maml`.

  Returns:
    An estimator of the gradient of `WithRates`. For its evaluations, `params.params` is what the
    network takes: `lambda params, inputs: model.apply(params.params, inputs)`.
  """

  def init(params: WithRates) -> tuple[()]:
    checks.is_a(WithRates, "params", params, "give variants.with_rates(params, rate)")
    return ()

  def update(
    grads: WithRates, state: tuple[()], params: WithRates | None = None
  ) -> tuple[WithRates, tuple[()]]:
    if params is None:
      raise ValueError("the update needs the parameters, which hold the rates")
    steps = jax.tree.map(lambda rate, grad: -rate * grad, params.rates, grads.params)
    return WithRates(steps, jax.tree.map(jnp.zeros_like, params.rates)), state

  def of_params(loss_fn: LossFn) -> LossFn:
    checked = checks.loss(loss_fn)

    def loss(params: WithRates, batch: Examples, key: PRNGKey | None = None) -> Any:
      return checked(params.params, batch, key)

    return loss

  optimizer = optax.GradientTransformation(init, update)
  return maml(of_params(loss_fn), optimizer, outer_loss=of_params(outer_loss or loss_fn), **options)


class WithContext(NamedTuple):
  """The parameters of a network that takes a context, and that context.

  Attributes:
    params: theta, shared by all tasks.
    context: c, zero at the start of every task.
  """

  params: Params
  context: Any


def cavia(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  context: Any,
  *,
  outer_loss: LossFn | None = None,
  **options: bool,
) -> MetaGradient:
  """CAVIA (Zintgraf et al. 2019): MAML whose inner steps move context parameters only.

  The inner step is c_{i+1} = c_i - alpha dL_i(theta, c_i)/dc from c_1 = 0, and the meta-gradient
  is dL_k(theta, c_k)/dtheta.

  Args:
    loss_fn: as for `maml`, a function of `WithContext`.
    optimizer: the inner optimizer, which moves the context.
    context: a pytree of arrays or shapes like the context of one task.
    outer_loss: L_k, if it is another function than the loss of the inner steps.
    **options: of `maml`.

  Returns:
    An estimator of the gradient of theta. Its `adapt` returns `WithContext`.
  """
  inner = only(optimizer, lambda name: name.startswith("context"))
  whole = maml(loss_fn, inner, outer_loss=outer_loss, **options)
  shapes = jax.eval_shape(lambda context: context, context)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def init(params: Params) -> InnerState:
    return whole.init(WithContext(params, zeros))

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    gradient, after, info = whole.estimate(WithContext(params, zeros), inner_state, episode)
    return gradient.params, after, info

  def adapt(params: Params, *arguments: Any) -> Params:
    return whole.adapt(WithContext(params, zeros), *arguments)

  return MetaGradient(init, estimate, adapt)


def towards_start(strength: float | jax.Array) -> optax.GradientTransformation:
  """A gradient transformation that draws the parameters towards those that the task began with.

  It adds lambda (phi_i - phi) to the gradient, which is the derivative of the regularizer
  lambda / 2 ||phi_i - phi||^2. MAML differentiates through phi in it too. Do not hand its state
  from task to task by `carried`, since it holds the phi of the first one.

  >>> inner = optax.chain(towards_start(0.5), optax.sgd(0.1))

  Args:
    strength: lambda.
  """

  def init(params: Params) -> Params:
    return params

  def update(grads: Params, start: Params, params: Params | None = None) -> tuple[Params, Params]:
    if params is None:
      raise ValueError("the update needs the parameters")
    pulled = lambda grad, now, before: grad + (strength * (now - before)).astype(grad.dtype)
    return jax.tree.map(pulled, grads, params, start), start

  return optax.GradientTransformation(init, update)


def imaml(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  strength: float,
  *,
  outer_loss: LossFn | None = None,
  iterations: int = 10,
) -> MetaGradient:
  """Implicit MAML (Rajeswaran et al. 2019), in memory that does not grow with k.

  The inner steps minimize L(psi) + lambda / 2 ||psi - phi||^2, with L the mean of the losses of the
  minibatches. At the minimum psi, the meta-gradient is (I + L''(psi) / lambda)^-1 L_k'(psi), which
  conjugate gradients solve for. It is exact in the limit of many inner steps on the whole pool. If
  a minibatch is as large as the pool, L'' is computed from the first one only, which must then hold
  each example once, as it does with `cycling` and `replacement`.

  Args:
    loss_fn: as for `maml`, but without a derivative rule for reverse mode only (`jax.custom_vjp`);
      with a key, L'' has the key of L_k.
    optimizer: the inner optimizer, which is given the gradient of the loss and the regularizer. It
      must move all parameters, and come to rest where that gradient is zero. So it has no weight
      decay, and does not look at the loss itself, as a line search does.
    strength: lambda, positive.
    outer_loss: L_k, if it is another function than the loss of the inner steps.
    iterations: of conjugate gradients, at most.

  Raises:
    ValueError: if lambda is not positive, there is no iteration, or the optimizer is `carried`; in
      `init`, if the optimizer leaves a parameter as it is.
  """
  checks.at_least_one(iterations=iterations)
  if isinstance(optimizer, Carried):
    raise ValueError(
      "the inner steps of imaml begin anew in each task: give the optimizer without carried"
    )
  if not isinstance(strength, jax.core.Tracer) and not strength > 0:
    raise ValueError(f"strength must be positive, not {strength}")
  inner = optax.chain(towards_start(strength), optimizer)
  of_batch, last_loss = checks.loss(loss_fn), checks.loss(outer_loss or loss_fn)
  plain = reptile(loss_fn, inner)  # begins and adapts alike

  def init(params: Params) -> InnerState:
    state = plain.init(params)
    checks.moves_everything(inner, params)
    return state

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    pool, schedule, tail, step_key, steps = episode
    key, start = tail_key(episode), begin_task(inner, params, inner_state)
    learner, info = inner_update(loss_fn, inner, start, pool, schedule, step_key, steps=steps)
    of_tail = jax.value_and_grad(last_loss, has_aux=True)
    (last, metrics), gradient = of_tail(learner.params, tail, key)
    whole = schedule.shape[1] == num_examples(pool)
    each = (
      turns(loss_fn, schedule[:1], None, None) if whole else turns(loss_fn, schedule, None, steps)
    )

    def slope(params: Params) -> Params:
      """L', in memory that does not grow with the number of minibatches."""

      def add(total: Params, turn: Turn) -> tuple[Params, None]:
        grads = jax.grad(of_batch, has_aux=True)(params, take(pool, turn.rows), key)[0]
        weight = 1.0 if turn.taken is None else turn.taken
        return jax.tree.map(lambda t, g: t + weight * g, total, grads), None

      total, _ = scan(add, jax.tree.map(jnp.zeros_like, params), each, len(each.rows))
      number = len(each.rows) if each.taken is None else jnp.sum(each.taken)
      return jax.tree.map(lambda t: t / jnp.maximum(number, 1), total)

    def product(vector: Params) -> Params:
      curvature = jax.jvp(slope, (learner.params,), (vector,))[1]
      return jax.tree.map(lambda v, c: v + (c / strength).astype(v.dtype), vector, curvature)

    vector, as_params = ravel_pytree(gradient)  # cg refuses arrays whose vmapped axes differ
    times = lambda vector: ravel_pytree(product(as_params(vector)))[0]
    solution, _ = jax.scipy.sparse.linalg.cg(times, vector, maxiter=iterations)
    # Where the gradient is not finite, cg would return the zeros that it begins with.
    solution = jnp.where(jnp.isfinite(jnp.vdot(vector, vector)), solution, jnp.nan)
    return as_params(solution), end_task(inner, learner), appended(info, last, metrics)

  return plain._replace(init=init, estimate=estimate)


def multi_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  weights: Sequence[float] | jax.Array | np.ndarray,
  *,
  outer_loss: LossFn | None = None,
  mixed_mode: bool = True,
) -> MetaGradient:
  """MAML with a loss of the tail after every inner step, as in MAML++ (Antoniou et al. 2019).

  The meta-gradient is d/dphi of w_1 L(phi_2) + ... + w_{k-1} L(phi_k), with L the loss of the tail
  and phi_{i+1} the parameters after i inner steps. The weights [0, ..., 0, 1] are MAML. If a task
  takes fewer steps than others (`Episode.steps`), its last parameters count for the rest. If L
  draws random numbers, it draws the same ones after every step.

  Args:
    loss_fn: as for `maml`.
    optimizer: the inner optimizer.
    weights: `[k - 1]`. Antoniou et al. begin with equal weights and shift them to the last one.
    outer_loss: the loss of the tail, if it is another function than that of the inner steps.
    mixed_mode: as for `maml`.

  Raises:
    ValueError: if the weights are not a finite vector; in `estimate`, if there are not `k - 1`.
  """
  coefficients = checks.finite_vector(weights)
  whole = maml(loss_fn, optimizer, outer_loss=outer_loss, mixed_mode=mixed_mode)
  inner_loss = forward_over_reverse(loss_fn) if mixed_mode else loss_fn
  last_loss = checks.loss(outer_loss or loss_fn)

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    k = num_steps(episode.schedule) + 1
    if coefficients.size != k - 1:
      raise ValueError(
        f"{coefficients.size} weights for {k - 1} inner steps: give one for each of them"
      )
    key = tail_key(episode)

    def advance(learner: LearnerState, turn: Turn) -> tuple[LearnerState, tuple[Info, Info]]:
      batch = take(episode.pool, turn.rows)
      learner, step = inner_step(inner_loss, optimizer, learner, batch, turn.key, taken=turn.taken)
      of_tail = last_loss(learner.params, episode.tail, key)
      return learner, (Info(step.loss, step.metrics), Info(*of_tail))

    def objective(params: Params) -> tuple[jax.Array, tuple[InnerState, Info]]:
      start = begin_task(optimizer, params, inner_state)
      each = turns(inner_loss, episode.schedule, episode.key, episode.steps)
      learner, (info, of_tail) = jax.lax.scan(advance, start, each)
      total = jnp.sum(jnp.asarray(coefficients, of_tail.losses.dtype) * of_tail.losses)
      last = jax.tree.map(lambda leaf: leaf[-1], of_tail)
      return total, (end_task(optimizer, learner), appended(info, last.losses, last.metrics))

    gradient, (inner_state, info) = jax.grad(objective, has_aux=True)(params)
    return gradient, inner_state, info

  return whole._replace(estimate=estimate)


def switched(first: MetaLearner, then: MetaLearner, at: int) -> MetaLearner:
  """Learns by one learner in the first meta-steps, and by another one from then on.

  MAML++ (Antoniou et al. 2019) begins with first-order gradients, which are cheaper, and with
  losses after every inner step, which are steadier, and ends in MAML:

  >>> early, late = (
  ...   metajax.meta_learner(make(loss_fn, inner), outer, execution)
  ...   for make in (metajax.fomaml, metajax.maml)
  ... )
  >>> learner = switched(early, late, at=5_000)

  The states and the logs of both learners must have the same structure and shapes. The learner
  adapts as the second one.

  Args:
    first: for the meta-steps before `at`.
    then: for the others.
    at: the number of meta-steps after which the learners are switched.

  Raises:
    ValueError: if `at` is negative; in `init`, if the states of the learners differ in structure;
      in `step`, if they differ in a shape, or in what they log.
  """
  if at < 0:
    raise ValueError(f"at must be a number of meta-steps, not {at}")

  def init(params: Params) -> MetaState:
    one, other = first.init(params), then.init(params)
    if str(jax.tree.structure(one)) != str(jax.tree.structure(other)):
      raise ValueError(
        "learners that are switched must have the same state: give both the same outer optimizer, "
        "execution and inner optimizer"
      )
    return other

  def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Info]:
    logs = [jax.eval_shape(one.step, state, episodes)[1] for one in (first, then)]
    if logs[0] != logs[1]:
      raise ValueError(
        "learners that are switched must log the same: give both the same loss, number of losses, "
        "metrics and skip_nonfinite"
      )
    return jax.lax.cond(state.step < at, first.step, then.step, state, episodes)

  return then._replace(init=init, step=step)


def nearest_prototype(embed: Apply, ways: int) -> Predict:
  """Predicts by the distance to the mean embedding of each class (Snell et al. 2017).

  The outputs are -||f(x) - c_j||^2, with c_j the mean of f over the training examples of class j.
  Where a class has none, the output is the lowest number there is, so that it is never predicted.
  All examples are embedded in one forward pass, as in the authors' code.

  Args:
    embed: f, `(params, inputs [n, ...]) -> embeddings [n, d]`, such as a network with d outputs.
    ways: the number of classes of a task.

  Returns:
    `(params, task) -> outputs [m, ways]` on the `m` test inputs.
  """
  checks.is_apply(embed)
  checks.at_least_one(ways=ways)

  def predict(params: Params, task: Task) -> jax.Array:
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), task.train.inputs, task.test.inputs)
    train, test = jnp.split(embed(params, both), [num_examples(task.train)])
    members = jax.nn.one_hot(task.train.targets, ways, axis=0)  # [ways, n]
    sizes = jnp.sum(members, axis=1)
    sums = jnp.matmul(members, train, precision="highest")  # exact, as the queries are
    prototypes = sums / jnp.maximum(sizes, 1)[:, None]
    apart = jnp.sum(jnp.square(test[:, None] - prototypes), axis=-1)
    return jnp.where(sizes > 0, -apart, jnp.finfo(apart.dtype).min)

  return predict


def prototypical(embed: Apply, ways: int) -> MetaGradient:
  """Prototypical networks (Snell et al. 2017), metric learning as a yardstick for the family.

  There is no inner loop: the gradient is that of the mean cross-entropy of the tail, by
  `nearest_prototype` with the whole pool as training examples, whatever the schedule. So the tail
  must be separate from the pool, and of classes that have examples there: an example of any other
  class makes the loss huge or infinite. Evaluate it with `nearest_prototype` too; its `adapt`
  returns the parameters as they are.

  Args:
    embed: f, `(params, inputs [n, ...]) -> embeddings [n, d]`.
    ways: the number of classes of a task.
  """
  predict = nearest_prototype(embed, ways)

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    task = Task(episode.pool, episode.tail)
    loss_fn = cross_entropy(lambda params, _: predict(params, task), reduction="mean")
    loss, gradient = jax.value_and_grad(loss_fn)(params, episode.tail)
    return gradient, inner_state, Info(loss[None])

  def init(params: Params) -> InnerState:
    checks.floating_point(params)
    return ()

  return MetaGradient(init, estimate, lambda params, *_: params)
