"""Devices, and what is fastest on each kind: `benchmarks/README.md` has the figures."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh


class Defaults(NamedTuple):
  """What a choice that is left open becomes."""

  convolution: str  # of `metajax.convolution`
  chunk: int | None  # tasks at once on a device, in `sharded` and `map_tasks`; None for all


_ACCELERATOR = Defaults(convolution="xla", chunk=None)
_BACKENDS = {"cpu": Defaults(convolution="patches", chunk=1)}


def defaults() -> Defaults:
  """Of the backend that JAX uses."""
  return _BACKENDS.get(jax.default_backend(), _ACCELERATOR)


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
  """Makes each CPU core a device of its own, so that `sharded` and `map_tasks` use them all.

  XLA gains little from a second core inside one small task; cores that run tasks of their own gain
  almost a factor of two each. A program calls this once, before it computes anything. Other
  backends' devices stay as they are.

  Args:
    count: devices; by default the cores that this process may use.

  Raises:
    RuntimeError: if JAX has started already.
  """
  affinity = getattr(os, "sched_getaffinity", None)  # not on every system
  cores = len(affinity(0)) if affinity else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", cores if count is None else count)
