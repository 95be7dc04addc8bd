"""The outer loop: a meta-gradient handed to any optax optimizer, many steps in one scan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax.gradients import Info, MetaGradient
from metajax.types import Episode, InnerState, Params, PRNGKey, SampleEpisodes, shapes


class MetaState(NamedTuple):
  """Everything a run carries; with the key it was started with, all that is needed to go on."""

  step: jax.Array  # int32, meta-steps done
  params: Params  # phi
  outer: Any  # the outer optimizer's state
  inner: InnerState  # what the meta-gradient carries from task to task


class MetaLearner(NamedTuple):
  """`init: params -> MetaState` and `step: (MetaState, episodes) -> (MetaState, Info)`."""

  init: Callable[[Params], MetaState]
  step: Callable[[MetaState, Episode], tuple[MetaState, Info]]


def meta_learner(
  meta_gradient: MetaGradient, optimizer: optax.GradientTransformation
) -> MetaLearner:
  """A meta-gradient and an outer optimizer make a learner.

  Args:
    meta_gradient: usually lifted over a meta-batch by `batched` or `serial`.
    optimizer: any optax transformation. For Algorithm 1's phi <- phi + epsilon (phi~ - phi), outer
      SGD of rate epsilon.

  `step` raises a ValueError if the gradient or the outer state has not the shapes that it should.
  """

  def init(params: Params) -> MetaState:
    return MetaState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params), meta_gradient.init(params)
    )

  def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Info]:
    gradient, inner, info = meta_gradient.estimate(state.params, state.inner, episodes)
    if shapes(gradient) != shapes(state.params):
      raise ValueError(
        "the gradient is not like the parameters: return one array for each, of its shape"
      )
    if shapes(state.outer) != shapes(jax.eval_shape(optimizer.init, state.params)):
      raise ValueError(
        "the outer state is not that of this optimizer for these parameters: start from what "
        "`init` returns for them"
      )
    updates, outer = optimizer.update(gradient, state.outer, state.params)
    params = optax.apply_updates(state.params, updates)
    return MetaState(state.step + 1, params, outer, inner), info

  return MetaLearner(init, step)


def run(
  learner: MetaLearner, sample_episodes: SampleEpisodes, num_steps: int
) -> Callable[[MetaState, PRNGKey], tuple[MetaState, Info]]:
  """Many meta-steps as one scan, sampling included.

  The key of meta-step i is `fold_in(key, i)`, with i from the state: `run(5)` is `run(2)` then
  `run(3)` with the same key.

  Args:
    learner: from `meta_learner`.
    sample_episodes: `key -> Episode`, leaves `[T, ...]`.
    num_steps: meta-steps in one call.

  Returns:
    `(state, key) -> (state, infos)`, to be jitted; the infos' leaves are `[num_steps, ...]`.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  if num_steps < 1:
    raise ValueError(f"num_steps must be at least 1, not {num_steps}")

  def run_steps(state: MetaState, key: PRNGKey) -> tuple[MetaState, Info]:
    def body(state: MetaState, _: None) -> tuple[MetaState, Info]:
      return learner.step(state, sample_episodes(jax.random.fold_in(key, state.step)))

    return jax.lax.scan(body, state, length=num_steps)

  return run_steps


class Sweep(NamedTuple):
  """Runs that differ in values or seeds, side by side: all leaves are `[R, ...]`, for R runs.

  `init: (values, params) -> MetaState` and `run: (values, MetaState, keys) -> (MetaState, Info)`.
  """

  init: Callable[[Any, Params], MetaState]
  run: Callable[[Any, MetaState, PRNGKey], tuple[MetaState, Info]]


def sweep(
  make_learner: Callable[[Any], MetaLearner], sample_episodes: SampleEpisodes, num_steps: int
) -> Sweep:
  """Many runs at once under vmap, each the same as if it ran alone.

  Args:
    make_learner: from a run's values, say a pair of learning rates, to its learner. The values are
      traced: they may be rates and weights, but not sizes.
    sample_episodes: `key -> Episode`, for all; equal keys draw equal tasks.
    num_steps: meta-steps in one call of `Sweep.run`.

  Raises:
    ValueError: if `num_steps` is below 1.
  """

  def init(values: Any, params: Params) -> MetaState:
    return make_learner(values).init(params)

  def run_one(values: Any, state: MetaState, key: PRNGKey) -> tuple[MetaState, Info]:
    return run(make_learner(values), sample_episodes, num_steps)(state, key)

  if num_steps < 1:
    raise ValueError(f"num_steps must be at least 1, not {num_steps}")
  return Sweep(jax.vmap(init), jax.vmap(run_one))
