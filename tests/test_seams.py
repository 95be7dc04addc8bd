"""Own data, other optimizers, tasks that blow up: what must not give a wrong number silently."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import inner
from tests import problems

KEY = jax.random.key(0)
LOSS = problems.softmax_loss(reduction="mean")
pytestmark = pytest.mark.filterwarnings("ignore:sample_task does not use its key")
PHI = problems.weights()
MAKE_EPISODE = metajax.separate_tail(metajax.cycling(3, 3))
SGD = optax.sgd(0.1)


TASK = jax.tree.map(np.asarray, metajax.Task(problems.examples(0, 7), problems.examples(1, 4)))


def sample_task(key):
  """The same task for every key; its examples are NumPy arrays, as users have them."""
  return TASK


def linear(weights, inputs):
  return inputs @ weights


def learner_of(inner, outer=SGD, algorithm=metajax.reptile, execution=metajax.vmapped):
  return metajax.meta_learner(algorithm(LOSS, inner), outer, execution(2))


def steps(learner, count=3, sample_task=sample_task, make_episode=MAKE_EPISODE):
  run = metajax.run(learner, sample_task, make_episode, count)
  return jax.jit(run)(learner.init(PHI), KEY)


# Data that JAX has not seen yet


@pytest.mark.parametrize("execution", [metajax.vmapped, metajax.serial, metajax.sharded])
def test_tasks_may_be_numpy_arrays(execution):
  def of_jax(key):
    return jax.tree.map(jnp.asarray, sample_task(key))

  learner = learner_of(SGD, execution=execution)
  found, expected = steps(learner), steps(learner, sample_task=of_jax)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  evaluate = metajax.evaluate(learner, metajax.cycling(2, 3), metajax.transductive(linear))
  judge = lambda sample: metajax.judge(evaluate, sample, metajax.losses.accuracy, tasks_per_call=4)
  values = [judge(sample)(found[0], KEY, 4) for sample in (sample_task, of_jax)]
  np.testing.assert_array_equal(*values)


def test_episodes_and_classes_may_be_numpy_arrays():
  learner = learner_of(SGD)
  episodes = problems.episodes((0, 1), k=3)
  found = learner.step(learner.init(PHI), jax.tree.map(np.asarray, episodes))
  expected = learner.step(learner.init(PHI), episodes)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  jax.tree.map(close, found, expected)
  classes = metajax.data.few_shot.from_arrays(np.arange(12.0)[:, None], np.repeat(np.arange(4), 3))
  sample = lambda classes: metajax.data.few_shot.sample_task(
    classes, ways=3, train_shots=1, test_shots=1
  )
  tasks = [jax.jit(sample(c))(KEY) for c in (classes, jax.tree.map(np.asarray, classes))]
  jax.tree.map(np.testing.assert_array_equal, *tasks)


# Tasks that blow up


def poisoned(episodes, task=0):
  """Episodes of which one task has a NaN among its inputs."""
  inputs = episodes.pool.inputs.at[task].set(jnp.nan)
  return episodes._replace(pool=episodes.pool._replace(inputs=inputs))


@pytest.mark.parametrize("execution", [metajax.vmapped, metajax.serial, metajax.sharded])
def test_a_carried_state_stays_finite_and_training_goes_on(execution):
  """One task is NaN. `apply_if_finite` skips its meta-step, and the next one is unharmed."""
  inner = metajax.carried(optax.adam(0.1, b1=0.0))
  learner = learner_of(inner, optax.apply_if_finite(SGD, 5), execution=execution)
  step, good = jax.jit(learner.step), problems.episodes((0, 1), k=3)
  start = learner.init(PHI)
  after, info = step(start, poisoned(good))
  np.testing.assert_array_equal(after.params, PHI)
  assert np.isnan(info.losses).any()  # it can be seen
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.inner))
  healed, _ = step(after, good)
  assert np.isfinite(healed.params).all() and not np.allclose(healed.params, PHI)
  # The place in the meta-batch that saw the NaN has the state it had before.
  if execution is metajax.vmapped:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after.inner, start.inner)
    assert int(optax.tree.get(after.inner, "count")[1]) == 3


@pytest.mark.parametrize("guard", [lambda gradient: gradient, metajax.skip_nonfinite])
def test_a_carried_state_may_begin_with_infinity(guard):
  plateau = optax.contrib.reduce_on_plateau(accumulation_size=50)
  inner = metajax.carried(optax.chain(optax.adam(0.1, b1=0.0), plateau))
  learner = metajax.meta_learner(guard(metajax.reptile(LOSS, inner)), SGD, metajax.vmapped(2))
  step, good = jax.jit(learner.step), problems.episodes((0, 1), k=3)
  after, info = step(step(learner.init(PHI), good)[0], poisoned(good))
  assert np.isinf(optax.tree.get(after.inner, "best_value")).all()
  np.testing.assert_array_equal(optax.tree.get(after.inner[0], "count"), [3, 6])
  if guard is metajax.skip_nonfinite:
    assert float(info.skipped) == 0.5


def test_skipped_tasks_count_as_zero_and_are_counted():
  gradient = metajax.skip_nonfinite(metajax.reptile(LOSS, metajax.carried(optax.adam(0.1, b1=0.0))))
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.vmapped(2))
  good = problems.episodes((0, 1), k=3)
  state = learner.init(PHI)
  both, nothing = jax.jit(learner.step)(state, good)
  half, info = jax.jit(learner.step)(state, poisoned(good))
  assert float(nothing.skipped) == 0 and float(info.skipped) == 0.5
  alone = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.vmapped(1))
  second = jax.tree.map(lambda leaf: leaf[1:], good)
  one, of_one = jax.jit(alone.step)(alone.init(PHI), second)
  np.testing.assert_allclose(half.params - PHI, (one.params - PHI) / 2, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(info.losses, of_one.losses / 2, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), half.inner, both.inner)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), half.inner, state.inner)


@pytest.mark.parametrize("bad", ["gradient", "state", "loss", None])
def test_one_thing_that_is_not_finite_skips_a_task(bad):
  one = lambda name: jnp.float32(jnp.nan if name == bad else 1)
  results = one("gradient"), one("state"), metajax.Info(one("loss")[None])
  gradient = metajax.MetaGradient(lambda params: (), lambda *_: results, lambda *_: ())
  found, state, info = metajax.skip_nonfinite(gradient).estimate(jnp.ones(()), jnp.zeros(()), None)
  skipped = bad is not None
  kept = float(not skipped)
  assert (found, state, info.losses[0], info.skipped) == (kept, kept, kept, float(skipped))


def test_a_state_that_begins_with_nan_may_keep_it():
  before, after = jnp.array([jnp.nan, 1.0, jnp.inf]), jnp.array([jnp.nan, 2.0, jnp.inf])
  assert not inner.spoiled(after, before)
  assert inner.spoiled(after.at[1].set(jnp.nan), before)


def test_skipped_tasks_do_not_count_in_the_loss_of_the_outer_optimizer():
  """One that cuts its rate where the loss has stopped to fall keeps the least loss, here of L_k."""
  plateau = optax.contrib.reduce_on_plateau()
  gradient = metajax.skip_nonfinite(metajax.reptile(LOSS, SGD))
  learner = metajax.meta_learner(gradient, optax.chain(SGD, plateau), metajax.vmapped(2))
  same = jax.tree.map(lambda leaf: leaf[:1].repeat(2, 0), problems.episodes((0, 1), k=3))
  step, start = jax.jit(learner.step), learner.init(PHI)
  least = lambda state: float(optax.tree.get(state.outer, "best_value"))
  both, info = step(start, same)
  assert least(both) == pytest.approx(float(info.losses[-1]))
  assert least(step(start, poisoned(same))[0]) == pytest.approx(float(info.losses[-1]))
  none = jax.tree.map(lambda leaf: leaf[:1].repeat(2, 0), poisoned(same))
  after, info = step(both, none)
  assert float(info.skipped) == 1 and least(after) == least(both)


@pytest.mark.filterwarnings("ignore:no parameter has changed")
def test_skipped_tasks_do_not_count_in_the_losses_that_are_reported():
  """All good tasks have the same losses, so their mean does not depend on how many are skipped."""
  gradient = metajax.skip_nonfinite(metajax.reptile(LOSS, SGD))
  learner = metajax.meta_learner(gradient, optax.sgd(0.0), metajax.vmapped(2))

  def sometimes_bad(chance):
    def sample(key):
      scale = jnp.where(jax.random.bernoulli(key, chance), jnp.nan, 1.0)
      return jax.tree.map(lambda part: part * scale if part.ndim > 1 else jnp.asarray(part), TASK)

    return sample

  def trained(chance):
    start = learner.init(PHI)
    whole = metajax.separate_tail(metajax.cycling(3, 7))  # so that all good tasks are alike
    return metajax.train(learner, sometimes_bad(chance), whole, start, KEY, num_steps=20)

  all_good, some = trained(0.0), trained(0.5)
  assert all_good.skipped == 0 and 0.2 < some.skipped < 0.8
  np.testing.assert_allclose(some.losses, all_good.losses, rtol=1e-5)
  with pytest.warns(UserWarning, match="all tasks of meta-steps 1 to 20 were skipped"):
    none = trained(1.0)
  assert none.skipped == 1 and np.isnan(none.losses).all()


def test_failed_tasks_have_no_accuracy():
  learner = learner_of(optax.sgd(float("inf")))
  predict = metajax.transductive(linear)
  evaluate = metajax.evaluate(learner, metajax.cycling(5, 7), predict)
  judge = metajax.judge(evaluate, sample_task, metajax.losses.accuracy, tasks_per_call=2)
  values = judge(learner.init(PHI), KEY, 2)
  assert np.isnan(values).all() and np.isnan(metajax.mean_and_interval(values).mean)


# Optimizers


def test_optimizers_are_given_the_loss_and_its_gradient():
  """Polyak's step (f - f*) / |g|^2, scaled and never cut off, written out, inside and outside."""
  inner, outer = (optax.polyak_sgd(1e6, scaling=scaling) for scaling in (8.0, 4.0))
  learner = learner_of(inner, outer, metajax.fomaml)
  episodes = jax.tree.map(lambda leaf: leaf[None].repeat(2, 0), problems.episode(3, k=3))
  state, info = jax.jit(learner.step)(learner.init(PHI), episodes)
  *inner_batches, last = [
    metajax.Examples(*batch) for batch in problems.batches(problems.episode(3, k=3))
  ]

  def polyak(phi, loss, gradient, scaling):  # optax applies it to the scaled gradient
    return phi - loss / np.sum(np.square(gradient)) / scaling * gradient

  adapted = PHI
  for batch in inner_batches:
    loss, gradient = jax.value_and_grad(LOSS)(adapted, batch)
    adapted = polyak(adapted, loss, gradient, 8.0)
  loss, gradient = jax.value_and_grad(LOSS)(adapted, last)
  np.testing.assert_allclose(state.params, polyak(PHI, loss, gradient, 4.0), rtol=1e-5)
  np.testing.assert_allclose(info.losses[-1], loss, rtol=1e-5)


