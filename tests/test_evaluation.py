import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import metajax
from metajax.types import Examples, Task
from tests import problems

NETWORK = metajax.models.omniglot(3, filters=4)
APPLY = jax.jit(NETWORK.apply)
PARAMS = jax.jit(NETWORK.init)(jax.random.key(0))


def image_task(seed=0):
  rng = np.random.default_rng(seed)
  examples = lambda n: Examples(
    jnp.asarray(rng.uniform(size=(n, 28, 28, 1)), jnp.float32), jnp.asarray(rng.integers(0, 3, n))
  )
  return Task(examples(6), examples(3))


def test_transductive_predictions_depend_on_the_other_test_inputs():
  task = image_task()
  predict = jax.jit(metajax.transductive(NETWORK.apply))
  np.testing.assert_allclose(
    predict(PARAMS, task), APPLY(PARAMS, task.test.inputs), rtol=1e-4, atol=1e-5
  )
  other = task._replace(test=task.test._replace(inputs=task.test.inputs.at[1:].multiply(0.1)))
  assert not np.allclose(predict(PARAMS, task)[0], predict(PARAMS, other)[0], rtol=1e-3)


def test_inductive_predictions_ignore_the_other_test_inputs():
  task = image_task()
  predict = jax.jit(metajax.inductive(NETWORK.apply))
  outputs = predict(PARAMS, task)
  for row in range(3):
    together = jnp.concatenate([task.train.inputs, task.test.inputs[row : row + 1]])
    np.testing.assert_allclose(outputs[row], APPLY(PARAMS, together)[-1], rtol=1e-4, atol=1e-5)
  other = task._replace(test=task.test._replace(inputs=task.test.inputs.at[1:].multiply(0.1)))
  np.testing.assert_array_equal(predict(PARAMS, other)[0], outputs[0])


@pytest.mark.parametrize("carried", [True, False], ids=["carried state", "fresh state"])
def test_evaluation_adapts_a_copy(carried):
  loss, adam = problems.softmax_loss(), optax.adam(0.05, b1=0.0)
  params = problems.weights()
  task = Task(problems.examples(0, 6), problems.examples(1, 4))
  state = adam.init(params)
  if carried:
    _, state, _ = metajax.reptile(loss, adam).estimate(params, state, problems.episode(2, k=3))
  rows = jnp.array([[0, 1, 2], [3, 4, 5], [1, 3, 5]])
  evaluate = metajax.evaluate(
    loss, adam, lambda key, n: rows, metajax.transductive(lambda weights, x: x @ weights)
  )
  key = jax.random.key(0)
  outputs = jax.jit(evaluate)(params, state if carried else None, key, task)
  phi = params
  for batch in rows:
    grads = jax.grad(loss)(phi, jax.tree.map(lambda leaf, batch=batch: leaf[batch], task.train))
    update, state = adam.update(grads, state, phi)
    phi = phi + update
  np.testing.assert_allclose(outputs, task.test.inputs @ phi, rtol=1e-5)


def test_predictions_of_both_protocols_come_from_one_adaptation():
  task = Task(problems.examples(0, 6), problems.examples(1, 4))
  apply = lambda weights, x: x @ weights
  both = lambda params, task: (
    metajax.transductive(apply)(params, task),
    metajax.inductive(apply)(params, task),
  )
  evaluate = metajax.evaluate(problems.softmax_loss(), optax.sgd(0.1), metajax.cycling(2, 3), both)
  together, apart = evaluate(problems.weights(), None, jax.random.key(0), task)
  np.testing.assert_allclose(together, apart, rtol=1e-5)  # no batch statistics, so no difference


def test_mean_and_interval():
  values = np.random.default_rng(0).normal(size=600)
  mean, interval = metajax.mean_and_interval(values)
  low, high = scipy.stats.t.interval(0.95, 599, values.mean(), scipy.stats.sem(values))
  np.testing.assert_allclose([mean - interval, mean + interval], [low, high])
  np.testing.assert_allclose(interval, 1.96 * values.std() / np.sqrt(600), rtol=5e-3)
  assert metajax.mean_and_interval([0.5]) == (0.5, float("inf"))


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0], 1.0)])
def test_mean_and_interval_refuses(values, confidence):
  with pytest.raises(ValueError, match="at least one value"):
    metajax.mean_and_interval(values, confidence)


def test_the_interval_covers_the_mean_as_often_as_it_says():
  draws = np.random.default_rng(1).binomial(5, 0.9, size=(2000, 40)) / 5
  covered = [abs(m.mean - 0.9) <= m.interval for m in map(metajax.mean_and_interval, draws)]
  assert abs(np.mean(covered) - 0.95) < 0.02
