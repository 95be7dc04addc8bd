"""How many tasks run at once: functions from `MetaGradient` to `MetaGradient`.

An episode, and so everything in `Info`, gains a leading task axis `[T, ...]` on the way in; the
gradient and the Info that come out are means over the tasks (Equation 5).
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from metajax.gradients import Info, MetaGradient
from metajax.types import (
  Episode,
  InnerState,
  MakeEpisode,
  Params,
  PRNGKey,
  SampleEpisodes,
  SampleTask,
)


def sample_episodes(
  sample_task: SampleTask, make_episode: MakeEpisode, num_tasks: int
) -> SampleEpisodes:
  """A meta-batch of episodes: `key -> Episode` with leaves `[T, ...]`; it consumes the key.

  The key of task j is `fold_in(key, j)`, whatever T is.
  """

  def sample_one(key: PRNGKey) -> Episode:
    task_key, episode_key = jax.random.split(key)
    return make_episode(episode_key, sample_task(task_key))

  def sample(key: PRNGKey) -> Episode:
    return jax.vmap(lambda task: sample_one(jax.random.fold_in(key, task)))(jnp.arange(num_tasks))

  return sample


def batched(
  meta_gradient: MetaGradient, num_tasks: int, *, chunk: int | None = None
) -> MetaGradient:
  """All tasks at once under vmap, or `chunk` at a time, which bounds memory.

  Each of the `T` slots keeps an inner state of its own from meta-step to meta-step, never averaged
  and never reset.

  Args:
    meta_gradient: an estimator for one task.
    num_tasks: `T`, the meta-batch.
    chunk: how many tasks run together; None for all. It need not divide `T`.

  Raises:
    ValueError: if a size is below 1, or the chunk larger than the meta-batch.
  """
  if num_tasks < 1:
    raise ValueError(f"num_tasks must be at least 1, not {num_tasks}")
  if chunk is not None and not 1 <= chunk <= num_tasks:
    raise ValueError(f"chunk must be between 1 and num_tasks = {num_tasks}, not {chunk}")

  def init(params: Params) -> InnerState:
    repeat = lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], num_tasks, axis=0)
    return jax.tree.map(repeat, meta_gradient.init(params))

  def estimate(
    params: Params, inner_state: InnerState, episodes: Episode
  ) -> tuple[Params, InnerState, Info]:
    chex.assert_tree_shape_prefix((inner_state, episodes), (num_tasks,))

    def one(slot: tuple[InnerState, Episode]) -> tuple[Params, InnerState, Info]:
      return meta_gradient.estimate(params, *slot)

    # At chunk = T, lax.map would wrap the vmap in a loop of one turn.
    slots = (inner_state, episodes)
    each = chunk is None or chunk == num_tasks
    outputs = jax.vmap(one)(slots) if each else jax.lax.map(one, slots, batch_size=chunk)
    gradients, inner_state, infos = outputs
    return _mean(gradients), inner_state, _mean(infos)

  return MetaGradient(init, estimate)


def serial(meta_gradient: MetaGradient) -> MetaGradient:
  """One task after another, ONE inner state handed from each to the next, as in the paper's code.

  All tasks start from the same parameters.
  """

  def estimate(
    params: Params, inner_state: InnerState, episodes: Episode
  ) -> tuple[Params, InnerState, Info]:
    def body(
      carry: tuple[InnerState, Params], episode: Episode
    ) -> tuple[tuple[InnerState, Params], Info]:
      inner_state, total = carry
      gradient, inner_state, info = meta_gradient.estimate(params, inner_state, episode)
      return (inner_state, jax.tree.map(jnp.add, total, gradient)), info

    zeros = jax.tree.map(jnp.zeros_like, params)
    (inner_state, total), infos = jax.lax.scan(body, (inner_state, zeros), episodes)
    num_tasks = episodes.schedule.shape[0]
    return jax.tree.map(lambda leaf: leaf / num_tasks, total), inner_state, _mean(infos)

  return MetaGradient(meta_gradient.init, estimate)


def first_slot(inner_state: InnerState) -> InnerState:
  """One of the inner states that `batched` keeps, to start an evaluation from."""
  return jax.tree.map(lambda leaf: leaf[0], inner_state)


def _mean(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)