@pytest.mark.parametrize("mixed_mode", [False, True])
def test_maml_differentiates_through_the_loss_that_an_optimizer_uses(x64, mixed_mode):
  inner = optax.polyak_sgd(max_learning_rate=1e6, scaling=0.1)
  gradient = metajax.maml(LOSS, inner, mixed_mode=mixed_mode)
  phi, episode = problems.weights(), problems.episode(5, k=3)
  estimate = jax.jit(lambda phi: gradient.estimate(phi, gradient.init(phi), episode))
  found, direction = estimate(phi)[0], np.random.default_rng(0).normal(size=phi.shape)
  h, last = 1e-6, lambda phi: estimate(phi)[2].losses[-1]
  slope = (last(phi + h * direction) - last(phi - h * direction)) / (2 * h)
  np.testing.assert_allclose(np.sum(found * direction), slope, rtol=1e-6)


def test_multi_steps_hands_on_what_its_optimizer_asks_for():
  """optax.MultiSteps adds up gradients, and passes the loss on to the optimizer inside."""
  outer = optax.MultiSteps(optax.chain(SGD, optax.contrib.reduce_on_plateau()), 2)
  learner = metajax.meta_learner(metajax.reptile(LOSS, SGD), outer, metajax.vmapped(2))
  step, episodes = jax.jit(learner.step), problems.episodes((0, 1), k=3)
  state, _ = step(learner.init(PHI), episodes)
  state, info = step(state, episodes)
  best = float(optax.tree.get(state.outer, "best_value"))
  assert best == pytest.approx(float(info.losses[-1]))


