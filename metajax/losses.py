"""Losses of a minibatch, with an explicit reduction: the paper's code sums, most codes average."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import checks
from metajax.types import Apply, Examples, LossFn, Params

Reduction = Literal["sum", "mean"]
_REDUCTIONS = {"sum": jnp.sum, "mean": jnp.mean}


def cross_entropy(apply: Apply, *, reduction: Reduction) -> LossFn:
  """Softmax cross-entropy -log p(y | x) of a minibatch with integer labels, in nats.

  Args:
    apply: `(params, inputs [n, ...]) -> logits [n, classes]`, or `[n, ..., classes]` where an
      example has several labels, as the words of a text.
    reduction: `"sum"`, as in the paper's code, or `"mean"` over all labels. It scales the gradient,
      which changes the steps of SGD but not those of Adam.

  Raises:
    ValueError: for any other reduction; when called, if the labels are not integers `[n, ...]`, one
      for each row of logits, from 0 to classes - 1. Inside of `jit`, where the labels are not
      known, one that is out of range makes the loss and its gradient NaN instead.
  """

  def per_example(logits: jax.Array, labels: jax.Array) -> jax.Array:
    _check_labels(logits, labels)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(_wide(logits), labels)
    # The factor 0 / 0 makes the gradient NaN as well, so that a wrong label cannot go unnoticed.
    known = _are_classes(logits, labels).astype(losses.dtype)
    return losses * (known / known)

  return _reduced(apply, per_example, reduction)


def squared_error(apply: Apply, *, reduction: Reduction) -> LossFn:
  """Squared error ||f(x) - y||^2 of a minibatch, in squared units of the targets.

  Args:
    apply: `(params, inputs [n, ...]) -> outputs`, of the targets' shape `[n, ...]`.
    reduction: `"sum"` or `"mean"` over the `n` examples; an example's own components are summed.

  Raises:
    ValueError: for any other reduction; when called, if the two shapes differ.
  """

  def per_example(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    if outputs.shape != targets.shape:
      raise ValueError(
        f"outputs {outputs.shape} and targets {targets.shape} must have the same shape: reshape one"
      )
    squares = jnp.square(_wide(outputs) - _wide(targets))
    return jnp.sum(squares.reshape(outputs.shape[0], -1), axis=1)

  return _reduced(apply, per_example, reduction)


def accuracy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """The fraction of `outputs [..., classes]` whose largest entry is at the label, `targets [...]`.

  It is NaN if an output is NaN.

  Raises:
    ValueError: if the labels are not integers `[...]` from 0 to classes - 1. Inside of `jit`, where
      the labels are not known, the accuracy is NaN instead if one is out of range.
  """
  outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
  _check_labels(outputs, targets)
  known = _are_classes(outputs, targets) & ~jnp.isnan(outputs).any(axis=-1)
  right = known & (jnp.argmax(outputs, axis=-1) == targets)
  return jnp.mean(right / known.astype(float))  # 0 / 0 is NaN


def _check_labels(logits: jax.Array, labels: jax.Array) -> None:
  if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers {logits.shape[:-1]} for logits {logits.shape}, not {labels.dtype} "
      f"{labels.shape}: give each example the number of its class"
    )
  if isinstance(labels, jax.core.Tracer):
    return
  values = np.asarray(labels)
  if not np.all(_are_classes(logits, values)):
    raise ValueError(
      f"labels must be from 0 to {logits.shape[-1] - 1} for {logits.shape[-1]} outputs, not from "
      f"{values.min()} to {values.max()}: number the classes of a task from 0, and give the "
      "network an output for each"
    )


def _wide(outputs: jax.Array) -> jax.Array:
  """The outputs in at least float32: in bfloat16, a small loss would be rounded to 0."""
  return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def _are_classes(logits: jax.Array, labels: Any) -> Any:
  """Whether each label is the number of an output."""
  # The largest label as one of their type: 256 would be 0 among labels of 8 bits.
  largest = min(logits.shape[-1] - 1, jnp.iinfo(labels.dtype).max)
  return (labels >= 0) & (labels <= largest)


def _reduced(apply: Apply, per_example: Any, reduction: Reduction) -> LossFn:
  checks.is_apply(apply)
  if reduction not in _REDUCTIONS:
    raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")

  def loss_fn(params: Params, examples: Examples) -> jax.Array:
    targets = examples.targets
    if not isinstance(targets, jax.Array):  # a list, or NumPy's, whose values jit knows
      targets = np.asarray(targets)
    return _REDUCTIONS[reduction](per_example(apply(params, examples.inputs), targets))

  return loss_fn
