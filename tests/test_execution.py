import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from benchmarks import scaling
from tests import problems

LOSS = problems.softmax_loss()
ADAM = metajax.carried(optax.adam(0.02, b1=0.0))
PARAMS = problems.weights()
T = 5


def estimates(meta_gradient, rounds=2, k=3):
  """The gradients of several meta-steps, with the inner state carried, and the last state."""
  state, gradients = meta_gradient.init(PARAMS), []
  estimate = jax.jit(meta_gradient.estimate)
  for seed in range(rounds):
    episodes = problems.episodes(range(10 * seed, 10 * seed + T), k=k)
    gradient, state, info = estimate(PARAMS, state, episodes)
    assert info.losses.shape == (k,)
    gradients.append(gradient)
  return np.stack(gradients), state


@pytest.mark.parametrize(("chunk", "k"), [(1, 3), (2, 3), (4, 3), (2, 1)])
def test_chunks_are_vmap(chunk, k):
  one = metajax.reptile(LOSS, ADAM)
  whole, state = estimates(metajax.vmapped(T).lift(one), k=k)
  chunked, chunked_state = estimates(metajax.vmapped(T, chunk=chunk).lift(one), k=k)
  np.testing.assert_allclose(chunked, whole, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), chunked_state, state)


def mesh(devices):
  return metajax.task_mesh(jax.devices()[:devices])


@pytest.mark.parametrize(("devices", "chunk"), [(1, None), (2, 1), (3, None), (4, 2)])
def test_sharded_is_vmap_on_any_number_of_devices(devices, chunk):
  one = metajax.reptile(LOSS, ADAM)
  whole, state = estimates(metajax.vmapped(T).lift(one))
  spread, spread_state = estimates(metajax.sharded(T, mesh(devices), chunk=chunk).lift(one))
  np.testing.assert_allclose(spread, whole, rtol=1e-5)
  of_tasks = jax.tree.map(lambda leaf: leaf[:T], spread_state)  # without slots that do not count
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), of_tasks, state)
  assert {len(leaf) for leaf in jax.tree.leaves(spread_state)} == {-(-T // devices) * devices}
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread_state)} == {devices}


def test_slots_that_fill_up_the_mesh_are_not_computed():
  one, seen = metajax.fomaml(LOSS, optax.sgd(0.1)), []

  def estimate(params, inner_state, episode):
    jax.debug.callback(lambda _: seen.append(None), episode.schedule)
    return one.estimate(params, inner_state, episode)

  gradient = metajax.sharded(T, mesh(4), chunk=1).lift(one._replace(estimate=estimate))
  episodes = problems.episodes(range(T), k=3)
  jax.block_until_ready(jax.jit(gradient.estimate)(PARAMS, (), episodes))
  jax.effects_barrier()
  assert len(seen) == T  # of 8 slots


def test_sharded_adds_gradients_in_one_all_reduce():
  gradient = metajax.sharded(4, mesh(4), chunk=1).lift(metajax.reptile(LOSS, ADAM))
  spread = jax.NamedSharding(mesh(4), jax.P("tasks"))
  episodes = jax.device_put(problems.episodes(range(4), k=3), spread)
  program = (
    jax.jit(gradient.estimate).lower(PARAMS, gradient.init(PARAMS), episodes).compile().as_text()
  )
  assert program.count(" all-reduce(") == 1
  for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert other not in program


def source(mesh=None):
  """Tasks of images, which are told from all else by their type, uint8, and their episodes."""
  images = np.arange(60 * 4, dtype=np.uint8).reshape(60, 4)
  classes = metajax.data.few_shot.from_arrays(images, np.repeat(np.arange(6), 10))
  if mesh is not None:
    classes = jax.device_put(classes, jax.NamedSharding(mesh, jax.P()))
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=problems.CLASSES, train_shots=4, test_shots=2
  )
  make_episode = metajax.separate_tail(metajax.cycling(3, 4))
  return sample_task, make_episode


