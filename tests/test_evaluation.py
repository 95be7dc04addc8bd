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


def linear(weights, x):
  return x @ weights


EXECUTIONS = {
  "vmapped": metajax.vmapped(2),
  "chunked": metajax.vmapped(2, chunk=1),
  "serial": metajax.serial(2),
  "sharded": metajax.sharded(2),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("carried", [True, False], ids=["carried state", "fresh state"])
def test_evaluation_adapts_a_copy_whatever_the_execution(carried, execution):
  """It starts from the state that the first task of the meta-batch left, or from a fresh one."""
  loss, adam = problems.softmax_loss(), optax.adam(0.05, b1=0.0)
  inner = metajax.carried(adam) if carried else adam
  learner = metajax.meta_learner(
    metajax.reptile(loss, inner), optax.sgd(0.5), EXECUTIONS[execution]
  )
  # Both tasks are the same, so that serial's one state has seen the task twice, the others once.
  step = jax.jit(learner.step)
  trained, _ = step(learner.init(problems.weights()), problems.episodes((2, 2), k=3))
  task = Task(problems.examples(0, 6), problems.examples(1, 4))
  rows = jnp.array([[0, 1, 2], [3, 4, 5], [1, 3, 5]])
  evaluate = metajax.evaluate(learner, lambda key, n: rows, metajax.transductive(linear))
  outputs = jax.jit(evaluate)(trained, jax.random.key(0), task)

  state = adam.init(problems.weights())
  for _ in range(0 if not carried else 2 if execution == "serial" else 1):
    phi = problems.weights()
    for inputs, targets in problems.batches(problems.episode(2, k=3)):
      update, state = adam.update(jax.grad(loss)(phi, Examples(inputs, targets)), state, phi)
      phi = phi + update
  phi = np.asarray(trained.params)
  for batch in rows:
    grads = jax.grad(loss)(phi, jax.tree.map(lambda leaf, batch=batch: leaf[batch], task.train))
    update, state = adam.update(grads, state, phi)
    phi = phi + update
  np.testing.assert_allclose(outputs, task.test.inputs @ phi, rtol=1e-4)


def softmax_learner():
  gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(0.1))
  return metajax.meta_learner(gradient, optax.sgd(1.0), metajax.vmapped(1))


def test_predictions_of_both_protocols_come_from_one_adaptation():
  task = Task(problems.examples(0, 6), problems.examples(1, 4))
  both = lambda params, task: (
    metajax.transductive(linear)(params, task),
    metajax.inductive(linear)(params, task),
  )
  learner = softmax_learner()
  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), both)
  state = learner.init(problems.weights())
  together, apart = jax.jit(evaluate)(state, jax.random.key(0), task)
  np.testing.assert_allclose(together, apart, rtol=1e-5)  # no batch statistics, so no difference


def test_many_tasks_are_judged_as_each_alone_in_any_number_of_calls():
  learner, key = softmax_learner(), jax.random.key(4)
  state = learner.init(problems.weights())
  pool = problems.examples(3, 40)

  def sample_task(key):
    rows = jax.random.permutation(key, 40)
    part = lambda rows: jax.tree.map(lambda leaf: leaf[rows], pool)
    return Task(part(rows[:6]), part(rows[6:11]))

  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), metajax.transductive(linear))
  judge = metajax.judge(evaluate, sample_task, metajax.losses.accuracy, tasks_per_call=3)
  together = judge(state, key, 7)
  np.testing.assert_array_equal(
    np.concatenate([judge(state, key, 2), judge(state, key, 5, 2)]), together
  )
  for index in range(7):
    task_key, batch_key = jax.random.split(jax.random.fold_in(key, index))
    task = sample_task(task_key)
    outputs = np.asarray(evaluate(state, batch_key, task))
    assert together[index] == pytest.approx(np.mean(outputs.argmax(1) == task.test.targets))
  assert len(set(together.tolist())) > 1
  np.testing.assert_array_equal(judge(state, jax.random.key_data(key), 7), together)
  with pytest.raises(ValueError, match="num_tasks must be at least 1"):
    judge(state, key, 0)
  with pytest.raises(ValueError, match="num_tasks must be at least 1"):
    metajax.judge(evaluate, sample_task, metajax.losses.accuracy, tasks_per_call=0)


