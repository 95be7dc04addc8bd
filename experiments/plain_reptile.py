"""Reptile (Algorithm 1) on sine waves (Section 4) in plain JAX without metajax, to be read.

python -m experiments.plain_reptile
"""

import jax
import jax.numpy as jnp

INNER_RATE, OUTER_RATE, ITERATIONS = 0.02, 0.1, 30_000
POINTS, BATCH, TEST_STEPS = 50, 10, 32
GRID = jnp.linspace(-5.0, 5.0, POINTS)[:, None]


def init(key):
  """The parameters of a network 1-64-64-1: one matrix for each layer."""
  uniform = lambda key, *shape: jax.random.uniform(key, shape, minval=-1, maxval=1)
  keys = jax.random.split(key, 3)
  first, second, third = uniform(keys[0], 2, 64), uniform(keys[1], 65, 64), uniform(keys[2], 65, 1)
  return [first, second / 8, third / 8]  # uniform in +-1 / sqrt(inputs); last rows are biases


def predict(params, x):
  for layer in params[:-1]:
    x = jnp.tanh(x @ layer[:-1] + layer[-1])
  return x @ params[-1][:-1] + params[-1][-1]


def loss(params, x, y):
  return jnp.mean((predict(params, x) - y) ** 2)


def sample_wave(key):
  """Draws a task: a wave a sin(x + b), as a function of x."""
  amplitude_key, phase_key = jax.random.split(key)
  amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
  phase = jax.random.uniform(phase_key, maxval=2 * jnp.pi)
  return lambda x: amplitude * jnp.sin(x + phase)


def inner_step(params, x, y):
  grads = jax.grad(loss)(params, x, y)
  return jax.tree.map(lambda p, g: p - INNER_RATE * g, params, grads)


def meta_step(iteration, params, key):
  """Adapts to one wave in one pass over its points, and moves towards the adapted parameters."""
  wave_key, shuffle_key = jax.random.split(jax.random.fold_in(key, iteration))
  wave = sample_wave(wave_key)
  adapted = params
  for rows in jax.random.permutation(shuffle_key, POINTS).reshape(-1, BATCH):
    adapted = inner_step(adapted, GRID[rows], wave(GRID[rows]))
  outer_rate = OUTER_RATE * (1 - iteration / ITERATIONS)
  return jax.tree.map(lambda p, a: p + outer_rate * (a - p), params, adapted)


def loss_after_adapting(params, key):
  """The error on the whole wave after 32 gradient steps on ten of its points."""
  wave_key, point_key = jax.random.split(key)
  wave, x = sample_wave(wave_key), jax.random.uniform(point_key, (10, 1), minval=-5, maxval=5)
  adapted = jax.lax.fori_loop(0, TEST_STEPS, lambda _, p: inner_step(p, x, wave(x)), params)
  return loss(adapted, GRID, wave(GRID))


if __name__ == "__main__":
  init_key, train_key, test_key = jax.random.split(jax.random.key(0), 3)
  start = init(init_key)
  trained = jax.lax.fori_loop(0, ITERATIONS, lambda i, p: meta_step(i, p, train_key), start)
  for name, params in (("random initialization", start), ("Reptile", trained)):
    losses = jax.vmap(loss_after_adapting, (None, 0))(params, jax.random.split(test_key, 1_000))
    print(f"{name}: error after {TEST_STEPS} gradient steps {losses.mean():.3f}")
