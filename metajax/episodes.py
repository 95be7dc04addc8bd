"""How a task becomes an episode: the minibatch of each of its k losses (Section 6.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metajax import checks
from metajax.types import Episode, MakeEpisode, PRNGKey, Task, num_examples, take

Schedule = Callable[[PRNGKey, int], jax.Array]  # (key, n) -> int32 rows [k, b] of n examples


def cycling(num_batches: int, batch_size: int) -> Schedule:
  """Cuts minibatches from an endless stream of passes, each a new shuffle of all examples.

  Every example is seen once before any is seen again. A minibatch may straddle two passes.

  Args:
    num_batches: `k`, the minibatches of one episode.
    batch_size: `b`, the examples of one minibatch.

  Returns:
    `(key, n) -> rows`, int32 `[k, b]`; it consumes the key.

  Raises:
    ValueError: if a size is below 1, or, when the schedule is drawn, if there is no example.
  """
  checks.at_least_one(num_batches=num_batches, batch_size=batch_size)

  def schedule(key: PRNGKey, n: int) -> jax.Array:
    checks.is_count(n)
    if n < 1:
      raise ValueError(f"minibatches cannot be drawn from {n} examples: raise the shots")
    passes = -(-num_batches * batch_size // n)
    shuffles = jax.vmap(lambda key: jax.random.permutation(key, n))(jax.random.split(key, passes))
    rows = shuffles.reshape(-1)[: num_batches * batch_size].reshape(num_batches, batch_size)
    return rows.astype(jnp.int32)

  return schedule


def replacement(num_batches: int, batch_size: int) -> Schedule:
  """Draws every minibatch anew, without duplicates in it and independently of earlier ones.

  With full batches, `cycling` and `replacement` coincide.

  Args:
    num_batches: `k`, the minibatches of one episode.
    batch_size: `b`, the examples of one minibatch.

  Returns:
    `(key, n) -> rows`, int32 `[k, b]`; it consumes the key.

  Raises:
    ValueError: if a size is below 1, or, when the schedule is drawn, if `b > n`.
  """
  checks.at_least_one(num_batches=num_batches, batch_size=batch_size)

  def schedule(key: PRNGKey, n: int) -> jax.Array:
    checks.is_count(n)
    if batch_size > n:
      raise ValueError(
        f"a minibatch of {batch_size} cannot be drawn without duplicates from {n} examples: "
        "lower the batch size or raise the shots"
      )
    draw = lambda key: jax.random.permutation(key, n)[:batch_size].astype(jnp.int32)
    return jax.vmap(draw)(jax.random.split(key, num_batches))

  return schedule


def varying_shots(
  num_batches: int, batch_size: int, *, ways: int = 1, at_least: int = 1
) -> Schedule:
  """Like `cycling`, over a part of the examples whose size differs from task to task.

  The number of shots is drawn uniformly, from `at_least` to the number that the task has. That many
  examples of each class, drawn at random, are used, and the others are not.

  Args:
    num_batches: `k`, the minibatches of one episode.
    batch_size: `b`, the examples of one minibatch.
    ways: the classes of a task. Its examples must be sorted by class, with equally many of each, as
      `few_shot.sample_task` draws them. With 1, any of all examples are used, whatever their class.
    at_least: the fewest shots.

  Returns:
    `(key, n) -> rows`, int32 `[k, b]`; it consumes the key.

  Raises:
    ValueError: if a size is below 1, or, when the schedule is drawn, if there are fewer shots, or
      `n` is not a multiple of the ways.
  """
  checks.at_least_one(num_batches=num_batches, batch_size=batch_size, ways=ways, at_least=at_least)

  def schedule(key: PRNGKey, n: int) -> jax.Array:
    checks.is_count(n)
    if n % ways or n // ways < at_least:
      raise ValueError(
        f"{n} examples are not at least {at_least} of each of {ways} classes: change ways, lower "
        "at_least or raise the shots"
      )
    size_key, part_key, order_key = jax.random.split(key, 3)
    shots = jax.random.randint(size_key, (), at_least, n // ways + 1)
    columns = jnp.tile(jnp.arange(n // ways), (ways, 1))
    ranks = jax.random.permutation(part_key, columns, axis=1, independent=True)
    takes_part = ranks.reshape(n) < shots
    passes = -(-num_batches * batch_size // (ways * at_least))  # no more than these are begun
    scores = jnp.where(takes_part, jax.random.uniform(order_key, (passes, n)), 2.0)
    shuffles = jnp.argsort(scores, axis=1).astype(jnp.int32)  # those that take part come first
    place = jnp.arange(num_batches * batch_size)
    rows = shuffles[place // (ways * shots), place % (ways * shots)]
    return rows.reshape(num_batches, batch_size)

  return schedule


def varying_steps(make_episode: MakeEpisode, *, at_least: int = 1) -> MakeEpisode:
  """Lets the number of inner steps differ from task to task; see `Episode.steps`.

  It is drawn uniformly, from `at_least` to the k - 1 steps of the episode. A task takes as much
  time as if it took all of them.

  Args:
    make_episode: from `shared_tail` or `separate_tail`.
    at_least: the fewest steps.

  Returns:
    `(key, task) -> Episode`; it consumes the key.

  Raises:
    ValueError: if `at_least` is below 1, or, when an episode is made, if it has fewer steps.
  """
  checks.at_least_one(at_least=at_least)

  def with_steps(key: PRNGKey, task: Task) -> Episode:
    episode = make_episode(key, task)
    most = episode.schedule.shape[0]
    if most < at_least:
      raise ValueError(
        f"an episode has {most} inner steps before its tail, fewer than at_least={at_least}: lower "
        "it, or draw more minibatches"
      )
    number_key = jax.random.fold_in(key, 0x73746570)  # independent of the episode's other keys
    return episode._replace(steps=jax.random.randint(number_key, (), at_least, most + 1))

  return with_steps


def shared_tail(schedule: Schedule) -> MakeEpisode:
  """Takes the last minibatch from the same examples as the others (Section 6.3).

  Args:
    schedule: draws all `k` minibatches from `task.train`.

  Returns:
    `(key, task) -> Episode`; it consumes the key.
  """

  def make_episode(key: PRNGKey, task: Task) -> Episode:
    checks.is_task(task)
    rows = schedule(key, num_examples(task.train))
    return Episode(task.train, rows[:-1], take(task.train, rows[-1]), loss_key(key))

  return make_episode


def separate_tail(schedule: Schedule) -> MakeEpisode:
  """Takes all of `task.test` as the last minibatch, which no earlier one overlaps (Section 6.3).

  Args:
    schedule: draws `k` minibatches from `task.train`, of which the tail replaces the last.

  Returns:
    `(key, task) -> Episode`; it consumes the key.

  Raises:
    ValueError: when an episode is made, if `k = 1`, which leaves no step before the tail, or the
      task has no test examples.
  """

  def make_episode(key: PRNGKey, task: Task) -> Episode:
    checks.is_task(task)
    rows = schedule(key, num_examples(task.train))
    if rows.shape[0] < 2:
      raise ValueError(
        "a separate tail is the last of the k minibatches, so k = 1 leaves none to adapt on: "
        "use num_batches >= 2, or shared_tail"
      )
    if num_examples(task.test) == 0:
      raise ValueError(
        "a separate tail is the task's test examples, and it has none: raise test_shots"
      )
    return Episode(task.train, rows[:-1], task.test, loss_key(key))

  return make_episode


def loss_key(key: PRNGKey) -> PRNGKey:
  """The key for losses that draw random numbers, from the one that minibatches are drawn with.

  With `fold_in`, it is independent of the keys that a schedule splits from the same key.
  """
  return jax.random.fold_in(key, 0x6C6F7373)
