"""Devices, and the fastest options on each backend, as measured in `benchmarks/README.md`."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh


class Defaults(NamedTuple):
  """Per-backend defaults for options left as None."""

  convolution: str  # of `metajax.models.fast`, with the blocks that go with it
  chunk: int | None  # tasks at once on a device, in `sharded` and `map_tasks`; None for all


_BACKENDS = {
  "cpu": Defaults(convolution="cpu", chunk=1),
  "gpu": Defaults(convolution="patches", chunk=None),
}
_NOT_MEASURED = Defaults(convolution="xla", chunk=None)


def defaults(mesh: Mesh | None = None) -> Defaults:
  """The defaults for the devices of a mesh, or for the backend that JAX uses."""
  backend = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  return _BACKENDS.get(backend, _NOT_MEASURED)


def task_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of one axis, "tasks", over the given devices, or all there are.

  Raises:
    ValueError: if no device is given.
  """
  devices = jax.devices() if devices is None else devices
  if not devices:
    raise ValueError("a mesh needs at least one device: leave devices out to use all there are")
  return jax.make_mesh((len(devices),), ("tasks",), axis_types=(AxisType.Auto,), devices=devices)


def cores_as_devices(count: int | None = None) -> None:
  """Makes each CPU core a JAX device, so that `sharded` and `map_tasks` use all of them.

  XLA gains little from a second core inside one small task. Two cores that each run tasks of their
  own are almost twice as fast as one. Call this once in a program, before it computes anything. The
  devices of other backends are not affected.

  Args:
    count: the number of devices; by default the number of cores that this process may use.

  Raises:
    RuntimeError: if JAX has started already.
    ValueError: if the count is no whole number of at least 1.
  """
  if count is not None and (not isinstance(count, int) or count < 1):
    raise ValueError(f"count must be a whole number of at least 1, not {count!r}")
  affinity = getattr(os, "sched_getaffinity", None)  # not on every system
  cores = len(affinity(0)) if affinity else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", cores if count is None else count)


def wait_for_all(what: str) -> None:
  """Waits until all processes that share the run have come here; `what` names the place."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def in_any_process(said: bool, mesh: Mesh | None = None) -> bool:
  """Whether `said` is true in any of the processes that share a mesh.

  All of them must call this together.

  Args:
    said: what this process has to say.
    mesh: the devices that they share, with one axis; by default all there are.
  """
  mesh = task_mesh() if mesh is None else mesh
  if not mesh.is_multi_process:
    return said
  by_device = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
  each = jax.make_array_from_callback((mesh.size,), by_device, lambda index: np.array([said]))
  return bool(jax.block_until_ready(_any(each)))


_any = jax.jit(jnp.any)
