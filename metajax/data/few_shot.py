"""Samples N-way K-shot tasks from classes of examples, on the device (Section 6.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from metajax.types import Examples, PRNGKey, SampleTask, Task


class Classes(NamedTuple):
  """Examples sorted by class. Classes may differ in size.

  Attributes:
    inputs: `[m, ...]`, all examples, grouped by class, in their storage dtype.
    starts: int32 `[c]`, the row of the first example of each class.
    sizes: int32 `[c]`, the number of examples of each class.
  """

  inputs: jax.Array
  starts: jax.Array
  sizes: jax.Array


class Splits(NamedTuple):
  """Disjoint sets of classes.

  Attributes:
    train: for meta-training.
    validation: for choosing settings; None if the data set has none.
    test: for the reported results.
  """

  train: Classes
  validation: Classes | None
  test: Classes


def from_arrays(inputs: ArrayLike, labels: ArrayLike) -> Classes:
  """Makes classes from a user's own arrays in memory.

  Args:
    inputs: `[m, ...]`.
    labels: integers `[m]`, any values; each distinct value is a class, in increasing order.

  Raises:
    ValueError: if the lengths differ, there is no example, the labels are not integers, or the
      inputs are not all finite numbers that fit JAX's dtypes (float32, int32).
  """
  inputs, labels = np.asarray(inputs), np.asarray(labels)
  if labels.ndim != 1 or inputs.shape[:1] != labels.shape or not len(labels):
    raise ValueError(
      f"inputs {inputs.shape} and labels {labels.shape} must be [m, ...] and [m], with m >= 1"
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f"labels must be integers, not {labels.dtype}: number the classes, for example by "
      "np.unique(labels, return_inverse=True)[1]"
    )
  inputs = _stored(inputs)
  order = np.argsort(labels, kind="stable")
  _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
  return Classes(
    jnp.asarray(inputs[order]), jnp.asarray(starts, jnp.int32), jnp.asarray(sizes, jnp.int32)
  )


def _stored(inputs: np.ndarray) -> np.ndarray:
  """Converts the inputs to the dtype in which JAX stores them."""
  if inputs.dtype != bool and not jnp.issubdtype(inputs.dtype, jnp.number):
    raise ValueError(f"inputs must be numbers, not {inputs.dtype}: encode them")
  with np.errstate(over="ignore"):
    stored = inputs.astype(jax.dtypes.canonicalize_dtype(inputs.dtype), copy=False)
  if jnp.issubdtype(stored.dtype, jnp.inexact):
    if not np.all(np.isfinite(stored)):
      raise ValueError(
        f"inputs must be finite {stored.dtype}: there are NaN or infinite entries, remove them"
      )
  elif stored.dtype != inputs.dtype and not np.array_equal(stored, inputs):
    raise ValueError(f"inputs must fit {stored.dtype}: scale them, or give floats")
  return stored


def sample_task(classes: Classes, *, ways: int, train_shots: int, test_shots: int) -> SampleTask:
  """Makes a sampler of tasks: `ways` classes, `train_shots + test_shots` distinct examples of each.

  Args:
    classes: the classes to draw from. The sampler closes over their arrays, so jit compiles them
      into the program as constants. If they are large, pass `inputs` to the jitted function as an
      argument, and give `classes._replace(inputs=inputs)` here.
    ways: the number of classes in a task; their labels are 0 ... ways - 1.
    train_shots: the number of training examples of each class.
    test_shots: the number of test examples of each class.

  Returns:
    `key -> Task` with `[ways * train_shots, ...]` train and `[ways * test_shots, ...]` test
    examples, sorted by class; targets are int32. It consumes the key.

  Raises:
    ValueError: if there are fewer classes than ways, a class has too few examples or rows outside
      the inputs, or a number is below 1 (`test_shots` may be 0).
  """
  if ways < 1 or train_shots < 1 or test_shots < 0:
    raise ValueError(
      "ways and train_shots must be at least 1 and test_shots at least 0, "
      f"not {ways}, {train_shots} and {test_shots}"
    )
  num_classes, shots = len(classes.starts), train_shots + test_shots
  if ways > num_classes:
    raise ValueError(
      f"{ways} ways need {ways} classes, and there are {num_classes}: lower the ways"
    )
  starts, sizes = np.asarray(classes.starts), np.asarray(classes.sizes)
  if starts.shape != sizes.shape or starts.min() < 0 or max(starts + sizes) > len(classes.inputs):
    raise ValueError("classes have rows that the inputs lack: make them with from_arrays")
  smallest, largest = int(np.argmin(sizes)), int(np.max(sizes))
  if sizes[smallest] < shots:
    raise ValueError(
      f"a task needs {shots} examples of each class, and class number {smallest}, counted from 0 "
      f"in the order of the labels, has {sizes[smallest]}: lower the shots"
    )

  classes = jax.tree.map(jnp.asarray, classes)  # they may be NumPy arrays

  def sample(key: PRNGKey) -> Task:
    class_key, example_key = jax.random.split(key)
    chosen = jax.random.permutation(class_key, num_classes)[:ways]
    # Taking the largest of random scores draws without replacement. Columns beyond the size of a
    # class score -1 and are never drawn.
    scores = jax.random.uniform(example_key, (ways, largest))
    scores = jnp.where(jnp.arange(largest) < classes.sizes[chosen][:, None], scores, -1.0)
    rows = classes.starts[chosen][:, None] + jax.lax.top_k(scores, shots)[1]
    labels = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32)[:, None], rows.shape)

    def examples(columns: slice) -> Examples:
      return Examples(classes.inputs[rows[:, columns].reshape(-1)], labels[:, columns].reshape(-1))

    return Task(examples(slice(train_shots)), examples(slice(train_shots, None)))

  return sample
