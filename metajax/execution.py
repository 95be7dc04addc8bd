"""How a meta-batch of T tasks is sampled, run and averaged.

An `Execution` turns an estimator for one task into one for T tasks. Episodes gain a leading task
axis `[T, ...]`; the gradient and the Info are means over the tasks (Equation 5).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax import checks
from metajax.gradients import Info, MetaGradient
from metajax.inner import finite_or_before
from metajax.programs import traced
from metajax.spread import (
  chunk_or_default,
  first,
  mesh_and_spec,
  num_slots,
  over_tasks,
  padded,
  repeated,
)
from metajax.types import (
  Episode,
  InnerState,
  MakeEpisode,
  Params,
  PRNGKey,
  SampleEpisodes,
  SampleTask,
)


class Execution(NamedTuple):
  """How many tasks a meta-step has, and how they are run.

  Attributes:
    num_tasks: `T`, the tasks of a meta-batch.
    lift: from a `MetaGradient` for one task to a `MetaGradient` for episodes `[T, ...]`.
    sample: `(sample_task, make_episode) -> (key -> episodes [T, ...])`, drawn on the devices that
      will use them. The key of task j is `fold_in(key, j)`, so that the tasks do not depend on the
      execution.
    one: from the inner state of the lifted estimator to that of one learner, from which an
      evaluation starts.
    mesh: the devices that the tasks are spread over, or None if they run on one device.
  """

  num_tasks: int
  lift: Callable[[MetaGradient], MetaGradient]
  sample: Callable[[SampleTask, MakeEpisode], SampleEpisodes]
  one: Callable[[InnerState], InnerState]
  mesh: Mesh | None = None


def vmapped(num_tasks: int, *, chunk: int | None = None) -> Execution:
  """Runs all tasks at once under `jax.vmap`, or `chunk` tasks at a time to bound memory.

  If the inner optimizer is `carried`, each of the T places in the meta-batch keeps a state of its
  own from one meta-step to the next. The states are never averaged.

  Args:
    num_tasks: `T`, the tasks of a meta-batch.
    chunk: how many tasks run together, or None for all. It need not divide `T`.

  Raises:
    ValueError: if a size is below 1, or the chunk is larger than the meta-batch.
  """
  checks.at_least_one(num_tasks=num_tasks)
  checks.chunk_of_tasks(chunk, num_tasks)

  def lift(meta_gradient: MetaGradient) -> MetaGradient:
    def init(params: Params) -> InnerState:
      return repeated(meta_gradient.init(params), num_tasks)

    def estimate(
      params: Params, inner_state: InnerState, episodes: Episode
    ) -> tuple[Params, InnerState, Info]:
      checks.leading_axis("the inner state", inner_state, num_tasks)
      checks.leading_axis("episodes", episodes, num_tasks)
      total, inner_state, infos = _over_slots(
        meta_gradient, params, inner_state, episodes, jnp.ones(num_tasks), chunk
      )
      return _mean(total, num_tasks, params), inner_state, _divided(infos, num_tasks)

    return meta_gradient._replace(init=init, estimate=estimate)

  return Execution(num_tasks, lift, partial(_sample_on_one_device, num_tasks), first)


def serial(num_tasks: int) -> Execution:
  """Runs one task after another, as the paper's code does.

  All tasks start from the same parameters. If the inner optimizer is `carried`, one state is
  handed from each task to the next.

  Args:
    num_tasks: `T`, the tasks of a meta-batch.

  Raises:
    ValueError: if `num_tasks` is below 1.
  """
  checks.at_least_one(num_tasks=num_tasks)

  def lift(meta_gradient: MetaGradient) -> MetaGradient:
    estimate_task = _checked(meta_gradient)

    def estimate(
      params: Params, inner_state: InnerState, episodes: Episode
    ) -> tuple[Params, InnerState, Info]:
      def body(
        carry: tuple[InnerState, Params], episode: Episode
      ) -> tuple[tuple[InnerState, Params], Info]:
        inner_state, total = carry
        gradient, inner_state, info = estimate_task(params, inner_state, episode)
        return (inner_state, jax.tree.map(jnp.add, total, gradient)), info

      checks.leading_axis("episodes", episodes, num_tasks)
      zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), _wide(leaf)), params)
      (inner_state, total), infos = jax.lax.scan(body, (inner_state, zeros), episodes)
      info = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), infos)
      return _mean(total, num_tasks, params), inner_state, info

    return meta_gradient._replace(estimate=estimate)

  return Execution(
    num_tasks, lift, partial(_sample_on_one_device, num_tasks), lambda inner_state: inner_state
  )


def sharded(num_tasks: int, mesh: Mesh | None = None, *, chunk: int | None = None) -> Execution:
  """Spreads the tasks over the devices of a mesh; each device also draws its own tasks.

  One all-reduce adds the gradients of all devices. The result does not depend on the number of
  devices, apart from rounding. If the inner optimizer is `carried`, each of the T places in the
  meta-batch keeps its state on the device that runs it. If the number of devices does not divide
  `T`, the last task is repeated to fill the remaining places, which do not count. If you make the
  episodes yourself, their leading axis is `T`, or `T` rounded up to a multiple of the number of
  devices; only the first `T` count. (The others must give finite gradients, which are multiplied
  by 0.)

  Args:
    num_tasks: `T`, the tasks of a meta-batch.
    mesh: with one axis; by default `task_mesh()`, all devices. Arrays that `sample_task` closes
      over must be on all devices of the mesh.
    chunk: how many of a device's tasks run together; by default one on CPU, all elsewhere.

  Raises:
    ValueError: if a size is below 1, the chunk is larger than the meta-batch, or the mesh has more
      than one axis or one that is not of the type Auto.
  """
  checks.at_least_one(num_tasks=num_tasks)
  checks.chunk_of_tasks(chunk, num_tasks)
  mesh, by_slot = mesh_and_spec(mesh)
  slots = num_slots(num_tasks, mesh)
  chunk = chunk_or_default(chunk, slots // mesh.size, mesh)
  everywhere = PartitionSpec()

  def lift(meta_gradient: MetaGradient) -> MetaGradient:
    def init(params: Params) -> InnerState:
      spread = NamedSharding(mesh, by_slot)

      def place(leaf: jax.Array) -> jax.Array:
        if isinstance(leaf, jax.core.Tracer):  # in a sweep, device_put would spread the runs
          return jax.lax.with_sharding_constraint(leaf, spread)
        return jax.device_put(leaf, spread)

      return jax.tree.map(place, repeated(meta_gradient.init(params), slots))

    def one_device(
      params: Params, inner_state: InnerState, episodes: Episode, counts: jax.Array
    ) -> tuple[Params, InnerState, Info]:
      total, inner_state, infos = _over_slots(
        meta_gradient, params, inner_state, episodes, counts, chunk
      )
      total, infos = jax.lax.psum((total, infos), mesh.axis_names)
      return _mean(total, num_tasks, params), inner_state, _divided(infos, num_tasks)

    all_devices = jax.shard_map(
      one_device,
      mesh=mesh,
      in_specs=(everywhere, by_slot, by_slot, by_slot),
      out_specs=(everywhere, by_slot, everywhere),
      check_vma=False,  # the result of a task varies by device even where its start did not
    )

    def estimate(
      params: Params, inner_state: InnerState, episodes: Episode
    ) -> tuple[Params, InnerState, Info]:
      checks.leading_axis("the inner state", inner_state, slots)
      if jnp.shape(episodes.schedule)[:1] != (slots,):  # not drawn by this execution
        checks.leading_axis("episodes", episodes, num_tasks)
        episodes = padded(episodes, num_tasks, slots)
      counts = (jnp.arange(slots) < num_tasks).astype(jnp.float32)
      return all_devices(params, inner_state, episodes, counts)

    return meta_gradient._replace(init=init, estimate=estimate)

  def sample(sample_task: SampleTask, make_episode: MakeEpisode) -> SampleEpisodes:
    tasks = jnp.asarray(np.minimum(np.arange(slots), num_tasks - 1))
    sample_one = partial(_sample_one, sample_task, make_episode)

    def sample_episodes(key: PRNGKey) -> Episode:
      # Traced out here: shard_map rejects the indexing of mesh-sharded data.
      sample_traced, data = traced(sample_one, key, tasks[0])
      all_devices = jax.shard_map(
        jax.vmap(partial(sample_traced, data), in_axes=(None, 0)),
        mesh=mesh,
        in_specs=(everywhere, by_slot),
        out_specs=by_slot,
        check_vma=False,
      )
      return all_devices(key, tasks)

    return sample_episodes

  return Execution(num_tasks, lift, sample, first, mesh)


def _sample_one(
  sample_task: SampleTask, make_episode: MakeEpisode, key: PRNGKey, task: jax.Array
) -> Episode:
  """The episode of task number `task` of the meta-batch with this key."""
  task_key, episode_key = jax.random.split(jax.random.fold_in(key, task))
  return make_episode(episode_key, sample_task(task_key))


def _sample_on_one_device(
  num_tasks: int, sample_task: SampleTask, make_episode: MakeEpisode
) -> SampleEpisodes:
  sample_many = jax.vmap(partial(_sample_one, sample_task, make_episode), in_axes=(None, 0))
  return lambda key: sample_many(key, jnp.arange(num_tasks))


def _checked(meta_gradient: MetaGradient) -> Callable[..., tuple[Params, InnerState, Info]]:
  """The estimate of one task, with its gradient checked, and all as wide as it is added to others.

  Raises:
    ValueError: if the gradient does not have the structure and the shapes of the parameters.
  """

  def estimate(
    params: Params, inner_state: InnerState, episode: Episode
  ) -> tuple[Params, InnerState, Info]:
    gradient, after, info = meta_gradient.estimate(params, inner_state, episode)
    checks.gradient_like(params, gradient)
    gradient = jax.tree.map(lambda g, phi: g.astype(_wide(phi)), gradient, params)
    info = jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)), info)
    return gradient, finite_or_before(after, inner_state), info

  return estimate


def _wide(leaf: jax.Array) -> Any:
  """The dtype in which such numbers of tasks are added: at least float32."""
  return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _mean(total: Params, num_tasks: int, params: Params) -> Params:
  """The mean over tasks, in the dtypes of the parameters."""
  return jax.tree.map(lambda t, phi: (t / num_tasks).astype(jnp.result_type(phi)), total, params)


def _over_slots(
  meta_gradient: MetaGradient,
  params: Params,
  inner_state: InnerState,
  episodes: Episode,
  counts: jax.Array,
  chunk: int | None,
) -> tuple[Params, InnerState, Info]:
  """The sums over slots of count * gradient and count * Info, and the inner states `[slots, ...]`.

  Gradients are added chunk by chunk: a stack of all would take as much memory as all states.
  """
  slots = (inner_state, episodes, counts)
  available = counts.shape[0]

  @partial(jax.jit, inline=True)  # so that it is traced once, for its shapes and in the scan
  def together(slots: Any) -> tuple[tuple[Params, Info], InnerState]:
    inner_state, episodes, counts = slots
    gradients, inner_state, infos = over_tasks(
      partial(_checked(meta_gradient), params), inner_state, episodes
    )
    # As exact as a sum: an accelerator would round the factors of a product to fewer bits.
    weigh = lambda leaf: jnp.tensordot(counts.astype(leaf.dtype), leaf, 1, precision="highest")
    return jax.tree.map(weigh, (gradients, infos)), inner_state

  if chunk is None or chunk == available:
    total, inner_state = together(slots)
    return total[0], inner_state, total[1]

  def body(total: Any, slots: Any) -> tuple[Any, InnerState]:
    # A chunk whose slots only fill up the mesh is not computed: other devices can use the core.
    return jax.lax.cond(
      jnp.any(slots[2] > 0), add, lambda total, slots: (total, slots[0]), total, slots
    )

  def add(total: Any, slots: Any) -> tuple[Any, InnerState]:
    more, inner_state = together(slots)
    return jax.tree.map(jnp.add, total, more), inner_state

  count = available // chunk  # not -1: with k = 1 the schedules are empty
  whole = count * chunk
  chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(count, chunk, *leaf.shape[1:]), slots)
  totals = jax.eval_shape(together, jax.tree.map(lambda leaf: leaf[0], chunks))[0]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), totals)
  total, states = jax.lax.scan(body, zeros, chunks)
  states = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), states)
  if whole < available:
    total, rest = body(total, jax.tree.map(lambda leaf: leaf[whole:], slots))
    states = jax.tree.map(lambda *parts: jnp.concatenate(parts), states, rest)
  return total[0], states, total[1]


def _divided(tree: Any, num_tasks: int) -> Any:
  return jax.tree.map(lambda leaf: leaf / num_tasks, tree)
