import itertools

import jax
import numpy as np
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