def test_a_state_may_have_been_moved_between_two_judgements():
  inner = metajax.carried(optax.adam(0.1, b1=0.0))
  gradient = metajax.reptile(problems.softmax_loss(), inner)
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.sharded(2))
  draw = lambda key: jax.tree.map(lambda leaf: jax.random.permutation(key, leaf), task)
  task = Task(problems.examples(0, 6), problems.examples(1, 4))
  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), metajax.transductive(linear))
  judge = metajax.judge(evaluate, draw, metajax.losses.accuracy, tasks_per_call=2)
  start, key = learner.init(problems.weights()), jax.random.key(0)
  spread = metajax.programs.on_mesh(start, metajax.task_mesh())
  rows = jax.NamedSharding(metajax.task_mesh(), jax.P("tasks"))
  spread = spread._replace(inner=jax.device_put(spread.inner, rows))
  np.testing.assert_array_equal(judge(spread, key, 2), judge(jax.device_get(start), key, 2))


@pytest.mark.filterwarnings("ignore:sample_task does not use its key")
def test_a_judge_is_compiled_again_where_jax_is_set_otherwise():
  """To debug a program, and where matrix products are to be more precise."""
  learner, traced = softmax_learner(), []
  draw = lambda key: Task(*(problems.examples(seed, 6) for seed in (0, 1)))

  def metric(outputs, targets):
    traced.append(None)
    return metajax.losses.accuracy(outputs, targets)

  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), metajax.transductive(linear))
  judge = metajax.judge(evaluate, draw, metric, metajax.task_mesh(jax.devices()[:1]))
  state = learner.init(problems.weights())
  found = judge(state, jax.random.key(0), 2)
  calls = len(traced)
  judge(state, jax.random.key(0), 2)
  assert len(traced) == calls
  with jax.default_matmul_precision("float32"):
    np.testing.assert_allclose(judge(state, jax.random.key(0), 2), found)
  assert len(traced) > calls
  infinite = state._replace(params=state.params * jnp.inf)
  with jax.debug_nans(True), pytest.raises(FloatingPointError):
    judge(infinite, jax.random.key(0), 2)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_mean_and_interval(confidence):
  values = np.random.default_rng(0).normal(size=20)
  mean, interval = metajax.mean_and_interval(values, confidence)
  low, high = scipy.stats.t.interval(confidence, 19, values.mean(), scipy.stats.sem(values))
  np.testing.assert_allclose([mean - interval, mean + interval], [low, high])


def test_the_interval_of_many_values_is_the_usual_one():
  values = np.random.default_rng(0).normal(size=600)
  interval = metajax.mean_and_interval(values).interval
  np.testing.assert_allclose(interval, 1.96 * values.std() / np.sqrt(600), rtol=5e-3)
  assert metajax.mean_and_interval([0.5]) == (0.5, float("inf"))


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([1.0], 1.0), ([1.0, 2.0], 0.0)])
def test_mean_and_interval_refuses(values, confidence):
  with pytest.raises(ValueError, match="at least one value"):
    metajax.mean_and_interval(values, confidence)


@pytest.mark.parametrize("values", [0.5, [[1.0, 2.0], [3.0, 4.0]]])
def test_mean_and_interval_refuses_what_is_no_vector(values):
  with pytest.raises(ValueError, match="must be a vector"):
    metajax.mean_and_interval(values)


def test_the_interval_covers_the_mean_as_often_as_it_says():
  draws = np.random.default_rng(1).binomial(5, 0.9, size=(2000, 40)) / 5
  covered = [abs(m.mean - 0.9) <= m.interval for m in map(metajax.mean_and_interval, draws)]
  assert abs(np.mean(covered) - 0.95) < 0.02
