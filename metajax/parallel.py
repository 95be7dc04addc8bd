"""How many tasks run at once: functions from `MetaGradient` to `MetaGradient`.

An episode, and so everything in `Info`, gains a leading task axis `[T, ...]` on the way in; the
gradient and the Info that come out are means over the tasks (Equation 5).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax import backend
from metajax.gradients import Info, MetaGradient
from metajax.types import (
  Episode,
  InnerState,
  MakeEpisode,
  Params,
  PRNGKey,
  SampleEpisodes,
  SampleTask,
  num_examples,
)


def sample_episodes(
  sample_task: SampleTask,
  make_episode: MakeEpisode,
  num_tasks: int,
  mesh: Mesh | None = None,
) -> SampleEpisodes:
  """A meta-batch of episodes: `key -> Episode` with leaves `[T, ...]`; it consumes the key.

  The key of task j is `fold_in(key, j)`, whatever T is and wherever it is drawn.

  Args:
    sample_task: `key -> Task`. With a mesh, the data that it closes over is on all its devices.
    make_episode: `(key, Task) -> Episode`.
    num_tasks: `T`, the meta-batch.
    mesh: of `sharded`: each device then draws the tasks of its own slots and no others. If the
      devices do not divide `T`, the leaves are `[slots, ...]`, the last task repeated: of use to
      `sharded` alone, which does not count them.

  Raises:
    ValueError: if `num_tasks` is below 1, or the mesh has more than one axis.
  """
  _check_sizes(num_tasks, None)

  def sample_one(key: PRNGKey, task: jax.Array) -> Episode:
    task_key, episode_key = jax.random.split(jax.random.fold_in(key, task))
    return make_episode(episode_key, sample_task(task_key))

  if mesh is None:
    sample_many = jax.vmap(sample_one, in_axes=(None, 0))
    return lambda key: sample_many(key, jnp.arange(num_tasks))

  mesh, by_slot = _mesh_and_spec(mesh)
  tasks = jnp.asarray(np.minimum(np.arange(_slots(num_tasks, mesh)), num_tasks - 1))

  def sample(key: PRNGKey) -> Episode:
    all_devices = jax.shard_map(
      jax.vmap(_traced(sample_one, key, tasks[0]), in_axes=(None, 0)),
      mesh=mesh,
      in_specs=(PartitionSpec(), by_slot),
      out_specs=by_slot,
      check_vma=False,
    )
    return all_devices(key, tasks)

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
  _check_sizes(num_tasks, chunk)

  def init(params: Params) -> InnerState:
    return _repeated(meta_gradient.init(params), num_tasks)

  def estimate(
    params: Params, inner_state: InnerState, episodes: Episode
  ) -> tuple[Params, InnerState, Info]:
    _check_axis("the inner state", inner_state, num_tasks)
    _check_axis("episodes", episodes, num_tasks)
    total, inner_state, infos = _over_slots(
      meta_gradient, params, inner_state, episodes, jnp.ones(num_tasks), chunk
    )
    return _scaled(total, num_tasks), inner_state, _scaled(infos, num_tasks)

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

    num_tasks = num_examples(episodes)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (inner_state, total), infos = jax.lax.scan(body, (inner_state, zeros), episodes)
    info = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), infos)
    return _scaled(total, num_tasks), inner_state, info

  return MetaGradient(meta_gradient.init, estimate)


def sharded(
  meta_gradient: MetaGradient,
  num_tasks: int,
  mesh: Mesh | None = None,
  *,
  chunk: int | None = None,
) -> MetaGradient:
  """`batched`, with the tasks spread over the devices of a mesh.

  The gradients of all devices are added by one all-reduce, and but for rounding do not depend on
  the devices. Each slot's inner state stays on the device of its slot. If the devices do not divide
  `T`, there are more slots, as many as they do divide: these repeat the last task and do not count.

  Args:
    meta_gradient: an estimator for one task.
    num_tasks: `T`, the meta-batch.
    mesh: of one axis; by default `task_mesh()`, all devices.
    chunk: how many of a device's tasks run together; by default one on CPU, all elsewhere.

  Raises:
    ValueError: if a size is below 1, the chunk larger than the meta-batch, or the mesh has more
      than one axis.
  """
  _check_sizes(num_tasks, chunk)
  mesh, by_slot = _mesh_and_spec(mesh)
  slots = _slots(num_tasks, mesh)
  chunk = _chunk_or_default(chunk, slots // mesh.size)
  everywhere = PartitionSpec()

  def init(params: Params) -> InnerState:
    state = _repeated(meta_gradient.init(params), slots)
    return jax.device_put(state, NamedSharding(mesh, by_slot))

  def one_device(
    params: Params, inner_state: InnerState, episodes: Episode, counts: jax.Array
  ) -> tuple[Params, InnerState, Info]:
    total, inner_state, infos = _over_slots(
      meta_gradient, params, inner_state, episodes, counts, chunk
    )
    total, infos = jax.lax.psum((total, infos), mesh.axis_names)
    return _scaled(total, num_tasks), inner_state, _scaled(infos, num_tasks)

  all_devices = jax.shard_map(
    one_device,
    mesh=mesh,
    in_specs=(everywhere, by_slot, by_slot, by_slot),
    out_specs=(everywhere, by_slot, everywhere),
    check_vma=False,  # what a task computes varies by device wherever it started from
  )

  def estimate(
    params: Params, inner_state: InnerState, episodes: Episode
  ) -> tuple[Params, InnerState, Info]:
    _check_axis("the inner state", inner_state, slots)
    if jnp.shape(episodes.schedule)[:1] != (slots,):  # not drawn with the mesh
      _check_axis("episodes", episodes, num_tasks)
      episodes = _padded(episodes, num_tasks, slots)
    counts = (jnp.arange(slots) < num_tasks).astype(jnp.float32)
    return all_devices(params, inner_state, episodes, counts)

  return MetaGradient(init, estimate)


def per_device(
  meta_gradient: MetaGradient, num_tasks: int, mesh: Mesh | None = None
) -> MetaGradient:
  """What `meta_gradient` makes of each device's share of the tasks, averaged over the devices.

  `per_device(serial(one), T)` is the paper's handling on each device: its tasks in turn, one inner
  state handed along. The inner states, `[devices, ...]`, stay where they are. With `serial` the
  result depends on the number of devices; `sharded` is the one that does not.

  Args:
    meta_gradient: an estimator for a meta-batch.
    num_tasks: `T`, the meta-batch.
    mesh: of one axis; by default `task_mesh()`, all devices. They must divide `T`.

  Raises:
    ValueError: if the mesh has more than one axis, or its devices do not divide `T`.
  """
  mesh, by_device = _mesh_and_spec(mesh)
  if num_tasks < 1 or num_tasks % mesh.size:
    raise ValueError(f"{mesh.size} devices do not divide {num_tasks} tasks: change the meta-batch")
  everywhere = PartitionSpec()

  def init(params: Params) -> InnerState:
    state = _repeated(meta_gradient.init(params), mesh.size)
    return jax.device_put(state, NamedSharding(mesh, by_device))

  def one_device(
    params: Params, inner_state: InnerState, episodes: Episode
  ) -> tuple[Params, InnerState, Info]:
    gradient, inner_state, info = meta_gradient.estimate(params, first_slot(inner_state), episodes)
    gradient, info = jax.lax.pmean((gradient, info), mesh.axis_names)
    return gradient, jax.tree.map(lambda leaf: leaf[None], inner_state), info

  all_devices = jax.shard_map(
    one_device,
    mesh=mesh,
    in_specs=(everywhere, by_device, by_device),
    out_specs=(everywhere, by_device, everywhere),
    check_vma=False,
  )

  def estimate(
    params: Params, inner_state: InnerState, episodes: Episode
  ) -> tuple[Params, InnerState, Info]:
    _check_axis("the inner state", inner_state, mesh.size)
    _check_axis("episodes", episodes, num_tasks)
    return all_devices(params, inner_state, episodes)

  return MetaGradient(init, estimate)


def map_tasks(
  function: Callable[[Any, Any], Any], mesh: Mesh | None = None, *, chunk: int | None = None
) -> Callable[[Any, Any], Any]:
  """A function of one task, on many: spread over the devices, a few at a time on each.

  Args:
    function: `(shared, task) -> outputs`, say an adaptation and its accuracy. A task may be as
      little as its number or key, from which the function draws it.
    mesh: of one axis; by default `task_mesh()`, all devices.
    chunk: how many of a device's tasks run together; by default one on CPU, all elsewhere.

  Returns:
    `(shared, tasks) -> outputs`; leaves of tasks and outputs are `[n, ...]`, with any `n`.

  Raises:
    ValueError: if the chunk is below 1, or the mesh has more than one axis.
  """
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk must be at least 1, not {chunk}")
  mesh, by_task = _mesh_and_spec(mesh)

  def mapped(shared: Any, tasks: Any) -> Any:
    num_tasks = num_examples(tasks)
    slots = _slots(num_tasks, mesh)
    size = _chunk_or_default(chunk, slots // mesh.size)
    one_task = _traced(function, shared, jax.tree.map(lambda leaf: leaf[0], tasks))

    def one_device(shared: Any, tasks: Any) -> Any:
      return jax.lax.map(partial(one_task, shared), tasks, batch_size=size)

    all_devices = jax.shard_map(
      one_device,
      mesh=mesh,
      in_specs=(PartitionSpec(), by_task),
      out_specs=by_task,
      check_vma=False,
    )
    outputs = all_devices(shared, _padded(tasks, num_tasks, slots))
    return jax.tree.map(lambda leaf: leaf[:num_tasks], outputs)

  return mapped


def first_slot(inner_state: InnerState) -> InnerState:
  """One of the inner states that `batched` keeps, to start an evaluation from.

  Where the slots are spread over processes, call it inside a compiled program.
  """
  return jax.tree.map(lambda leaf: leaf[0], inner_state)


def _over_slots(
  meta_gradient: MetaGradient,
  params: Params,
  inner_state: InnerState,
  episodes: Episode,
  counts: jax.Array,
  chunk: int | None,
) -> tuple[Params, InnerState, Info]:
  """The sums over slots of count * gradient and count * Info, and the inner states `[slots, ...]`.

  Chunk by chunk into one running sum: a stack of all gradients would be as large as all states.
  """
  slots = (inner_state, episodes, counts)
  num_slots = counts.shape[0]

  def together(slots: Any) -> tuple[tuple[Params, Info], InnerState]:
    inner_state, episodes, counts = slots
    gradients, inner_state, infos = jax.vmap(meta_gradient.estimate, in_axes=(None, 0, 0))(
      params, inner_state, episodes
    )
    # As exact as a sum: an accelerator would round the factors of a product to fewer bits.
    weigh = lambda leaf: jnp.tensordot(counts.astype(leaf.dtype), leaf, 1, precision="highest")
    return jax.tree.map(weigh, (gradients, infos)), inner_state

  if chunk is None or chunk == num_slots:
    total, inner_state = together(slots)
    return total[0], inner_state, total[1]

  def body(total: Any, slots: Any) -> tuple[Any, InnerState]:
    more, inner_state = together(slots)
    return jax.tree.map(jnp.add, total, more), inner_state

  count = num_slots // chunk  # not -1: with k = 1 the schedules are empty
  whole = count * chunk
  chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(count, chunk, *leaf.shape[1:]), slots)
  shapes = jax.eval_shape(together, jax.tree.map(lambda leaf: leaf[0], chunks))[0]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  total, states = jax.lax.scan(body, zeros, chunks)
  states = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), states)
  if whole < num_slots:
    total, rest = body(total, jax.tree.map(lambda leaf: leaf[whole:], slots))
    states = jax.tree.map(lambda *parts: jnp.concatenate(parts), states, rest)
  return total[0], states, total[1]


def _mesh_and_spec(mesh: Mesh | None) -> tuple[Mesh, PartitionSpec]:
  mesh = backend.task_mesh() if mesh is None else mesh
  if len(mesh.axis_names) != 1:
    raise ValueError(f"the mesh must have one axis, not {mesh.axis_names}: use task_mesh()")
  return mesh, PartitionSpec(mesh.axis_names)


def _check_axis(what: str, tree: Any, size: int) -> None:
  found = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)} - {(size,)}
  if found:
    raise ValueError(
      f"{what} must have a leading axis of {size}, not {sorted(found)}: give as many tasks as the "
      "meta-batch, and the state that init returned"
    )


def _slots(num_tasks: int, mesh: Mesh) -> int:
  """As many as there are tasks, or as the devices divide."""
  return -(-num_tasks // mesh.size) * mesh.size


def _traced(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
  """The function, traced out here: inside shard_map, indexing data on the mesh is refused."""
  program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
  structure = jax.tree.structure(shapes)
  flat = jax.extend.core.jaxpr_as_fun(program)
  return lambda *arguments: jax.tree.unflatten(structure, flat(*jax.tree.leaves(arguments)))


def _chunk_or_default(chunk: int | None, num_tasks: int) -> int:
  """What is asked for or suits the backend, and no more than there are tasks."""
  chunk = backend.defaults().chunk if chunk is None else chunk
  return num_tasks if chunk is None else min(chunk, num_tasks)


def _padded(tasks: Any, num_tasks: int, slots: int) -> Any:
  """The last task repeated, up to the number of slots."""
  if num_tasks == slots:
    return tasks
  rows = jnp.minimum(jnp.arange(slots), num_tasks - 1)
  return jax.tree.map(lambda leaf: leaf[rows], tasks)


def _repeated(tree: Any, times: int) -> Any:
  return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], times, axis=0), tree)


def _scaled(tree: Any, num_tasks: int) -> Any:
  return jax.tree.map(lambda leaf: leaf / num_tasks, tree)


def _check_sizes(num_tasks: int, chunk: int | None) -> None:
  if num_tasks < 1:
    raise ValueError(f"num_tasks must be at least 1, not {num_tasks}")
  if chunk is not None and not 1 <= chunk <= num_tasks:
    raise ValueError(f"chunk must be between 1 and num_tasks = {num_tasks}, not {chunk}")