def sampling(num_tasks, mesh=None):
  execution = metajax.vmapped(num_tasks) if mesh is None else metajax.sharded(num_tasks, mesh)
  return execution.sample(*source(mesh))


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_each_device_draws_its_own_tasks_and_they_are_the_same(devices):
  key = jax.random.key(3)
  expected = jax.jit(sampling(T))(key)
  drawn = jax.jit(sampling(T, mesh(devices)))(key)
  drawn, expected = (one._replace(key=jax.random.key_data(one.key)) for one in (drawn, expected))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:T], b), drawn, expected)
  slots = -(-T // devices) * devices
  for leaf in jax.tree.leaves(drawn):
    assert len(leaf) == slots and len(leaf.sharding.device_set) == devices
    assert {len(shard.data) for shard in leaf.addressable_shards} == {slots // devices}


@pytest.mark.parametrize("num_tasks", [4, 5])
def test_a_meta_step_sends_the_gradient_and_the_losses_once_and_nothing_else(num_tasks):
  """From the compiled program, sampling included: no device ever sees the others' tasks."""
  one = metajax.reptile(problems.softmax_loss(), ADAM)
  on = mesh(4)
  learner = metajax.meta_learner(one, optax.sgd(1.0), metajax.sharded(num_tasks, on))
  everywhere = jax.NamedSharding(on, jax.P())
  params, key = jax.device_put((PARAMS, jax.random.key(0)), everywhere)
  many_steps = metajax.run(learner, *source(on), 3)
  state = learner.init(params)
  program = jax.jit(many_steps).lower(state, key).compile().as_text()
  losses = 3
  assert scaling.collectives(program) == [("all-reduce", 4 * (PARAMS.size + losses))]
  images = set(re.findall(r"= u8\[([\d,]+),4\]", program)) - {"60"}  # all but the data set
  drawn = {math.prod(map(int, shape.split(","))) for shape in images}
  examples = problems.CLASSES * 6
  assert drawn and max(drawn) <= -(-num_tasks // 4) * examples


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 2])
def test_mapped_tasks_are_those_of_vmap(devices, chunk):
  function = lambda shared, task: {"sum": shared * task.sum(), "task": task}
  tasks = jnp.arange(10.0).reshape(5, 2)
  mapped = jax.jit(metajax.map_tasks(function, mesh(devices), chunk=chunk))(3.0, tasks)
  expected = jax.vmap(lambda task: function(3.0, task))(tasks)
  jax.tree.map(np.testing.assert_array_equal, mapped, expected)
  of_numpy = metajax.map_tasks(function, mesh(devices), chunk=chunk)
  mapped = jax.jit(lambda shared: of_numpy(shared, np.asarray(tasks)))(3.0)
  jax.tree.map(np.testing.assert_array_equal, mapped, expected)


def test_the_default_chunk_is_that_of_the_mesh(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert metajax.devices.defaults().chunk is None
  assert metajax.spread.chunk_or_default(None, 4, mesh(2)) == 1


@pytest.mark.parametrize(("chunk", "loops"), [(None, 1), (1, 1), (2, 0)])
def test_what_is_left_open_suits_the_backend(chunk, loops):
  """On CPU one task at a time: the program then loops over the two tasks of a device."""
  gradient = metajax.sharded(4, mesh(2), chunk=chunk).lift(metajax.reptile(LOSS, ADAM))
  arguments = PARAMS, gradient.init(PARAMS), problems.episodes(range(4), k=5)
  assert str(jax.make_jaxpr(gradient.estimate)(*arguments)).count("length=2") == loops


@pytest.mark.parametrize("method", ["cpu", "patches", "xla"])
def test_tasks_may_be_on_the_devices_already(method):
  """Programs inside, such as those of a convolution, do not keep where a task was."""
  convolve = metajax.models.convolution(method)
  layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
  convolved = lambda task, kernel: convolve(task, kernel, (1, 1), "SAME", **layout)
  function = lambda kernel, task: jax.jit(convolved)(task, kernel)
  images = jax.random.normal(jax.random.key(0), (8, 2, 5, 5, 1))
  placed = jax.device_put(images, jax.NamedSharding(mesh(4), jax.P("tasks")))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 2))
  found = jax.jit(metajax.map_tasks(function, mesh(4)))(kernel, placed)
  expected = jax.vmap(lambda task: function(kernel, task))(images)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mesh_of_an_explicit_axis_is_refused():
  explicit = jax.make_mesh((2,), ("tasks",), axis_types=(jax.sharding.AxisType.Explicit,))
  with pytest.raises(ValueError, match="must be of the type Auto, not Explicit: use metajax"):
    metajax.sharded(4, explicit)


@pytest.mark.parametrize("lift", [metajax.sharded, metajax.map_tasks])
def test_a_mesh_has_one_axis(lift):
  two_axes = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  arguments = (T,) if lift is metajax.sharded else (lambda s, t: t,)
  with pytest.raises(ValueError, match="one axis"):
    lift(*arguments, two_axes)
  with pytest.raises(ValueError, match="chunk must be"):
    lift(*arguments, mesh(1), chunk=0)


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "maml"])
def test_without_state_serial_is_vmap(algorithm):
  one = getattr(metajax, algorithm)(LOSS, optax.adam(0.02, b1=0.0, eps_root=1e-8))
  together, _ = estimates(metajax.vmapped(T).lift(one))
  in_turn, state = estimates(metajax.serial(T).lift(one))
  np.testing.assert_allclose(in_turn, together, rtol=1e-5)
  assert state == ()


def test_vmapped_keeps_an_inner_state_a_slot():
  one = metajax.reptile(LOSS, ADAM)
  _, state = estimates(metajax.vmapped(T).lift(one))
  np.testing.assert_array_equal(state[0].count, np.full(T, 2 * 3))
  for slot in range(T):
    alone = one.init(PARAMS)
    for seed in range(2):
      _, alone, _ = one.estimate(PARAMS, alone, problems.episode(10 * seed + slot, k=3))
    np.testing.assert_allclose(state[0].nu[slot], alone[0].nu, rtol=1e-5)
  first = metajax.vmapped(T).one(state)
  np.testing.assert_array_equal(first[0].nu, state[0].nu[0])


