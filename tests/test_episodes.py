import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax.types import Examples, Task

KEY = jax.random.key(0)


def task(n=12, m=3):
  examples = lambda first, n: Examples(np.arange(first, first + n), np.zeros(n, np.int32))
  return Task(
    jax.tree.map(jax.numpy.asarray, examples(0, n)),
    jax.tree.map(jax.numpy.asarray, examples(100, m)),
  )


@pytest.mark.parametrize(("k", "b", "n"), [(6, 4, 12), (5, 5, 12), (3, 20, 12), (1, 1, 1)])
def test_cycling_uses_every_example_before_any_comes_again(k, b, n):
  rows = np.asarray(metajax.cycling(k, b)(KEY, n))
  assert rows.shape == (k, b) and rows.dtype == np.int32
  stream = rows.reshape(-1)
  for first in range(0, len(stream), n):
    one_pass = stream[first : first + n]
    assert len(set(one_pass)) == len(one_pass)
  uses = np.bincount(stream, minlength=n)
  assert uses.max() - uses.min() <= 1


def test_cycling_shuffles_each_pass_anew():
  rows = np.asarray(metajax.cycling(4, 12)(KEY, 12))
  assert len({tuple(row) for row in rows}) == 4


def test_replacement_has_no_duplicates_inside_a_minibatch_and_no_memory():
  rows = np.asarray(metajax.replacement(400, 5)(KEY, 12))
  assert all(len(set(row)) == 5 for row in rows)
  uses = np.bincount(rows.reshape(-1), minlength=12)
  expected = 400 * 5 / 12
  assert np.all(np.abs(uses - expected) < 5 * np.sqrt(expected))
  repeats = [len(set(a) & set(b)) for a, b in itertools.pairwise(rows)]
  assert 0 < np.mean(repeats) < 5  # a minibatch may meet the one before again


def test_replacement_refuses_a_batch_larger_than_the_set():
  with pytest.raises(ValueError, match="13 cannot be drawn without duplicates from 12"):
    metajax.replacement(2, 13)(KEY, 12)


def test_a_shared_tail_is_the_last_minibatch():
  episode = metajax.shared_tail(metajax.cycling(3, 4))(KEY, task())
  seen = np.concatenate([episode.pool.inputs[episode.schedule.reshape(-1)], episode.tail.inputs])
  np.testing.assert_array_equal(np.sort(seen), np.arange(12))
  assert episode.schedule.shape == (2, 4)


def test_a_separate_tail_shares_nothing_with_the_other_minibatches():
  episode = metajax.separate_tail(metajax.cycling(3, 4))(KEY, task())
  np.testing.assert_array_equal(episode.tail.inputs, [100, 101, 102])
  assert episode.schedule.shape == (2, 4)
  assert np.all(episode.pool.inputs < 100)


def test_a_separate_tail_needs_two_losses():
  with pytest.raises(ValueError, match="k = 1 leaves none"):
    metajax.separate_tail(metajax.cycling(1, 4))(KEY, task())
  assert metajax.shared_tail(metajax.cycling(1, 4))(KEY, task()).schedule.shape == (0, 4)
  with pytest.raises(ValueError, match="it has none: raise test_shots"):
    metajax.separate_tail(metajax.cycling(3, 4))(KEY, task(m=0))


@pytest.mark.parametrize("draw", [metajax.cycling, metajax.replacement])
@pytest.mark.parametrize("sizes", [(0, 4), (3, 0)])
def test_sizes_must_be_positive(draw, sizes):
  with pytest.raises(ValueError, match="at least 1"):
    draw(*sizes)


def test_varying_shots_draws_as_many_of_each_class():
  ways, shots = 3, 5
  schedule = jax.jit(metajax.varying_shots(4, 6, ways=ways, at_least=2), static_argnums=1)
  sizes, uses = [], np.zeros(ways * shots)
  for seed in range(60):
    rows = np.asarray(schedule(jax.random.key(seed), ways * shots))
    assert rows.shape == (4, 6) and rows.dtype == np.int32
    drawn = np.unique(rows)
    each = np.bincount(drawn // shots, minlength=ways)
    assert np.all(each == each[0])  # 24 rows are at least one pass over all that take part
    sizes.append(each[0])
    uses[drawn] += 1
    stream, total = rows.reshape(-1), ways * each[0]
    for first in range(0, len(stream), total):
      one_pass = stream[first : first + total]
      assert len(set(one_pass)) == len(one_pass)
  assert set(sizes) == {2, 3, 4, 5} and all(sizes.count(size) > 5 for size in (2, 3, 4, 5))
  expected = np.mean(sizes) / shots * 60  # the same for all examples, the first and the last
  assert np.all(np.abs(uses - expected) < 4 * np.sqrt(expected * (1 - expected / 60)))


def test_varying_shots_of_all_examples_shuffle_each_pass():
  rows = np.asarray(metajax.varying_shots(3, 7, at_least=7)(KEY, 7))
  assert all(sorted(row) == list(range(7)) for row in rows) and len(set(map(tuple, rows))) == 3


def test_varying_steps_draws_every_number_of_steps():
  make_episode = metajax.varying_steps(metajax.shared_tail(metajax.cycling(5, 4)), at_least=2)
  keys = jax.random.split(KEY, 200)
  steps = np.asarray(jax.vmap(lambda key: make_episode(key, task()).steps)(keys))
  assert set(steps) == {2, 3, 4} and all(np.mean(steps == n) > 0.2 for n in (2, 3, 4))
  plain = metajax.shared_tail(metajax.cycling(5, 4))(KEY, task())
  same = make_episode(KEY, task())
  jax.tree.map(np.testing.assert_array_equal, same[:3], plain[:3])
  assert same.key == plain.key


def test_varying_sizes_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match="10 examples are not at least 1 of each of 3 classes"):
    metajax.varying_shots(2, 3, ways=3)(KEY, 10)
  with pytest.raises(ValueError, match="9 examples are not at least 4 of each of 3 classes"):
    metajax.varying_shots(2, 3, ways=3, at_least=4)(KEY, 9)
  with pytest.raises(ValueError, match="4 inner steps before its tail, fewer than at_least=5"):
    metajax.varying_steps(metajax.shared_tail(metajax.cycling(5, 4)), at_least=5)(KEY, task())


def test_tasks_with_different_steps_run_in_every_execution():
  learned = []
  loss = metajax.losses.squared_error(lambda params, x: x * params, reduction="mean")
  sample = metajax.data.sine.sample_task(metajax.data.sine.uniform_points(6))
  make_episode = metajax.varying_steps(metajax.shared_tail(metajax.varying_shots(4, 3, at_least=2)))
  for execution in (metajax.vmapped(3), metajax.serial(3), metajax.sharded(3)):
    learner = metajax.meta_learner(metajax.maml(loss, optax.sgd(0.01)), optax.sgd(0.1), execution)
    state, _ = jax.jit(metajax.run(learner, sample, make_episode, 3))(
      learner.init(jnp.ones(())), KEY
    )
    learned.append(float(state.params))
  np.testing.assert_allclose(learned, learned[0], rtol=1e-5)
  assert learned[0] != 1.0


def test_losses_draw_other_numbers_than_the_minibatches_are_drawn_with():
  episode = metajax.shared_tail(metajax.cycling(4, 12))(KEY, task())
  data = lambda key: tuple(jax.random.key_data(key).tolist())
  of_losses = {data(jax.random.fold_in(episode.key, number)) for number in range(4)}
  assert not of_losses & {data(key) for key in [KEY, *jax.random.split(KEY, 4)]}
