"""Losses that draw random numbers, return metrics, or differ inside and in the outer step."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from tests import problems

RATE = 0.03
KEY = jax.random.key(5)


def noisy(params, batch, key):
  """Softmax regression with dropout of the inputs, and its accuracy as a metric."""
  mask = jax.random.bernoulli(key, 0.7, batch.inputs.shape)
  logits = (batch.inputs * mask) @ params
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
  correct = jnp.argmax(logits, axis=1) == batch.targets
  return jnp.sum(losses), {"accuracy": jnp.mean(correct), "kept": jnp.sum(mask)}


def outer(params, batch):
  return jnp.sum((batch.inputs @ params) ** 2), {"outer": jnp.float32(3)}


def plainly(params, episode, last_loss=noisy):
  """The parameters before the last loss, and all losses and metrics, by a Python loop."""
  losses, metrics = [], []
  for i, rows in enumerate(np.asarray(episode.schedule)):
    batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], episode.pool)
    key = jax.random.fold_in(episode.key, i)
    (loss, metric), grad = jax.value_and_grad(noisy, has_aux=True)(params, batch, key)
    params = params - RATE * grad
    losses.append(loss)
    metrics.append(metric)
  if last_loss is noisy:
    key = jax.random.fold_in(episode.key, len(losses))
    last, metric = noisy(params, episode.tail, key)
  else:
    last, metric = last_loss(params, episode.tail)
  return params, [*losses, last], [*metrics, metric]


def keyed(number):
  return problems.episode(number, k=4)._replace(key=jax.random.fold_in(KEY, number))


def expected(algorithm, params, episode):
  if algorithm == "maml":
    return jax.grad(lambda params: plainly(params, episode)[1][-1])(params)
  before, _, _ = plainly(params, episode)
  key = jax.random.fold_in(episode.key, 3)
  last = jax.grad(lambda params: noisy(params, episode.tail, key)[0])(before)
  return last if algorithm == "fomaml" else params - (before - RATE * last)


ALGORITHMS = {
  "reptile": metajax.reptile,
  "fomaml": metajax.fomaml,
  "maml": metajax.maml,
  "maml_reverse": lambda loss, inner: metajax.maml(loss, inner, mixed_mode=False),
  "maml_remat": lambda loss, inner: metajax.maml(loss, inner, remat=True),
  "combine": lambda loss, inner: metajax.combine(loss, inner, np.full(4, RATE)),
  "maml_multi_step": lambda loss, inner: metajax.variants.multi_step(loss, inner, [0, 0, 1]),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_step_has_a_key_and_metrics_of_its_own(x64, name):
  params, episode = problems.weights(), keyed(1)
  gradient, _, info = jax.jit(ALGORITHMS[name](noisy, optax.sgd(RATE)).estimate)(
    params, (), episode
  )
  algorithm = {"combine": "reptile"}.get(name, name.split("_")[0])
  np.testing.assert_allclose(gradient, expected(algorithm, params, episode), rtol=1e-9, atol=1e-12)
  _, losses, metrics = plainly(params, episode)
  np.testing.assert_allclose(info.losses, losses, rtol=1e-12)
  assert set(info.metrics) == {"accuracy", "kept"}
  for metric in info.metrics:
    np.testing.assert_allclose(info.metrics[metric], [one[metric] for one in metrics], rtol=1e-6)
  assert len(set(np.asarray(info.metrics["kept"][:3]).tolist())) > 1  # masks differ


def test_meta_sgd_hands_keys_on(x64):
  params, episode = problems.weights(), keyed(3)
  both = metajax.variants.with_rates(params, RATE)
  gradient, _, info = jax.jit(metajax.variants.meta_sgd(noisy).estimate)(both, (), episode)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
  close(gradient.params, expected("maml", params, episode))
  close(info.losses, plainly(params, episode)[1])


def test_cavia_hands_keys_on(x64):
  """A context that is added to the parameters, which are 0, is adapted as parameters are."""
  episode, zeros = keyed(3), jnp.zeros_like(problems.weights())
  of_context = lambda both, batch, key: noisy(both.params + both.context, batch, key)
  gradient = metajax.variants.cavia(of_context, optax.sgd(RATE), zeros)
  _, _, info = jax.jit(gradient.estimate)(zeros, gradient.init(zeros), episode)
  np.testing.assert_allclose(info.losses, plainly(zeros, episode)[1], rtol=1e-9)


def test_imaml_has_the_curvature_under_the_key_of_the_last_loss(x64):
  params, episode, strength = problems.weights(), keyed(3), 50.0
  inner = optax.sgd(RATE)
  gradient = metajax.variants.imaml(noisy, inner, strength, iterations=12)
  found = jax.jit(gradient.estimate)(params, (), episode)[0]
  # Its inner steps are drawn to the start; the keys of their losses are those of all algorithms.
  after, key = params, jax.random.fold_in(episode.key, 3)
  batches = [
    jax.tree.map(lambda leaf, rows=rows: leaf[rows], episode.pool) for rows in episode.schedule
  ]
  for number, batch in enumerate(batches):
    of_step = lambda phi, batch=batch, number=number: noisy(
      phi, batch, jax.random.fold_in(episode.key, number)
    )[0]
    after = after - RATE * (jax.grad(of_step)(after) + strength * (after - params))
  mean = lambda phi: sum(noisy(phi, batch, key)[0] for batch in batches) / len(batches)
  curvature = jax.hessian(mean)(after).reshape(params.size, params.size)
  of_tail = jax.grad(lambda phi: noisy(phi, episode.tail, key)[0])(after).reshape(-1)
  exact = np.linalg.solve(np.eye(params.size) + curvature / strength, of_tail)
  np.testing.assert_allclose(np.ravel(found), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fomaml", "maml"])
def test_the_outer_step_may_have_another_loss(x64, name):
  params, episode = problems.weights(), keyed(2)
  estimator = getattr(metajax, name)(noisy, optax.sgd(RATE), outer_loss=outer)
  gradient, _, info = jax.jit(estimator.estimate)(params, (), episode)
  before, losses, _ = plainly(params, episode, outer)
  by_hand = {
    "fomaml": lambda: jax.grad(lambda params: outer(params, episode.tail)[0])(before),
    "maml": lambda: jax.grad(lambda params: plainly(params, episode, outer)[1][-1])(params),
  }[name]()
  np.testing.assert_allclose(gradient, by_hand, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(info.losses, losses, rtol=1e-12)
  shapes = {metric: values.shape for metric, values in info.metrics.items()}
  assert shapes == {"accuracy": (3,), "kept": (3,), "outer": (1,)}


def sample_task(key):
  rows = jax.random.permutation(key, 12)
  pool = problems.examples(0, 12)
  part = lambda rows: jax.tree.map(lambda leaf: leaf[rows], pool)
  return metajax.Task(part(rows[:7]), part(rows[7:]))


EXECUTIONS = {
  "vmapped": metajax.vmapped(3),
  "chunked": metajax.vmapped(3, chunk=2),
  "serial": metajax.serial(3),
  "sharded": metajax.sharded(3),
}


def steps(execution):
  learner = metajax.meta_learner(metajax.maml(noisy, optax.sgd(RATE)), optax.sgd(0.1), execution)
  make_episode = metajax.separate_tail(metajax.cycling(3, 3))
  state = learner.init(problems.weights().astype(jnp.float32))
  return learner, *jax.jit(metajax.run(learner, sample_task, make_episode, 2))(state, KEY)


def test_all_executions_give_a_task_the_same_keys():
  _, state, infos = steps(EXECUTIONS["serial"])
  assert infos.metrics["accuracy"].shape == (2, 3)
  for name in ("vmapped", "chunked", "sharded"):
    _, other, other_infos = steps(EXECUTIONS[name])
    np.testing.assert_allclose(other.params, state.params, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other_infos, infos)


def test_an_evaluation_adapts_with_keys():
  learner, state, _ = steps(EXECUTIONS["vmapped"])
  schedule = metajax.cycling(3, 3)
  evaluate = metajax.evaluate(learner, schedule, lambda params, task: params)
  task = sample_task(KEY)
  found = jax.jit(evaluate)(state, KEY, task)
  drawn = metajax.shared_tail(metajax.cycling(4, 3))(KEY, task)
  rows = schedule(KEY, 7)
  assert np.array_equal(rows, drawn.schedule)  # the same minibatches, and so the same keys
  after, _, _ = plainly(state.params, drawn)
  np.testing.assert_allclose(found, after, rtol=1e-4)
  again = jax.jit(evaluate)(state, jax.random.key(6), task)
  assert not np.array_equal(again, found)


def test_metrics_are_reported(tmp_path):
  gradient = metajax.skip_nonfinite(metajax.reptile(noisy, optax.sgd(RATE)))
  learner = metajax.meta_learner(gradient, optax.sgd(0.1), metajax.vmapped(3))
  make_episode = metajax.shared_tail(metajax.cycling(3, 3))
  state = learner.init(problems.weights().astype(jnp.float32))
  records = []
  metajax.train(
    learner, sample_task, make_episode, state, KEY, num_steps=4, report=records.append,
    report_every=2, steps_per_call=1,
  )  # fmt: skip
  _, infos = jax.jit(metajax.run(learner, sample_task, make_episode, 4))(state, KEY)
  assert records[0].metrics == {} and [record.step for record in records] == [0, 2, 4]
  for record, part in zip(records[1:], (slice(2), slice(2, 4)), strict=True):
    assert set(record.metrics) == {"accuracy", "kept"}
    for name, values in record.metrics.items():
      np.testing.assert_allclose(values, infos.metrics[name][part].mean(axis=0), rtol=1e-6)


def test_a_metric_that_is_nan_skips_no_task():
  loss = lambda params, batch: (problems.softmax_loss()(params, batch), {"precision": jnp.nan})
  gradient = metajax.skip_nonfinite(metajax.reptile(loss, optax.sgd(RATE)))
  found, _, info = gradient.estimate(problems.weights(), (), problems.episode(1, k=3))
  assert info.skipped == 0 and np.isnan(info.metrics["precision"]).all() and np.any(found)


def test_a_metric_is_reduced_over_the_minibatch():
  loss = lambda params, batch: (jnp.sum(params), {"each": batch.targets})
  gradient = metajax.reptile(loss, optax.sgd(RATE))
  with pytest.raises(
    ValueError, match=r"'each' is \(3,\) and \(5,\) in different steps: reduce it"
  ):
    gradient.estimate(problems.weights(), (), problems.episode(1, k=3, tail=5))


def test_a_key_that_is_filled_in_stays():
  fixed = functools.partial(noisy, key=KEY)
  same = lambda params, batch: noisy(params, batch, KEY)
  found, expected = (
    metajax.fomaml(loss, optax.sgd(RATE)).estimate(problems.weights(), (), keyed(1))[0]
    for loss in (fixed, same)
  )
  np.testing.assert_array_equal(found, expected)


def test_a_key_may_be_given_by_name_only():
  loss = lambda params, batch, *, key: noisy(params, batch, key)
  found, expected = (
    metajax.reptile(one, optax.sgd(RATE)).estimate(problems.weights(), (), keyed(1))[0]
    for one in (loss, noisy)
  )
  np.testing.assert_array_equal(found, expected)


def test_what_a_loss_asks_for():
  params, batch = problems.weights(), problems.examples(0, 4)
  step = lambda loss, *key: metajax.inner_step(
    loss, optax.sgd(RATE), metajax.LearnerState(params, optax.sgd(RATE).init(params)), batch, *key
  )[1]
  with pytest.raises(ValueError, match="the loss asks for a key, and was given none: give"):
    step(noisy)
  scaled = lambda params, batch, scale=2.0: scale * problems.softmax_loss()(params, batch)
  plain = lambda params, batch, key=None: problems.softmax_loss()(params, batch) + (key is not None)
  assert step(scaled, KEY).loss == step(scaled).loss  # its third parameter is no key
  later = lambda params, batch, *, train=True, key=None: plain(params, batch, key)
  for loss in (plain, later, partial(later, train=False)):
    np.testing.assert_allclose(step(loss, KEY).loss, step(loss).loss + 1, rtol=1e-6)
  for metrics in ([1.0], {"losses": 1.0}, {"a": 1j}, {"a": {"b": 1.0}}, {"a": "b"}, {"a": KEY}):
    with pytest.raises(ValueError, match="may return a dict of real arrays by name"):
      step(lambda params, batch, metrics=metrics: (jnp.sum(params), metrics))