def test_serial_hands_one_inner_state_along():
  one = metajax.reptile(LOSS, ADAM)
  gradients, state = estimates(metajax.serial(T).lift(one))
  assert state[0].count == 2 * T * 3
  alone, expected = one.init(PARAMS), []
  for seed in range(2):
    total = 0
    for task in range(T):
      gradient, alone, _ = one.estimate(PARAMS, alone, problems.episode(10 * seed + task, k=3))
      total += gradient
    expected.append(total / T)
  np.testing.assert_allclose(gradients, expected, rtol=1e-5)
  np.testing.assert_allclose(state[0].nu, alone[0].nu, rtol=1e-5)


def test_a_tasks_key_does_not_depend_on_the_number_of_tasks():
  few_shot = metajax.data.few_shot
  classes = few_shot.from_arrays(np.arange(60.0)[:, None], np.repeat(np.arange(6), 10))
  sample_task = few_shot.sample_task(classes, ways=3, train_shots=4, test_shots=2)
  make_episode = metajax.separate_tail(metajax.cycling(3, 4))
  two, five = (
    jax.jit(metajax.vmapped(n).sample(sample_task, make_episode))(jax.random.key(0)) for n in (2, 5)
  )
  two, five = (one._replace(key=jax.random.key_data(one.key)) for one in (two, five))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), two, five)
  assert not np.array_equal(five.tail.inputs[0], five.tail.inputs[1])


@pytest.mark.parametrize(("num_tasks", "chunk"), [(0, None), (4, 5), (4, 0)])
def test_batched_refuses_sizes_that_do_not_fit(num_tasks, chunk):
  with pytest.raises(ValueError, match="must be"):
    metajax.vmapped(num_tasks, chunk=chunk)


def test_batched_refuses_another_number_of_episodes():
  meta_gradient = metajax.vmapped(T).lift(metajax.reptile(LOSS, ADAM))
  with pytest.raises(ValueError, match="episodes must have a leading axis of 5"):
    meta_gradient.estimate(PARAMS, meta_gradient.init(PARAMS), problems.episodes(range(3), k=3))


def test_gradients_are_means_over_tasks():
  one = metajax.fomaml(LOSS, optax.adam(0.02, b1=0.0))
  together, _ = estimates(metajax.vmapped(T).lift(one), rounds=1)
  alone = [one.estimate(PARAMS, (), problems.episode(seed, k=3))[0] for seed in range(T)]
  np.testing.assert_allclose(together[0], jnp.mean(jnp.stack(alone), axis=0), rtol=1e-5)


@pytest.mark.parametrize("execution", [metajax.vmapped, metajax.serial, metajax.sharded])
def test_gradients_and_losses_of_bfloat16_are_added_in_float32(execution):
  """Float64 does the same sum; bfloat16 would lose most of what 40 small numbers add."""
  num_tasks = 40
  numbers = np.random.default_rng(0).normal(1.0, 0.01, num_tasks).astype(jnp.bfloat16)
  episodes = jax.tree.map(
    lambda leaf: jnp.repeat(leaf[None], num_tasks, axis=0), problems.episode(0, k=2)
  )
  episodes = episodes._replace(tail=metajax.Examples(jnp.asarray(numbers), jnp.asarray(numbers)))
  own = metajax.MetaGradient(
    init=lambda params: (),
    estimate=lambda params, state, episode: (
      jnp.full_like(params, episode.tail.inputs),
      state,
      metajax.Info(jnp.full(2, episode.tail.inputs)),
    ),
    adapt=lambda params, state, examples, schedule: params,
  )
  params = jnp.ones(3, jnp.bfloat16)
  gradient, _, info = jax.jit(execution(num_tasks).lift(own).estimate)(params, (), episodes)
  assert gradient.dtype == jnp.bfloat16
  expected = numbers.astype(np.float64).mean()
  np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-8)
  np.testing.assert_allclose(info.losses, expected, rtol=1e-6)


@pytest.mark.parametrize("execution", [metajax.vmapped, metajax.serial])
@pytest.mark.parametrize("name", ["reptile", "combine"])
def test_bfloat16_parameters_and_float32_rates(name, execution):
  loss, rate = problems.softmax_loss(), jnp.float32(0.1)
  gradient = {
    "reptile": lambda: metajax.reptile(loss, optax.sgd(rate), stepsize=rate),
    "combine": lambda: metajax.combine(loss, optax.sgd(rate), jnp.ones(3, jnp.float32)),
  }[name]()
  learner = metajax.meta_learner(gradient, optax.sgd(0.5, momentum=0.9), execution(2))
  state = learner.init(problems.weights().astype(jnp.bfloat16))
  after, _ = jax.jit(learner.step)(state, problems.episodes((0, 1), k=3))
  assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_a_sharded_learner_begins_with_parameters_of_one_device():
  """As those of a learner that was trained on one device."""
  on_one = jax.device_put(PARAMS, jax.devices()[1])
  state = metajax.sharded(T, mesh(4)).lift(metajax.reptile(LOSS, ADAM)).init(on_one)
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {4}
