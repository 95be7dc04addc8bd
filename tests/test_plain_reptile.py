"""The library does what Algorithm 1, written out in plain JAX, does."""

import jax
import numpy as np
import optax

import metajax
from experiments import plain_reptile as plain


def test_the_library_takes_the_same_meta_steps(monkeypatch):
  monkeypatch.setattr(plain, "ITERATIONS", 4)
  sgd = optax.sgd(plain.INNER_RATE)
  gradient = metajax.reptile(metajax.losses.squared_error(plain.predict, reduction="mean"), sgd)
  outer = optax.sgd(optax.linear_schedule(plain.OUTER_RATE, 0.0, plain.ITERATIONS))
  learner = metajax.meta_learner(gradient, outer, metajax.serial(1))
  key, start = jax.random.key(1), plain.init(jax.random.key(0))
  params = start
  state, step, plain_step = learner.init(params), jax.jit(learner.step), jax.jit(plain.meta_step)
  for iteration in range(plain.ITERATIONS):
    wave_key, shuffle_key = jax.random.split(jax.random.fold_in(key, iteration))
    wave = metajax.Examples(plain.GRID, plain.sample_wave(wave_key)(plain.GRID))
    shuffled = jax.random.permutation(shuffle_key, plain.POINTS).reshape(-1, plain.BATCH)
    tail = jax.tree.map(lambda leaf, rows=shuffled[-1]: leaf[rows], wave)
    episode = metajax.Episode(wave, shuffled[:-1], tail)
    state, _ = step(state, jax.tree.map(lambda leaf: leaf[None], episode))
    params = plain_step(iteration, params, key)
  moved = lambda end: np.concatenate([np.ravel(e - s) for e, s in zip(end, start, strict=True)])
  error = np.linalg.norm(moved(state.params) - moved(params)) / np.linalg.norm(moved(params))
  assert error < 1e-3  # rounding of small differences
