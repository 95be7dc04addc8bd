"""What is fastest on each backend, by measurement: `benchmarks/README.md` has the figures."""

from typing import NamedTuple

import jax


class Defaults(NamedTuple):
  """What a choice that is left open becomes."""

  convolution: str  # of `metajax.convolution`
  chunk: int | None  # tasks at once on a device, in `sharded` and `map_tasks`; None for all


_ACCELERATOR = Defaults(convolution="xla", chunk=None)
_BACKENDS = {"cpu": Defaults(convolution="patches", chunk=1)}


def defaults() -> Defaults:
  """Of the backend that JAX uses."""
  return _BACKENDS.get(jax.default_backend(), _ACCELERATOR)
