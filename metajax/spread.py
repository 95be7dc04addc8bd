"""Any number of tasks, spread over the devices of a mesh.

The tasks are padded to a multiple of the number of devices; a place for a task is called a slot.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from metajax import checks, devices
from metajax.programs import traced
from metajax.types import InnerState, num_examples, take


def map_tasks(
  function: Callable[[Any, Any], Any], mesh: Mesh | None = None, *, chunk: int | None = None
) -> Callable[[Any, Any], Any]:
  """Applies a function of one task to many tasks, spread over the devices of a mesh.

  Args:
    function: `(shared, task) -> outputs`, for example an adaptation and its accuracy. A task may
      be a mere number or key, from which the function draws it.
    mesh: with one axis; by default `task_mesh()`, all devices.
    chunk: how many of a device's tasks run together; by default one on CPU, all elsewhere.

  Returns:
    `(shared, tasks) -> outputs`; the leaves of tasks and outputs are `[n, ...]`, `n >= 1`.

  Raises:
    ValueError: if the chunk is below 1, or the mesh has more than one axis, or one that is not of
      the type Auto.
  """
  if chunk is not None:
    checks.at_least_one(chunk=chunk)
  mesh, by_task = mesh_and_spec(mesh)

  def mapped(shared: Any, tasks: Any) -> Any:
    num_tasks = num_examples(tasks)
    slots = num_slots(num_tasks, mesh)
    size = chunk_or_default(chunk, slots // mesh.size, mesh)
    # Traced out here: shard_map rejects the indexing of mesh-sharded data.
    one_task, data = traced(function, shared, jax.tree.map(lambda leaf: leaf[0], tasks))

    def one_device(shared: Any, tasks: Any) -> Any:
      batch_size = None if size == 1 else size  # of size 1, it would still be vmapped
      return jax.lax.map(partial(one_task, data, shared), tasks, batch_size=batch_size)

    all_devices = jax.shard_map(
      one_device,
      mesh=mesh,
      in_specs=(PartitionSpec(), by_task),
      out_specs=by_task,
      check_vma=False,
    )
    outputs = all_devices(shared, padded(tasks, num_tasks, slots))
    return jax.tree.map(lambda leaf: leaf[:num_tasks], outputs)

  return mapped


def mesh_and_spec(mesh: Mesh | None) -> tuple[Mesh, PartitionSpec]:
  mesh = devices.task_mesh() if mesh is None else mesh
  checks.one_axis(mesh)
  return mesh, PartitionSpec(mesh.axis_names)


def num_slots(num_tasks: int, mesh: Mesh) -> int:
  """The number of tasks, rounded up to a multiple of the number of devices."""
  return -(-num_tasks // mesh.size) * mesh.size


def chunk_or_default(chunk: int | None, num_tasks: int, mesh: Mesh) -> int:
  """The requested chunk, or the default of the mesh's devices, capped at the number of tasks."""
  chunk = devices.defaults(mesh).chunk if chunk is None else chunk
  return num_tasks if chunk is None else min(chunk, num_tasks)


def over_tasks(function: Callable[..., Any], *tasks: Any) -> Any:
  """Maps a function over the tasks of a chunk, at once. A single task needs no vmap."""
  if num_examples(tasks) > 1:
    return jax.vmap(function)(*tasks)
  result = function(*jax.tree.map(lambda leaf: leaf[0], tasks))
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)


def padded(tasks: Any, num_tasks: int, slots: int) -> Any:
  """Repeats the last task until there are as many tasks as slots."""
  if num_tasks == slots:
    return tasks
  return take(tasks, jnp.minimum(jnp.arange(slots), num_tasks - 1))


def repeated(state: InnerState, times: int) -> InnerState:
  """A state for each slot. Keys of random numbers differ, so that slots draw different ones."""

  def repeat(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      keys = jax.vmap(partial(fold_in, leaf.reshape(-1)))(jnp.arange(times))
      return keys.reshape(times, *leaf.shape)
    return jnp.repeat(leaf[None], times, axis=0)

  return jax.tree.map(repeat, state)


def resized(inner_state: InnerState, slots: int) -> InnerState:
  """The states of another number of slots: those that there are, and then copies of the last."""
  more = repeated(jax.tree.map(lambda leaf: leaf[-1], inner_state), slots)
  resize = lambda leaf, more: jnp.concatenate([leaf, more[leaf.shape[0] :]])[:slots]
  return jax.tree.map(resize, inner_state, more)


def first(inner_state: InnerState) -> InnerState:
  """The state of the first slot."""
  return jax.tree.map(lambda leaf: leaf[0], inner_state)
