"""Judging an initialization on new tasks: adapt on the train examples, predict the test ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from numpy.typing import ArrayLike

from metajax.inner import LearnerState, inner_update
from metajax.minibatches import Schedule
from metajax.types import Apply, InnerState, LossFn, Params, PRNGKey, Task, num_examples

Predict = Callable[[Params, Task], Any]
EvaluateTask = Callable[[Params, InnerState, PRNGKey, Task], Any]


class Mean(NamedTuple):
  """A sample mean and the half-width of its confidence interval: mean +- interval."""

  mean: float
  interval: float


def transductive(apply: Apply) -> Predict:
  """All test inputs in one forward pass, so that batch statistics leak between them (Section 6.1).

  Returns:
    `(params, task) -> outputs [m, ...]` on the `m` test inputs.
  """
  return lambda params, task: apply(params, task.test.inputs)


def inductive(apply: Apply) -> Predict:
  """Each test input in a pass of its own, with all train inputs and no other (Section 6.1).

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


def evaluate(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  predict: Predict,
) -> EvaluateTask:
  """Adapts a copy of the learner to one task and predicts; the learner itself stays as it was.

  Args:
    loss_fn: `(params, batch) -> scalar`.
    optimizer: the inner optimizer of the training run.
    schedule: the minibatches to adapt on, from `cycling` or `replacement`.
    predict: `transductive`, `inductive` or any `(params, task) -> outputs`; it may return both.

  Returns:
    `(params, inner_state, key, task) -> outputs`; it consumes the key. The inner state is the
    trained run's (for `batched`, that of one slot), or None for a fresh optimizer; none is
    returned.
  """

  def evaluate_task(params: Params, inner_state: InnerState, key: PRNGKey, task: Task) -> Any:
    opt_state = optimizer.init(params) if inner_state is None else inner_state
    learner = LearnerState(params, opt_state)
    rows = schedule(key, num_examples(task.train))
    learner, _ = inner_update(loss_fn, optimizer, learner, task.train, rows)
    return predict(learner.params, task)

  return evaluate_task


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
