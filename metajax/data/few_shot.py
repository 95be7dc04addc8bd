"""Classes of examples, and N-way K-shot tasks drawn from them on the device (Section 6.1)."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from metajax.types import Examples, PRNGKey, SampleTask, Task, num_examples


@jax.tree_util.register_static
class Names(tuple[Any, ...]):
  """The names of classes, a tuple. JAX passes it through `jit` and `vmap` as it is."""


class Classes(NamedTuple):
  """Examples sorted by class. Classes may differ in size.

  Attributes:
    inputs: a pytree of arrays `[m, ...]`, all examples, grouped by class, in their storage dtype.
    starts: int32 `[c]`, the row of the first example of each class.
    sizes: int32 `[c]`, the number of examples of each class.
    names: the label of each class, as the user wrote it.
  """

  inputs: Any
  starts: jax.Array | np.ndarray
  sizes: jax.Array | np.ndarray
  names: Names = Names()


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


def from_arrays(
  inputs: Any, labels: ArrayLike | Sequence[str], *, min_examples: int = 1
) -> Classes:
  """Makes classes from a user's own arrays in memory.

  Args:
    inputs: an array or a list `[m, ...]`, or a pytree of such arrays, which is made of dicts and
      tuples, as `{"tokens": ..., "mask": ...}`.
    labels: integers or strings `[m]`. Each distinct value is a class, in increasing order, and is
      kept as the name of the class.
    min_examples: classes with fewer examples are left out, with a warning that names them.

  Raises:
    ValueError: if the lengths differ, no class is left, the labels are neither integers nor
      strings, or the inputs are not all finite numbers that fit JAX's dtypes (float32, int32).
  """
  return jax.tree.map(jnp.asarray, grouped(inputs, labels, min_examples=min_examples))


def grouped(
  inputs: Any, labels: ArrayLike | Sequence[str], *, min_examples: int = 1, stacklevel: int = 3
) -> Classes:
  """The same as `from_arrays`, in the host's memory: for data that is divided afterwards."""
  inputs = jax.tree.map(np.asarray, inputs, is_leaf=lambda part: isinstance(part, list))
  given, labels = labels, np.asarray(labels)
  shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
  if labels.ndim != 1 or any(shape[:1] != labels.shape for shape in shapes) or not labels.size:
    raise ValueError(
      f"inputs {', '.join(map(str, shapes))} and labels {labels.shape} must be [m, ...] and [m], "
      "with m >= 1: give one label for each example"
    )
  labels = class_labels(given)
  inputs = jax.tree.map(as_stored, inputs)
  order = np.argsort(labels, kind="stable")
  names, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
  classes = _rows(inputs, order, starts, sizes, names.tolist())
  small = sizes < min_examples
  if small.all():
    raise ValueError(f"no class has {min_examples} examples: give more, or lower min_examples")
  if small.any():
    pairs = list(zip(names[small].tolist(), sizes[small].tolist(), strict=True))
    dropped = ", ".join(f"{name!r} has {size}" for name, size in pairs[:10])
    more = f", and {len(pairs) - 10} more" if len(pairs) > 10 else ""
    warnings.warn(
      f"classes with fewer than {min_examples} examples are left out: {dropped}{more}",
      stacklevel=stacklevel,
    )
    classes = select(classes, np.flatnonzero(~small))
  return classes


def class_labels(given: ArrayLike | Sequence[str]) -> np.ndarray:
  """The labels as an array of integers or of strings.

  Raises:
    ValueError: if they are neither.
  """
  labels = np.asarray(given)
  if labels.dtype.kind == "U" and not hasattr(given, "dtype"):  # NumPy makes text of what is among
    labels = np.asarray(given, object)  # text, and NaN would be a class
    odd = [label for label in labels.flat if not isinstance(label, str)]
    if odd:
      raise ValueError(
        f"labels must be integers or strings, and {odd[0]!r:.40} is among strings: give each "
        "example the name of its class, or leave it out"
      )
  if labels.dtype == object and all(isinstance(label, str) for label in labels.flat):
    labels = labels.astype(str)  # as pandas keeps strings
  if not (np.issubdtype(labels.dtype, np.integer) or np.issubdtype(labels.dtype, np.str_)):
    raise ValueError(
      f"labels must be integers or strings, not {labels.dtype}: give the class of each example"
    )
  return labels


def select(classes: Classes, numbers: ArrayLike) -> Classes:
  """The classes with these numbers, in this order, with copies of their examples.

  Args:
    classes: to choose from.
    numbers: integers, counted from 0 in the order of `classes.names`.
  """
  if np.asarray(numbers).dtype == bool:
    raise ValueError("numbers must be those of classes, not a mask: give np.flatnonzero(mask)")
  numbers = np.asarray(numbers, np.intp)
  starts, sizes = np.asarray(classes.starts)[numbers], np.asarray(classes.sizes)[numbers]
  rows = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
  return _rows(
    classes.inputs,
    np.concatenate([*rows, np.zeros(0, np.intp)]),
    np.cumsum(sizes) - sizes,
    sizes,
    [classes.names[number] for number in numbers] if classes.names else (),
  )


