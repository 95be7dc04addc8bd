"""Evaluation on new tasks: adapt to the training examples, then predict the test examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from metajax.episodes import Schedule
from metajax.execution import map_tasks
from metajax.meta import MetaLearner, MetaState
from metajax.types import Apply, Params, PRNGKey, SampleTask, Task, num_examples

Predict = Callable[[Params, Task], Any]
EvaluateTask = Callable[[MetaState, PRNGKey, Task], Any]


class Mean(NamedTuple):
  """A sample mean, and the half-width of its confidence interval: mean +- interval."""

  mean: float
  interval: float


def transductive(apply: Apply) -> Predict:
  """Predicts all test inputs in one forward pass (Section 6.1).

  If the network normalizes by batch statistics, the test inputs share information in this way.

  Returns:
    `(params, task) -> outputs [m, ...]` on the `m` test inputs.
  """
  return lambda params, task: apply(params, task.test.inputs)


def inductive(apply: Apply) -> Predict:
  """Predicts each test input in a forward pass with all training inputs (Section 6.1).

  No information about the other test inputs is used.

  Returns:
    `(params, task) -> outputs [m, ...]` on the `m` test inputs.
  """

  def predict(params: Params, task: Task) -> Any:
    def one(test_input: Any) -> Any:
      inputs = jax.tree.map(
        lambda train, test: jnp.concatenate([train, test[None]]), task.train.inputs, test_input
      )
      return jax.tree.map(lambda leaf: leaf[-1], apply(params, inputs))

    return jax.lax.map(one, task.test.inputs)  # one pass at a time: each holds all train inputs

  return predict


def evaluate(learner: MetaLearner, schedule: Schedule, predict: Predict) -> EvaluateTask:
  """Adapts a copy of the learner to one task and predicts; the learner itself does not change.

  Args:
    learner: from `meta_learner`, whatever its algorithm and its execution. It adapts with its own
      inner optimizer: a fresh one, or, if that is `carried`, one with the trained state.
    schedule: the minibatches to adapt on, from `cycling` or `replacement`.
    predict: `transductive`, `inductive` or any `(params, task) -> outputs`, which may return the
      outputs of several protocols.

  Returns:
    `(MetaState, key, task) -> outputs`. It consumes the key.
  """

  def evaluate_task(state: MetaState, key: PRNGKey, task: Task) -> Any:
    rows = schedule(key, num_examples(task.train))
    return predict(learner.adapt(state, task.train, rows), task)

  return evaluate_task


def judge(
  evaluate_task: EvaluateTask,
  sample_task: SampleTask,
  metric: Callable[[Any, Any], Any],
  num_tasks: int,
  mesh: Mesh | None = None,
  *,
  chunk: int | None = None,
) -> Callable[[MetaState, PRNGKey, int | jax.Array], Any]:
  """Evaluates many tasks, spread over the devices of a mesh.

  Task number i has the key `fold_in(key, i)`, so that many tasks can be judged in several calls,
  and a part of them again.

  Args:
    evaluate_task: from `evaluate`.
    sample_task: `key -> Task`.
    metric: `(outputs, targets) -> values` of one task, such as `losses.accuracy`.
    num_tasks: how many tasks are judged in one call.
    mesh: with one axis; by default `task_mesh()`, all devices.
    chunk: how many of a device's tasks run together; by default one on CPU, all elsewhere.

  Returns:
    `(MetaState, key, first) -> values`, to be jitted; it judges the tasks from number `first` on,
    and the leaves of the values are `[num_tasks, ...]`.

  Raises:
    ValueError: if a size is below 1, or the mesh has more than one axis.
  """
  if num_tasks < 1:
    raise ValueError(f"num_tasks must be at least 1, not {num_tasks}")

  def judge_task(shared: tuple[MetaState, PRNGKey], index: jax.Array) -> Any:
    state, key = shared
    task_key, batch_key = jax.random.split(jax.random.fold_in(key, index))
    task = sample_task(task_key)
    return metric(evaluate_task(state, batch_key, task), task.test.targets)

  over_tasks = map_tasks(judge_task, mesh, chunk=chunk)
  return lambda state, key, first: over_tasks((state, key), first + jnp.arange(num_tasks))


def mean_and_interval(values: ArrayLike, confidence: float = 0.95) -> Mean:
  """The mean of independent values `[n]` and the half-width of its Student t interval.

  Over hundreds of tasks at 95 % this is the usual 1.96 std / sqrt(n). With one value the
  half-width is infinite.

  Raises:
    ValueError: if there is no value, or the confidence is not between 0 and 1.
  """
  sample = np.asarray(values, np.float64).reshape(-1)
  if sample.size == 0 or not 0 < confidence < 1:
    raise ValueError("give at least one value and a confidence between 0 and 1")
  if sample.size == 1:
    return Mean(float(sample[0]), float("inf"))
  error = sample.std(ddof=1) / np.sqrt(sample.size)
  quantile = scipy.special.stdtrit(sample.size - 1, 0.5 + confidence / 2)
  return Mean(float(sample.mean()), float(quantile * error))
