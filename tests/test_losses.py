import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import losses
from metajax.types import Examples

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
LABELS = np.array([0, 2])
PER_EXAMPLE = [np.log(np.exp(row).sum()) - row[y] for row, y in zip(LOGITS, LABELS, strict=True)]


def evaluate(factory, reduction, outputs, targets):
  loss = factory(lambda params, inputs: params, reduction=reduction)
  return loss(jnp.asarray(outputs), Examples(None, jnp.asarray(targets)))


@pytest.mark.parametrize(("reduction", "reduce"), [("sum", np.sum), ("mean", np.mean)])
def test_reductions(reduction, reduce):
  np.testing.assert_allclose(
    evaluate(losses.cross_entropy, reduction, LOGITS, LABELS), reduce(PER_EXAMPLE), rtol=1e-6
  )
  outputs = np.array([[1.0, 2.0], [0.0, 3.0], [7.0, 7.0]])
  targets = np.array([[0.0, 0.0], [1.0, 1.0], [7.0, 4.0]])
  np.testing.assert_allclose(
    evaluate(losses.squared_error, reduction, outputs, targets), reduce([5.0, 5.0, 9.0]), rtol=1e-6
  )


def test_an_example_may_have_several_labels():
  logits, labels = jnp.asarray(np.stack([LOGITS, 2 * LOGITS])), jnp.array([[0, 2], [1, 2]])
  for reduction in ("sum", "mean"):
    found = evaluate(losses.cross_entropy, reduction, logits, labels)
    flat = evaluate(losses.cross_entropy, reduction, logits.reshape(4, 3), labels.reshape(4))
    np.testing.assert_allclose(found, flat, rtol=1e-6)


@pytest.mark.parametrize("make", [losses.cross_entropy, losses.squared_error])
def test_losses_of_bfloat16_are_computed_in_float32(make):
  """In bfloat16, a loss of 0.01 beside logits near 10 would be 0."""
  outputs = jnp.array([[10.0, 5.0, 4.0], [0.5, 9.0, 3.0]], jnp.bfloat16)
  targets = jnp.array([0, 1]) if make is losses.cross_entropy else (outputs * 1.02)
  found = evaluate(make, "sum", outputs, targets)
  as_wide = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
  assert found.dtype == jnp.float32 and found > 0
  assert found == evaluate(make, "sum", as_wide(outputs), as_wide(targets))


def test_healthy_data_can_be_debugged():
  """No NaN is made on the way, at which `jax_debug_nans` would stop."""
  with jax.disable_jit(), jax.debug_nans(True):
    assert evaluate(losses.cross_entropy, "sum", LOGITS, LABELS) > 0
    assert losses.accuracy(LOGITS, LABELS) == 0.5


def test_labels_may_be_a_list_and_are_known_inside_of_jit():
  loss = losses.cross_entropy(lambda params, inputs: params, reduction="sum")
  of_labels = lambda labels: jax.jit(lambda logits: loss(logits, Examples(None, labels)))
  logits = jnp.asarray(LOGITS)
  assert loss(logits, Examples(None, list(LABELS))) == loss(logits, Examples(None, LABELS))
  for bad in (BAD_LABELS[0], BAD_LABELS[0].tolist()):
    with pytest.raises(ValueError, match="labels must be from 0 to 2 for 3 outputs, not from 1"):
      of_labels(bad)(logits)


def test_accuracy():
  outputs = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [0.1, 0.2, 0.3], [1.0, 0.0, 0.0]])
  labels = jnp.array([0, 1, 2, 1])
  assert losses.accuracy(outputs, labels) == 0.75
  assert losses.accuracy(np.asarray(outputs).tolist(), [0, 1, 2, 1]) == 0.75
  # An example may have several places, as a text has.
  assert losses.accuracy(outputs.reshape(2, 2, 3), labels.reshape(2, 2)) == 0.75


BAD_LABELS = [np.array([1, 3]), np.array([-1, 0]), np.array([105, 964])]


@pytest.mark.parametrize("labels", BAD_LABELS, ids=str)
def test_labels_that_are_no_classes_are_refused_or_give_nan(labels):
  """Refused where they are known; else the loss, its gradient and the accuracy are NaN."""
  loss = losses.cross_entropy(lambda params, inputs: params, reduction="mean")
  for call in (
    lambda: evaluate(losses.cross_entropy, "sum", LOGITS, labels),
    lambda: losses.accuracy(LOGITS, labels),
  ):
    with pytest.raises(ValueError, match=r"labels must be from 0 to 2 for 3 outputs, not from"):
      call()
  traced = lambda logits, labels: loss(logits, Examples(None, labels))
  value, gradient = jax.jit(jax.value_and_grad(traced))(jnp.asarray(LOGITS), labels)
  assert np.isnan(value) and np.isnan(gradient).any()
  assert np.isnan(jax.jit(losses.accuracy)(jnp.asarray(LOGITS), labels))


def test_accuracy_of_nan_is_nan():
  """And not that of class 0, which argmax returns."""
  outputs = jnp.asarray(LOGITS).at[1, 2].set(jnp.nan)
  assert np.isnan(losses.accuracy(outputs, jnp.array([0, 0])))


def test_the_reduction_must_be_named():
  with pytest.raises(ValueError, match="'sum' or 'mean', not 'average'"):
    losses.cross_entropy(lambda params, inputs: params, reduction="average")


def test_squared_error_does_not_broadcast():
  with pytest.raises(ValueError, match="must have the same shape"):
    evaluate(losses.squared_error, "sum", np.zeros((3, 1)), np.zeros(3))


@pytest.mark.parametrize(("dtype", "classes"), [("uint8", 256), ("uint8", 300), ("int8", 200)])
def test_labels_of_8_bits(dtype, classes):
  """Compared in 8 bits, 256 classes would be 0, and no label one of them."""
  labels = jnp.array([0, 5, 127], dtype)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, classes)), jnp.float32)
  expected = -np.sum(jax.nn.log_softmax(logits)[np.arange(3), np.asarray(labels, int)])
  loss = losses.cross_entropy(lambda params, inputs: inputs, reduction="sum")
  for found in (loss, jax.jit(loss)):
    np.testing.assert_allclose(found(None, Examples(logits, labels)), expected, rtol=1e-5)
  for found in (losses.accuracy, jax.jit(losses.accuracy)):
    assert found(jax.nn.one_hot(labels, classes), labels) == 1