def test_line_searches_work_inside_and_are_refused_outside():
  full = metajax.separate_tail(metajax.cycling(4, 7))  # all examples in each minibatch but the tail
  losses = [
    steps(learner_of(inner), make_episode=full)[1].losses[0] for inner in (optax.lbfgs(), SGD)
  ]
  assert losses[0][2] < losses[0][1] < losses[0][0] and losses[0][2] < losses[1][2]
  with pytest.raises(ValueError, match="use one without a line search"):
    steps(learner_of(SGD, optax.lbfgs()))
  with pytest.raises(ValueError, match="maml cannot differentiate through this inner optimizer"):
    metajax.maml(LOSS, optax.lbfgs()).init(PHI)


def test_optimizers_are_given_what_they_take():
  """`only` passes the loss on, and SAM takes neither the loss nor anything else that is offered."""
  plateau = optax.MultiSteps(optax.chain(SGD, optax.contrib.reduce_on_plateau()), 2)
  gradient = metajax.reptile(LOSS, metajax.variants.only(plateau, lambda name: True))
  gradient.estimate(PHI, gradient.init(PHI), problems.episode(3, k=3))
  sam = optax.contrib.sam(SGD, optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
  for learner in (learner_of(sam), learner_of(SGD, sam)):
    state, _ = steps(learner)
    assert np.all(np.isfinite(state.params)) and not np.array_equal(state.params, PHI)


def test_each_place_in_the_meta_batch_draws_its_own_noise():
  noisy = optax.chain(optax.add_noise(0.1, 0.5, key=0), SGD)
  episodes = jax.tree.map(lambda leaf: leaf[None].repeat(3, 0), problems.episode(3, k=3))
  gradient = metajax.reptile(LOSS, metajax.carried(noisy))
  lifted = metajax.vmapped(3).lift(gradient)
  state = lifted.init(PHI)
  alone = [
    gradient.estimate(PHI, jax.tree.map(lambda leaf, i=i: leaf[i], state), problems.episode(3, k=3))
    for i in range(3)
  ]
  gradients = [np.asarray(one[0]) for one in alone]
  assert (
    min(np.abs(gradients[0] - gradients[1]).max(), np.abs(gradients[1] - gradients[2]).max()) > 1e-3
  )
  np.testing.assert_allclose(
    lifted.estimate(PHI, state, episodes)[0], np.mean(gradients, axis=0), rtol=1e-4, atol=1e-6
  )
  with pytest.raises(ValueError, match=r"same random numbers for every task: .* metajax.carried"):
    metajax.reptile(LOSS, noisy).init(PHI)


ADAM = "eps_root > 0"
MATRICES = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}
INNER = {
  "sgd": (SGD, None),
  "momentum": (optax.sgd(0.1, momentum=0.9), None),
  "adam": (optax.adam(0.1), ADAM),
  "adam with eps_root": (optax.adam(0.1, eps_root=1e-8), None),
  "lamb": (optax.lamb(0.1), ADAM),
  "lars": (optax.lars(0.1), None),
  "muon": (optax.contrib.muon(0.1), None),
  "clipped by blocks": (optax.chain(optax.clip_by_block_rms(1.0), SGD), None),
  "clipped by the norm": (optax.chain(optax.clip_by_global_norm(1.0), SGD), None),
  "adafactor": (optax.adafactor(0.1), "choose another one, or use optax.sgd"),
}


