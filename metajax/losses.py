"""Losses of a minibatch, with an explicit reduction: the paper's code sums, most codes average."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax.types import Apply, Examples, LossFn, Params

Reduction = Literal["sum", "mean"]
_REDUCTIONS = {"sum": jnp.sum, "mean": jnp.mean}


def cross_entropy(apply: Apply, *, reduction: Reduction) -> LossFn:
  """Softmax cross-entropy -log p(y | x) of a minibatch with integer labels, in nats.

  Args:
    apply: `(params, inputs [n, ...]) -> logits [n, classes]`.
    reduction: `"sum"`, as in the paper's code, or `"mean"` over the `n` examples. It scales the
      gradient, which changes the steps of SGD but not those of Adam.

  Raises:
    ValueError: for any other reduction; when called, if the labels are not integers `[n]`.
  """

  def per_example(logits: jax.Array, labels: jax.Array) -> jax.Array:
    _check_labels(logits, labels)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

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
      raise ValueError(f"outputs {outputs.shape} and targets {targets.shape} must have one shape")
    return jnp.sum(jnp.square(outputs - targets).reshape(outputs.shape[0], -1), axis=1)

  return _reduced(apply, per_example, reduction)


def accuracy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """The fraction of `outputs [n, classes]` whose largest entry is at the label in `targets [n]`.

  Raises:
    ValueError: if the labels are not integers `[n]`.
  """
  _check_labels(outputs, targets)
  return jnp.mean(jnp.argmax(outputs, axis=-1) == targets)


def _check_labels(logits: jax.Array, labels: jax.Array) -> None:
  if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers {logits.shape[:-1]} for logits {logits.shape}, not {labels.dtype} "
      f"{labels.shape}: give each example the number of its class"
    )


def _reduced(apply: Apply, per_example: Any, reduction: Reduction) -> LossFn:
  if reduction not in _REDUCTIONS:
    raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")

  def loss_fn(params: Params, examples: Examples) -> jax.Array:
    return _REDUCTIONS[reduction](per_example(apply(params, examples.inputs), examples.targets))

  return loss_fn