def _rows(inputs: Any, rows: np.ndarray, starts: Any, sizes: Any, names: Sequence[Any]) -> Classes:
  return Classes(
    jax.tree.map(lambda leaf: np.asarray(leaf)[rows], inputs),
    np.asarray(starts, np.int32),
    np.asarray(sizes, np.int32),
    Names(names),
  )


def split(
  classes: Classes, *, validation: int | float = 0.16, test: int | float = 0.2, seed: int = 0
) -> Splits:
  """Divides classes at random into those for training, for validation and for testing.

  Args:
    classes: all classes.
    validation: the number of validation classes, or, if it is below 1, their fraction of all; 0
      for none. By default fractions are those of mini-ImageNet: 64, 16 and 20 of 100.
    test: the number or the fraction of test classes.
    seed: determines the division.

  Raises:
    ValueError: if a number is negative, or above 1 and not whole, or no class is left for training
      or for testing.
  """
  for name, part in (("validation", validation), ("test", test)):
    if part > 1 and part != int(part):
      raise ValueError(f"{name}={part} must be a number of classes, or a fraction below 1")
  total = len(classes.starts)
  of_validation, of_test = (
    round(part * total) if 0 < part < 1 else int(part) for part in (validation, test)
  )
  of_train = total - of_validation - of_test
  if min(validation, test) < 0 or of_test < 1 or of_train < 1:
    raise ValueError(
      f"{total} classes cannot be divided into {of_validation} for validation, {of_test} for "
      "testing and the others for training: change validation or test"
    )
  order = np.random.default_rng(seed).permutation(total)
  parts = np.split(order, [of_train, of_train + of_validation])
  chosen = [jax.tree.map(jnp.asarray, select(classes, np.sort(part))) for part in parts]
  return Splits(chosen[0], chosen[1] if of_validation else None, chosen[2])


def as_stored(inputs: np.ndarray) -> np.ndarray:
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
    classes: the classes to draw from. The sampler closes over their arrays. `train` and `judge`
      pass them to the compiled program as arguments. If you call `jax.jit` yourself, they become
      constants of the program. If they are large, pass `inputs` to the jitted function as an
      argument then, and give `classes._replace(inputs=inputs)` here.
    ways: the number of classes in a task; their labels are 0 ... ways - 1.
    train_shots: the number of training examples of each class.
    test_shots: the number of test examples of each class.

  Returns:
    `key -> Task` with `[ways * train_shots, ...]` train and `[ways * test_shots, ...]` test
    examples, sorted by class; targets are int32. `Task.classes` has the number of the class of
    each label, by which its name is found in `classes.names`. It consumes the key.

  Raises:
    ValueError: if the classes are something else, such as a split that the data does not have;
      there are fewer classes than ways; a class has too few examples or rows outside the inputs; or
      a number is below 1 (`test_shots` may be 0).
  """
  if not isinstance(classes, Classes):
    raise ValueError(f"classes must be Classes, such as splits.train, not {type(classes).__name__}")
  if ways < 1 or train_shots < 1 or test_shots < 0:
    raise ValueError(
      "ways and train_shots must be at least 1 and test_shots at least 0, "
      f"not {ways}, {train_shots} and {test_shots}"
    )
  num_classes, shots = len(classes.starts), train_shots + test_shots
  if ways > num_classes:
    raise ValueError(
      f"{ways} ways need {ways} classes, and there are {num_classes}: lower the ways, or give this "
      "split more classes, as with the arguments test and validation of few_shot.split and "
      "from_folder"
    )
  starts, sizes = np.asarray(classes.starts), np.asarray(classes.sizes)
  end = num_examples(classes.inputs)
  if starts.shape != sizes.shape or starts.min() < 0 or max(starts + sizes) > end:
    raise ValueError("classes have rows that the inputs lack: make them with from_arrays")
  smallest, largest = int(np.argmin(sizes)), int(np.max(sizes))
  if sizes[smallest] < shots:
    name = repr(classes.names[smallest]) if classes.names else f"number {smallest}"
    raise ValueError(
      f"a task needs {shots} examples of each class, and class {name} has {sizes[smallest]}: lower "
      "the shots, or leave out small classes, as from_arrays and from_folder do with min_examples"
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
      chosen = rows[:, columns].reshape(-1)
      inputs = jax.tree.map(lambda leaf: leaf[chosen], classes.inputs)
      return Examples(inputs, labels[:, columns].reshape(-1))

    return Task(examples(slice(train_shots)), examples(slice(train_shots, None)), chosen)

  return sample
