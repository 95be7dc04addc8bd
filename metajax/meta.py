"""The outer loop: a meta-gradient drives any optax optimizer, over many steps in one scan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax import checks
from metajax.execution import Execution
from metajax.gradients import Info, MetaGradient
from metajax.types import (
  Episode,
  Examples,
  InnerState,
  MakeEpisode,
  Params,
  PRNGKey,
  SampleTask,
)


class MetaState(NamedTuple):
  """The whole state of a run. With the key of the run, it is all that is needed to resume it."""

  step: jax.Array  # int32, the number of meta-steps done
  params: Params  # phi
  outer: Any  # the outer optimizer's state
  inner: InnerState  # what the meta-gradient carries from task to task


class MetaLearner(NamedTuple):
  """A meta-learning algorithm with its optimizers and its execution.

  Attributes:
    init: `params -> MetaState`.
    step: `(MetaState, episodes) -> (MetaState, Info)`, one meta-step on episodes `[T, ...]`.
    adapt: `(MetaState, examples, schedule, key=None) -> params`, adapts a copy of the parameters to
      one task by an inner step for each row of the schedule (int32 `[k, b]`), such as
      `cycling(k, b)(key, n)` for n examples; the state stays as it was. The key is for a loss that
      draws random numbers.
    execution: how the tasks of a meta-step are sampled and run.
  """

  init: Callable[[Params], MetaState]
  step: Callable[[MetaState, Episode], tuple[MetaState, Info]]
  adapt: Callable[..., Params]
  execution: Execution


def meta_learner(
  meta_gradient: MetaGradient, optimizer: optax.GradientTransformation, execution: Execution
) -> MetaLearner:
  """Makes a learner from a meta-gradient, an outer optimizer and an execution.

  Args:
    meta_gradient: an estimator for one task, such as `reptile`, `fomaml` or `maml`.
    optimizer: any optax transformation without a line search. If it asks for more than the
      gradient, it is given the last loss L_k (`value`), averaged over the tasks that were not
      skipped, and infinite if all were, and the meta-gradient (`grad`). Algorithm 1's
      phi <- phi + epsilon (phi~ - phi) is outer SGD of rate epsilon.
    execution: `vmapped`, `serial` or `sharded`, with the number of tasks of a meta-step.

  Raises:
    ValueError: if an argument is of another type; in `init`, if a parameter is not floating point,
      or the optimizer returns a gradient as it is, to be added; in `step`, if a gradient or the
      outer state does not have the right shapes.
  """
  checks.is_a(MetaGradient, "meta_gradient", meta_gradient, "give one, such as maml(loss, inner)")
  checks.is_optimizer(optimizer)
  checks.is_a(Execution, "execution", execution, "give one, such as vmapped(4)")
  lifted = execution.lift(meta_gradient)

  def init(params: Params) -> MetaState:
    checks.floating_point(params)
    checks.no_raw_gradients("outer", optimizer, params)
    return MetaState(jnp.zeros((), jnp.int32), params, optimizer.init(params), lifted.init(params))

  def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Info]:
    check_state(state)
    gradient, inner, info = lifted.estimate(state.params, state.inner, episodes)
    checks.state_of("outer", jax.eval_shape(optimizer.init, state.params), state.outer)
    updates, outer = checks.with_extra_args(optimizer).update(
      gradient, state.outer, state.params, value=_last_loss(info), grad=gradient, value_fn=_no_loss
    )
    params = optax.apply_updates(state.params, updates)
    return MetaState(state.step + 1, params, outer, inner), info

  def adapt(
    state: MetaState, examples: Examples, schedule: jax.Array, key: PRNGKey | None = None
  ) -> Params:
    check_state(state)
    inner_state = execution.one(state.inner)
    return meta_gradient.adapt(state.params, inner_state, examples, schedule, key)

  return MetaLearner(init, step, adapt, execution)


def check_state(state: Any) -> None:
  """Checks that a state was given, and not parameters or a record."""
  checks.is_a(MetaState, "state", state, "give learner.init(params), or record.state after train")


def _last_loss(info: Info) -> jax.Array:
  """L_k, averaged over the tasks that were not skipped; those that were have a loss of zero."""
  if info.skipped is None:
    return info.losses[-1]
  counted = 1 - info.skipped
  return jnp.where(counted > 0, info.losses[-1] / counted, jnp.inf)


def _no_loss(params: Params) -> jax.Array:
  raise ValueError(
    "the outer optimizer evaluates the loss at other parameters, which a meta-gradient cannot do: "
    "use one without a line search"
  )


def run(
  learner: MetaLearner, sample_task: SampleTask, make_episode: MakeEpisode, num_steps: int
) -> Callable[[MetaState, PRNGKey], tuple[MetaState, Info]]:
  """Runs many meta-steps, sampling included, as one scan.

  The key of meta-step i is `fold_in(key, i)`, where i is the state's step. So a run of 5 steps
  equals a run of 2 followed by a run of 3 with the same key.

  Args:
    learner: from `meta_learner`.
    sample_task: `key -> Task`.
    make_episode: `(key, Task) -> Episode`.
    num_steps: the number of meta-steps in one call.

  Returns:
    `(state, key) -> (state, infos)`, to be jitted; the leaves of infos are `[num_steps, ...]`.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  checks.at_least_one(num_steps=num_steps)
  sample_episodes = learner.execution.sample(sample_task, make_episode)

  def run_steps(state: MetaState, key: PRNGKey) -> tuple[MetaState, Info]:
    check_state(state)
    checks.uses_key(sample_task, key)

    def body(state: MetaState, _: None) -> tuple[MetaState, Info]:
      return learner.step(state, sample_episodes(jax.random.fold_in(key, state.step)))

    return jax.lax.scan(body, state, length=num_steps)

  return run_steps


class Sweep(NamedTuple):
  """R runs side by side that differ in values or seeds.

  All arrays that the functions take and return have a leading axis R.

  Attributes:
    init: `(values, params) -> MetaState`.
    run: `(values, MetaState, keys) -> (MetaState, Info)`.
  """

  init: Callable[[Any, Params], MetaState]
  run: Callable[[Any, MetaState, PRNGKey], tuple[MetaState, Info]]


def sweep(
  make_learner: Callable[[Any], MetaLearner],
  sample_task: SampleTask,
  make_episode: MakeEpisode,
  num_steps: int,
) -> Sweep:
  """Does many runs at once under vmap; each gives the same result as if it ran alone.

  Args:
    make_learner: from the values of a run, such as a pair of learning rates, to its learner. The
      values are traced: they may be rates, but not sizes.
    sample_task: `key -> Task`, for all runs; equal keys draw equal tasks.
    make_episode: `(key, Task) -> Episode`, for all runs.
    num_steps: the number of meta-steps in one call of `Sweep.run`.

  Returns:
    The `Sweep`, whose functions are to be jitted.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  checks.at_least_one(num_steps=num_steps)

  def init(values: Any, params: Params) -> MetaState:
    return make_learner(values).init(params)

  def run_one(values: Any, state: MetaState, key: PRNGKey) -> tuple[MetaState, Info]:
    return run(make_learner(values), sample_task, make_episode, num_steps)(state, key)

  return Sweep(jax.vmap(init), jax.vmap(run_one))
