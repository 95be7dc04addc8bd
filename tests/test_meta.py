import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from tests import problems

LOSS = problems.softmax_loss()
KEY = jax.random.key(3)
ADAM = metajax.carried(optax.adam(0.02, b1=0.0))


def make(outer=None, calls=None):
  def loss(params, batch):
    if calls is not None:
      calls.append(None)
    return LOSS(params, batch)

  learner = metajax.meta_learner(
    metajax.reptile(loss, ADAM),
    outer or optax.sgd(optax.linear_schedule(1.0, 0.0, 10)),
    metajax.vmapped(4),
  )
  classes = metajax.data.few_shot.from_arrays(
    np.random.default_rng(0).normal(size=(40, problems.FEATURES)).astype(np.float32),
    np.repeat(np.arange(5), 8),
  )
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=problems.CLASSES, train_shots=4, test_shots=0
  )
  make_episode = metajax.shared_tail(metajax.cycling(3, 5))
  return learner, sample_task, make_episode


def test_five_steps_are_two_and_then_three():
  learner, *source = make()
  start = learner.init(problems.weights())
  whole, infos = jax.jit(metajax.run(learner, *source, 5))(start, KEY)
  part, first = jax.jit(metajax.run(learner, *source, 2))(start, KEY)
  part, second = jax.jit(metajax.run(learner, *source, 3))(part, KEY)
  jax.tree.map(np.testing.assert_array_equal, part, whole)
  np.testing.assert_array_equal(np.concatenate([first.losses, second.losses]), infos.losses)
  assert whole.step == 5 and infos.losses.shape == (5, 3)


def test_run_is_a_loop_over_steps():
  learner, *source = make()
  state = start = learner.init(problems.weights())
  sample = learner.execution.sample(*source)
  one = jax.jit(lambda state, key: learner.step(state, sample(key)))
  for step in range(4):
    state, _ = one(state, jax.random.fold_in(KEY, step))
  scanned, _ = jax.jit(metajax.run(learner, *source, 4))(start, KEY)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), scanned, state)


def test_the_outer_step_falls_linearly_from_the_first_iteration():
  """Trap: step i of n has (1 - i / n) initial + (i / n) final, i = 0 ... n - 1."""
  learner, *source = make(optax.sgd(optax.linear_schedule(0.8, 0.2, 4)))
  state, sample = learner.init(problems.weights()), jax.jit(learner.execution.sample(*source))
  step_fn = jax.jit(learner.step)
  estimate = jax.jit(metajax.vmapped(4).lift(metajax.reptile(LOSS, ADAM)).estimate)
  for i in range(4):
    episodes = sample(jax.random.fold_in(KEY, i))
    gradient, _, _ = estimate(state.params, state.inner, episodes)
    moved, _ = step_fn(state, episodes)
    rate = (1 - i / 4) * 0.8 + i / 4 * 0.2
    np.testing.assert_allclose(moved.params, state.params - rate * gradient, rtol=1e-5)
    state = moved


def test_reptile_moves_towards_the_adapted_parameters():
  """Algorithm 1: phi <- phi + epsilon (phi~ - phi), averaged over tasks (Equation 5)."""
  inner = optax.sgd(0.1)
  learner = metajax.meta_learner(metajax.reptile(LOSS, inner), optax.sgd(0.25), metajax.vmapped(3))
  params, episodes = problems.weights(), problems.episodes(range(3), k=2)
  state, _ = learner.step(learner.init(params), episodes)
  adapted = []
  for seed in range(3):
    phi = params
    for inputs, labels in problems.batches(problems.episode(seed, k=2)):
      phi = phi - 0.1 * jax.grad(LOSS)(
        phi, metajax.Examples(jnp.asarray(inputs), jnp.asarray(labels))
      )
    adapted.append(phi)
  np.testing.assert_allclose(state.params, params + 0.25 * (sum(adapted) / 3 - params), rtol=1e-5)


def test_a_run_is_traced_once():
  calls = []
  learner, *source = make(calls=calls)
  run = jax.jit(metajax.run(learner, *source, 3))
  state, _ = run(learner.init(problems.weights()), KEY)
  traced = len(calls)
  for seed in range(3):
    state, _ = run(state, jax.random.key(seed))
  assert len(calls) == traced <= 3


def test_nothing_crosses_to_the_host_inside_a_run():
  learner, *source = make()
  state, key = jax.device_put((learner.init(problems.weights()), KEY))
  program = jax.jit(metajax.run(learner, *source, 3)).lower(state, key).compile()
  with jax.transfer_guard("disallow"):
    state, infos = program(state, key)
    jax.block_until_ready(infos)
  assert "callback" not in program.as_text()


@pytest.mark.parametrize("spread", [False, True])
def test_a_sweep_is_its_runs_one_by_one(spread):
  """Three pairs of rates with seeds of their own, and a state that is carried."""
  mesh = metajax.task_mesh(jax.devices()[:2])
  execution = metajax.sharded(4, mesh) if spread else metajax.vmapped(4)
  values = {"inner": jnp.array([0.01, 0.1, 0.3]), "outer": jnp.array([1.0, 0.5, 0.1])}
  keys = jax.random.split(KEY, 3)
  params = jnp.stack([problems.weights(seed) for seed in range(3)])
  _, *source = make()

  def make_learner(values):
    inner = optax.inject_hyperparams(optax.rmsprop)(values["inner"])  # the state has the rate
    gradient = metajax.reptile(LOSS, metajax.carried(inner))
    return metajax.meta_learner(gradient, optax.sgd(values["outer"]), execution)

  sweep = metajax.sweep(make_learner, *source, 5)
  states, infos = jax.jit(sweep.run)(values, sweep.init(values, params), keys)
  assert states.params.shape == (3, *params.shape[1:]) and infos.losses.shape[:2] == (3, 5)

  @jax.jit
  def run_alone(values, params, key):
    learner = make_learner(values)
    return metajax.run(learner, *source, 5)(learner.init(params), key)

  for run in range(3):
    alone = run_alone({name: value[run] for name, value in values.items()}, params[run], keys[run])
    together = jax.tree.map(lambda leaf, run=run: leaf[run], (states, infos))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, alone)


