"""Core data types: Examples, Task and Episode, and the types of functions on them.

A task gives the learner a sequence of k losses L_1 ... L_k (Section 5). An `Episode` is that
sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A pytree of float arrays, and the optimizer state that goes with it.
Params = Any
InnerState = Any
PRNGKey = jax.Array


class Examples(NamedTuple):
  """Inputs and targets, pytrees of arrays that share one leading axis `[n, ...]`."""

  inputs: Any
  targets: Any


class Task(NamedTuple):
  """One task: the examples to adapt on, and the examples to test the adapted learner on.

  Attributes:
    train: to adapt on.
    test: to test on.
    classes: for classification int32 `[ways]`: for each label, the number of its class in the
      `Classes` that the task was drawn from. None where that is not known.
  """

  train: Examples
  test: Examples
  classes: Any = None


class Episode(NamedTuple):
  """The minibatches of L_1 ... L_k: `k - 1` from a pool of examples, then the last one, the tail.

  The pool may keep its storage type, such as `uint8` images; minibatches are gathered when used.

  Attributes:
    pool: `[n, ...]`.
    schedule: int32 `[k - 1, b]`, rows of the pool.
    tail: `[m, ...]`; `m` need not equal `b`.
    key: for losses that draw random numbers, such as dropout: L_i is given `fold_in(key, i - 1)`.
    steps: int32, how many of the `k - 1` inner steps this task takes, where tasks take different
      numbers of them; None for all.
  """

  pool: Examples
  schedule: jax.Array
  tail: Examples
  key: PRNGKey | None = None
  steps: jax.Array | None = None


# A loss is a function of parameters and a minibatch. It returns a scalar, or a scalar and a dict of
# metrics to be logged. If a parameter after these is named `key`, it gets a new key in each step.
LossFn = Callable[..., Any]
Apply = Callable[[Params, Any], Any]  # (params, inputs [n, ...]) -> outputs [n, ...]
Predict = Callable[[Params, Task], Any]  # outputs [m, ...] on the test inputs
SampleTask = Callable[[PRNGKey], Task]
MakeEpisode = Callable[[PRNGKey, Task], Episode]
SampleEpisodes = Callable[[PRNGKey], Episode]  # every leaf with a leading task axis [T, ...]


def num_examples(examples: Any) -> int:
  """The length `n` of the leading axis.

  Raises:
    ValueError: if the leaves do not share one.
  """
  shapes = [np.shape(leaf) for leaf in jax.tree.leaves(examples)]
  if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
    found = ", ".join(map(str, shapes)) or "no array"
    raise ValueError(
      f"the arrays of examples must have the same leading axis n, not the shapes {found}: give as "
      "many targets as inputs"
    )
  return shapes[0][0]


def leaf_name(path: Any) -> str:
  """The name of a leaf from its path in a pytree, such as `Dense_0/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def num_steps(schedule: jax.Array) -> int:
  """The number of minibatches in a schedule.

  Raises:
    ValueError: if it is not rows `[k, b]`.
  """
  is_array = hasattr(schedule, "dtype")
  if not is_array or schedule.ndim != 2 or not jnp.issubdtype(schedule.dtype, jnp.integer):
    found = f"{schedule.dtype} {schedule.shape}" if is_array else type(schedule).__name__
    raise ValueError(
      f"the rows of a schedule are an integer array [k, b], not {found}: draw them with "
      "cycling(k, b)(key, n) or replacement(k, b)(key, n) from n examples"
    )
  return schedule.shape[0]


def take(examples: Examples, rows: jax.Array) -> Examples:
  """The examples in `rows` (int32, any shape `[...]`): leaves `[..., *rest]`.

  Raises:
    ValueError: if the examples do not share one leading axis.
  """
  num_examples(examples)
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], examples)