@pytest.mark.parametrize("name", INNER)
def test_maml_s_check_agrees_with_maml(name):
  """What passes has a finite meta-gradient where gradients have zeros; what is refused has not."""
  inner, message = INNER[name]
  batch = metajax.Examples(jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[1.0, 1.0]]))
  loss = lambda params, batch: jnp.sum(
    jnp.square((batch.inputs @ params["a"] - batch.targets) @ params["b"])
  )  # the second row of params["a"] has no gradient
  episode = metajax.Episode(batch, jnp.zeros((2, 1), jnp.int32), batch)
  gradient = metajax.maml(loss, inner)
  estimate, _, _ = jax.jit(gradient.estimate)(MATRICES, (), episode)
  finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(estimate))
  if message is None:
    gradient.init(MATRICES)
    assert finite
  else:
    with pytest.raises(ValueError, match=message):
      gradient.init(MATRICES)
    assert not finite


def test_a_traced_rate_hides_nothing_from_maml_s_check():
  def init(rate, eps_root):
    metajax.maml(LOSS, optax.adam(rate, eps_root=eps_root)).init(PHI)
    return rate

  with pytest.raises(ValueError, match=ADAM):
    jax.jit(lambda rate: init(rate, 0.0))(0.1)
  jax.jit(lambda rate: init(rate, 1e-8))(0.1)


def test_rates_learned_for_each_inner_step_pass_maml_s_check():
  rates = jnp.array([0.1, 0.2, 0.3])
  by_step = optax.scale_by_schedule(lambda count: -rates[count])
  metajax.maml(LOSS, by_step).init(PHI)


def test_a_sweep_of_weights():
  """The weights of `combine` may be traced; each run gives what it gives alone."""
  learner = lambda weights: metajax.meta_learner(
    metajax.combine(LOSS, SGD, weights), SGD, metajax.vmapped(2)
  )
  weights = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
  sweep = metajax.sweep(learner, sample_task, MAKE_EPISODE, 2)
  params = jnp.broadcast_to(PHI, (2, *PHI.shape))
  states, _ = jax.jit(sweep.run)(
    weights, jax.jit(sweep.init)(weights, params), jax.random.split(KEY, 2)
  )
  for run in range(2):
    one = learner(weights[run])
    alone = metajax.run(one, sample_task, MAKE_EPISODE, 2)
    state, _ = jax.jit(alone)(one.init(PHI), jax.random.split(KEY, 2)[run])
    np.testing.assert_allclose(states.params[run], state.params, rtol=1e-5)