@pytest.mark.parametrize("algorithm", [metajax.fomaml, metajax.maml])
def test_a_sweep_of_numbers_in_the_loss(algorithm):
  """The loss closes over traced values, which MAML's custom derivatives must be given."""
  _, sample_task, make_episode = make()

  def make_learner(values):
    decay, scale = values
    loss = lambda phi, batch: scale * LOSS(phi, batch) + decay * jnp.sum(phi**2)
    return metajax.meta_learner(algorithm(loss, optax.sgd(0.1)), optax.sgd(0.5), metajax.vmapped(2))

  values, keys = (jnp.array([0.0, 0.1]), jnp.array([1.0, 0.5])), jax.random.split(KEY, 2)
  sweep = metajax.sweep(make_learner, sample_task, make_episode, 2)
  params = jnp.stack([problems.weights()] * 2)
  states, _ = jax.jit(sweep.run)(values, sweep.init(values, params), keys)
  for run in range(2):
    learner = make_learner(tuple(float(value[run]) for value in values))  # known when it is traced
    alone = jax.jit(metajax.run(learner, sample_task, make_episode, 2))
    state, _ = alone(learner.init(params[run]), keys[run])
    np.testing.assert_allclose(states.params[run], state.params, rtol=1e-5)


def test_a_sweep_of_implicit_maml():
  _, sample_task, make_episode = make()

  def make_learner(values):
    gradient = metajax.variants.imaml(LOSS, optax.sgd(values[0]), values[1], iterations=2)
    return metajax.meta_learner(gradient, optax.sgd(0.5), metajax.vmapped(2))

  values, keys = (jnp.array([0.1, 0.2]), jnp.array([1.0, 3.0])), jax.random.split(KEY, 2)
  sweep = metajax.sweep(make_learner, sample_task, make_episode, 2)
  params = jnp.stack([problems.weights()] * 2)
  states, _ = jax.jit(lambda values: sweep.run(values, sweep.init(values, params), keys))(values)
  for run in range(2):
    learner = make_learner(tuple(float(value[run]) for value in values))
    alone = jax.jit(metajax.run(learner, sample_task, make_episode, 2))
    state, _ = alone(learner.init(params[run]), keys[run])
    np.testing.assert_allclose(states.params[run], state.params, rtol=1e-5)


def test_a_sampler_that_does_not_use_its_key_is_warned_of():
  learner, _, make_episode = make()
  rng = np.random.default_rng(0)

  def by_numpy(key):
    inputs = jnp.asarray(rng.normal(size=(9, 4)))
    examples = metajax.Examples(inputs, jnp.arange(9) % 3)
    return metajax.Task(examples, examples)

  with pytest.warns(UserWarning, match="does not use its key, so all tasks are the same: draw"):
    metajax.run(learner, by_numpy, make_episode, 2)(learner.init(problems.weights()), KEY)


def test_run_refuses_no_steps():
  with pytest.raises(ValueError, match="num_steps must be at least 1"):
    metajax.sweep(lambda values: make()[0], *make()[1:], 0)
  with pytest.raises(ValueError, match="num_steps must be at least 1"):
    metajax.run(*make(), 0)


def test_bfloat16_compute_trains():
  """Parameters and optimizers in float32, the network in bfloat16: the loss comes down as well."""
  network = metajax.models.MLP((16, problems.CLASSES))
  model = metajax.models.from_linen(network, jnp.zeros((1, 20)))
  rng = np.random.default_rng(0)
  prototypes = np.repeat(rng.normal(size=(5, 1, 20)), 8, axis=0).reshape(40, 20)
  noise = 0.3 * rng.normal(size=prototypes.shape)
  classes = metajax.data.few_shot.from_arrays(
    (prototypes + noise).astype(np.float32), np.repeat(np.arange(5), 8)
  )
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=problems.CLASSES, train_shots=4, test_shots=0
  )
  make_episode = metajax.shared_tail(metajax.cycling(3, 5))

  def apply(params, inputs):
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, inputs))
    return model.apply(params, inputs).astype(jnp.float32)

  gradient = metajax.maml(
    metajax.losses.cross_entropy(apply, reduction="mean"), optax.sgd(0.1), mixed_mode=True
  )
  learner = metajax.meta_learner(gradient, optax.adam(0.01), metajax.vmapped(2))
  run = metajax.run(learner, sample_task, make_episode, 60)
  start = learner.init(jax.jit(model.init)(KEY))
  program = jax.jit(run).lower(start, KEY)
  assert "bf16" in program.as_text()
  state, infos = program.compile()(start, KEY)
  losses = np.asarray(infos.losses)[:, -1]
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
  assert losses[-10:].mean() < 0.7 * losses[:10].mean()
