"""The authors' TensorFlow 1 code, traced on real Omniglot images, replayed through the public API.

Each outer step starts from the recorded state. Batch normalization cancels the convolutions'
biases, so they are left out: their gradients are rounding noise, which Adam blows up. On some steps
a ReLU sits at a tie on the constant background and tips over for all of it: so of the steps of a
case the best must agree closely, and all of them in direction.

`reptile_sgd_step.npz` holds the first step of the case `reptile_sgd`, so that one trace is compared
wherever the tests run: the parameters before it, its images packed into bits, and every 16th entry
of each parameter array after it.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax

CASES = {
  "reptile_adam": ("reptile", "adam"),
  "reptile_adam_replacement": ("reptile", "adam"),
  "reptile_sgd": ("reptile", "sgd"),
  "fomaml_shared_tail_sgd": ("last", "sgd"),
  "fomaml_separate_tail_sgd": ("last", "sgd"),
  "fomaml_separate_tail_adam": ("last", "adam"),
}
OUTER_STEPS = 3
THINNED = 16  # of so many entries, `reptile_sgd_step.npz` has the first
MODEL = metajax.models.omniglot(5)
LOSS = metajax.losses.cross_entropy(MODEL.apply, reduction="sum")
INNER = {  # as in the authors' code, which hands the state from task to task
  "adam": metajax.carried(optax.adam(1e-3, b1=0.0, b2=0.999, eps=1e-8)),
  "sgd": metajax.carried(optax.sgd(3e-3)),
}


def tensorflow_names():
  for layer in range(4):
    suffix = f"_{layer}" if layer else ""
    yield f"conv2d{suffix}/kernel", f"Conv_{layer}", "kernel"
    yield f"conv2d{suffix}/bias", f"Conv_{layer}", "bias"
    yield f"batch_normalization{suffix}/gamma", f"BatchStatsNorm_{layer}", "scale"
    yield f"batch_normalization{suffix}/beta", f"BatchStatsNorm_{layer}", "bias"
  yield "dense/kernel", "Dense_0", "kernel"
  yield "dense/bias", "Dense_0", "bias"


class Trace:
  def __init__(self, path):
    with np.load(path, allow_pickle=False) as file:
      self.arrays = dict(file)

  def tree(self, step, suffix=""):
    """Parameters, or what Adam keeps for them, after outer step 0 (the start) ... 3."""
    when = f"after_step_{step}" if step else "init"
    tree = {}
    for name, module, parameter in tensorflow_names():
      tree.setdefault(module, {})[parameter] = jnp.asarray(self.arrays[f"{when}/{name}{suffix}"])
    return tree

  def inner_state(self, step, optimizer):
    params = self.tree(step)
    fresh = INNER[optimizer].init(params)
    if optimizer == "sgd":
      return fresh
    when = f"after_step_{step}" if step else "init"
    count = round(np.log(self.arrays[f"{when}/beta2_power"]) / np.log(0.999)) - 1
    adam = fresh[0]._replace(count=jnp.int32(count), nu=self.tree(step, "/Adam_1"))
    return (adam, *fresh[1:])

  def episodes(self, step):
    """The minibatches of the step's tasks, in the order in which they ran."""
    inputs = images(self.arrays["batches/inputs"][step - 1])  # [tasks, k, 10, 28, 28, 1]
    targets = jnp.asarray(self.arrays["batches/targets"][step - 1])
    if "tail/inputs" in self.arrays:
      tail = images(self.arrays["tail/inputs"][step - 1]), self.arrays["tail/targets"][step - 1]
    else:
      tail, inputs, targets = (inputs[:, -1], targets[:, -1]), inputs[:, :-1], targets[:, :-1]
    tasks, steps, batch = inputs.shape[:3]
    merge = lambda leaf: leaf.reshape(tasks, steps * batch, *leaf.shape[3:])
    rows = jnp.arange(steps * batch, dtype=jnp.int32).reshape(steps, batch)
    return metajax.Episode(
      metajax.Examples(merge(inputs), merge(targets)),
      jnp.broadcast_to(rows, (tasks, steps, batch)),
      metajax.Examples(*map(jnp.asarray, tail)),
    )


def images(recorded):
  return jnp.asarray(recorded, jnp.float32)[..., None]


def flat(tree):
  """All parameters but the convolutions' biases, as one vector."""
  kept = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if not ("Conv" in path[0].key and path[1].key == "bias")
  ]
  return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in kept])


def compare(actual, expected):
  error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
  cosine = actual @ expected / np.linalg.norm(actual) / np.linalg.norm(expected)
  return error, cosine


