"""Evaluation on new tasks: adapt to the training examples, then predict the test examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from metajax import checks
from metajax.devices import task_mesh
from metajax.episodes import Schedule, loss_key
from metajax.meta import MetaLearner, MetaState
from metajax.programs import compiled, debugging, on_mesh
from metajax.spread import map_tasks
from metajax.types import Apply, Params, Predict, PRNGKey, SampleTask, Task, num_examples

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
  checks.is_apply(apply)
  return lambda params, task: apply(params, task.test.inputs)


def inductive(apply: Apply) -> Predict:
  """Predicts each test input in a forward pass with all training inputs (Section 6.1).

  No information about the other test inputs is used.

  Returns:
    `(params, task) -> outputs [m, ...]` on the `m` test inputs.
  """

  checks.is_apply(apply)

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
      inner optimizer: a fresh one, or, if that is `carried`, one with the trained state. (`vmapped`
      and `sharded` keep a state for each task of a meta-step; the first one is used.)
    schedule: the minibatches to adapt on, one inner step on each, from `cycling` or `replacement`.
    predict: `transductive`, `inductive` or any `(params, task) -> outputs`, which may return the
      outputs of several protocols.

  Returns:
    `(MetaState, key, task) -> outputs`. It consumes the key.
  """

  def evaluate_task(state: MetaState, key: PRNGKey, task: Task) -> Any:
    rows = schedule(key, num_examples(task.train))
    return predict(learner.adapt(state, task.train, rows, loss_key(key)), task)

  return evaluate_task


def judge(
  evaluate_task: EvaluateTask,
  sample_task: SampleTask,
  metric: Callable[[Any, Any], Any],
  mesh: Mesh | None = None,
  *,
  tasks_per_call: int = 25,
  chunk: int | None = None,
) -> Callable[..., Any]:
  """Evaluates any number of tasks, spread over the devices of a mesh.

  Task number i has the key `fold_in(key, i)`. So a long evaluation can be done in parts, and a part
  of it again: the values do not depend on how it is divided.

  Args:
    evaluate_task: from `evaluate`.
    sample_task: `key -> Task`, traceable by JAX. Data that it closes over becomes an argument of
      the compiled program.
    metric: `(outputs, targets) -> values` of one task, such as `losses.accuracy`.
    mesh: with one axis; by default `task_mesh()`, all devices.
    tasks_per_call: the tasks in one call of the compiled program.
    chunk: how many of a device's tasks run together; by default one on CPU, all elsewhere.

  Returns:
    `(MetaState, key, num_tasks, first=0) -> values`. It judges the tasks from number `first` on;
    the values are NumPy arrays `[num_tasks, ...]`. The program is compiled in the first call. All
    processes that share the mesh must call it together.

  Raises:
    ValueError: if a size is below 1, the mesh has more than one axis or one that is not of the type
      Auto, or, when called, if a task has no test examples.
  """
  mesh = task_mesh() if mesh is None else mesh
  part = judge_part(
    evaluate_task, sample_task, metric, num_tasks=tasks_per_call, mesh=mesh, chunk=chunk
  )
  everywhere = NamedSharding(mesh, PartitionSpec())
  programs: dict[Any, Callable[..., Any]] = {}  # by what they are compiled for

  def judge_tasks(state: MetaState, key: PRNGKey, num_tasks: int, first: int = 0) -> Any:
    checks.at_least_one(num_tasks=num_tasks)
    state, key = on_mesh((state, key), mesh)
    leaves = jax.tree.leaves((state, key))
    like = (
      jax.tree.structure(state),
      *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves),
      debugging(),
      getattr(jax.config, "jax_default_matmul_precision"),  # noqa: B009
    )
    if like not in programs:
      programs[like] = compiled(part, mesh, state, key, np.int32(0), out_shardings=everywhere)
    values = []
    for start in range(first, first + num_tasks, tasks_per_call):
      # One call at a time: two processes might start several in different orders.
      values.append(
        jax.device_get(jax.block_until_ready(programs[like](state, key, np.int32(start))))
      )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_tasks], *values)

  return judge_tasks


def judge_part(
  evaluate_task: EvaluateTask,
  sample_task: SampleTask,
  metric: Callable[[Any, Any], Any],
  *,
  num_tasks: int,
  mesh: Mesh | None = None,
  chunk: int | None = None,
) -> Callable[[MetaState, PRNGKey, int | jax.Array], Any]:
  """Evaluates a fixed number of tasks: the pure function that `judge` compiles and calls.

  Args:
    evaluate_task, sample_task, metric, mesh, chunk: as for `judge`.
    num_tasks: the tasks in one call.

  Returns:
    `(MetaState, key, first) -> values`, to be jitted; the leaves of the values are
    `[num_tasks, ...]`.

  Raises:
    ValueError: if a size is below 1, the mesh has more than one axis or one that is not of the type
      Auto, or, when called, if a task has no test examples.
  """
  checks.at_least_one(num_tasks=num_tasks)

  def judge_task(shared: tuple[MetaState, PRNGKey], index: jax.Array) -> Any:
    state, key = shared
    checks.uses_key(sample_task, key)
    task_key, batch_key = jax.random.split(jax.random.fold_in(key, index))
    task = sample_task(task_key)
    checks.is_task(task)
    if num_examples(task.test) == 0:
      raise ValueError("a task has no test examples to judge by: raise test_shots")
    return metric(evaluate_task(state, batch_key, task), task.test.targets)

  over_tasks = map_tasks(judge_task, mesh, chunk=chunk)
  return lambda state, key, first: over_tasks((state, key), first + jnp.arange(num_tasks))


def mean_and_interval(values: ArrayLike, confidence: float = 0.95) -> Mean:
  """The mean of independent values `[n]` and the half-width of its Student t interval.

  Over hundreds of tasks at 95 % this is the usual 1.96 std / sqrt(n). With one value the
  half-width is infinite. If a value is NaN, so is the mean.

  Raises:
    ValueError: if the values are not a vector, there is none, or the confidence is not between 0
      and 1.
  """
  from scipy.special import stdtrit  # importing it takes a quarter of a second

  sample = np.asarray(values, np.float64)
  if sample.ndim != 1:
    raise ValueError(f"values must be a vector [n], one value for each task, not {sample.shape}")
  if sample.size == 0 or not 0 < confidence < 1:
    raise ValueError("give at least one value and a confidence between 0 and 1")
  if sample.size == 1:
    return Mean(float(sample[0]), float("inf"))
  error = sample.std(ddof=1) / np.sqrt(sample.size)
  quantile = stdtrit(sample.size - 1, 0.5 + confidence / 2)
  return Mean(float(sample.mean()), float(quantile * error))