@cache
def step_of(algorithm, optimizer, num_tasks):
  """The learner, and its jitted meta-step."""
  if algorithm == "reptile":
    one = metajax.reptile(LOSS, INNER[optimizer])
  else:  # the authors' FOML applies the last of the three updates
    one = metajax.combine(LOSS, INNER[optimizer], [0, 0, 1], of_updates=True)
  # The outer step is 0.5 (1 - i / 3).
  outer = optax.sgd(optax.linear_schedule(0.5, 0.0, OUTER_STEPS))
  learner = metajax.meta_learner(one, outer, metajax.serial(num_tasks))
  return learner, jax.jit(learner.step)


def test_a_step_of_reptile():
  trace = Trace(Path(__file__).with_name("reptile_sgd_step.npz"))
  packed = trace.arrays["batches/inputs"]
  trace.arrays["batches/inputs"] = np.unpackbits(packed, axis=-1, count=28)
  learner, step_fn = step_of("reptile", "sgd", packed.shape[1])
  before = trace.tree(0)
  after, _ = step_fn(learner.init(before), trace.episodes(1))
  thin = lambda tree: flat(jax.tree.map(lambda leaf: leaf.reshape(-1)[::THINNED], tree))
  error, cosine = compare(thin(after.params) - thin(before), flat(trace.tree(1)) - thin(before))
  assert error < 1e-3
  assert cosine > 0.999999


@pytest.mark.parametrize("case", CASES)
def test_outer_steps(case, shared):
  trace = Trace(shared(f"golden/{case}.npz"))
  algorithm, optimizer = CASES[case]
  learner, step_fn = step_of(algorithm, optimizer, trace.arrays["batches/inputs"].shape[1])
  found = []
  for step in range(1, OUTER_STEPS + 1):
    before = trace.tree(step - 1)
    state = learner.init(before)
    outer_state = jax.tree.map(lambda leaf, step=step: jnp.full_like(leaf, step - 1), state.outer)
    state = state._replace(outer=outer_state, inner=trace.inner_state(step - 1, optimizer))
    after, _ = step_fn(state, trace.episodes(step))
    start = flat(before)
    found.append(compare(flat(after.params) - start, flat(trace.tree(step)) - start))
    if optimizer == "adam":
      expected = trace.inner_state(step, optimizer)[0]
      assert after.inner[0].count == expected.count
      assert compare(flat(after.inner[0].nu), flat(expected.nu))[1] > 0.99
  errors, cosines = zip(*found, strict=True)
  assert min(errors) < 1e-3, found
  assert min(cosines) > 0.97, found


@cache
def judge_of(optimizer, protocol):
  """The learner, and `(state, task, rows) -> outputs`, jitted."""
  gradient = metajax.reptile(LOSS, INNER[optimizer])
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.serial(1))
  predict = getattr(metajax, protocol)(MODEL.apply)

  @jax.jit
  def judge(state, task, rows):
    return metajax.evaluate(learner, lambda key, n: rows, predict)(state, jax.random.key(0), task)

  return learner, judge


@pytest.mark.parametrize("protocol", ["transductive", "inductive"])
@pytest.mark.parametrize("case", CASES)
def test_evaluation(case, protocol, shared):
  trace = Trace(shared(f"golden/{case}.npz"))
  optimizer = CASES[case][1]
  recorded = lambda name: trace.arrays[f"evaluation/{name}"]
  train = metajax.Examples(images(recorded("train_inputs")), jnp.asarray(recorded("train_targets")))
  test = metajax.Examples(images(recorded("test_inputs")), jnp.asarray(recorded("test_targets")))
  distance = np.abs(
    recorded("batches_inputs")[:, :, None].astype(int) - recorded("train_inputs").astype(int)
  ).sum(axis=(-2, -1))
  rows = jnp.asarray(distance.argmin(axis=-1), jnp.int32)
  assert distance.min(axis=-1).max() == 0
  np.testing.assert_array_equal(train.targets[rows], recorded("batches_targets"))

  learner, judge = judge_of(optimizer, protocol)
  trained = learner.init(trace.tree(OUTER_STEPS))
  trained = trained._replace(inner=trace.inner_state(OUTER_STEPS, optimizer))
  outputs = judge(trained, metajax.Task(train, test), rows)
  predictions = trace.arrays[f"evaluation_{protocol}/predictions"]
  # Of five predictions at most one may be a tie that rounding decides.
  assert np.sum(np.argmax(outputs, axis=-1) == predictions) >= 4
