"""Regression of sine waves (Section 4): f(x) = a sin(x + b), a ~ U[0.1, 5.0], b ~ U[0, 2 pi]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metajax.types import Examples, PRNGKey, SampleTask, Task

Points = Callable[[PRNGKey], jax.Array]  # key -> x [n, 1]
_LOW, _HIGH = -5.0, 5.0


def uniform_points(num_points: int) -> Points:
  """Draws x ~ U[-5, 5], `[num_points, 1]`, as the few samples that a learner is given.

  Raises:
    ValueError: if `num_points` is below 1.
  """
  _check(num_points)
  return lambda key: jax.random.uniform(key, (num_points, 1), minval=_LOW, maxval=_HIGH)


def grid_points(num_points: int) -> Points:
  """Equally spaced x from -5 to 5, `[num_points, 1]`; the mean error approximates its integral.

  Raises:
    ValueError: if `num_points` is below 1.
  """
  _check(num_points)
  return lambda key: jnp.linspace(_LOW, _HIGH, num_points)[:, None]


def sample_task(
  train_points: Points | None = None, test_points: Points | None = None
) -> SampleTask:
  """Makes a sampler that draws a wave and evaluates it at the train and the test points.

  Args:
    train_points: `key -> x`; by default 10 uniform points.
    test_points: `key -> x`; by default 50 points on a grid.

  Returns:
    `key -> Task` with inputs and targets `[n, 1]`. It consumes the key.
  """
  train_points = train_points or uniform_points(10)
  test_points = test_points or grid_points(50)

  def sample(key: PRNGKey) -> Task:
    amplitude_key, phase_key, train_key, test_key = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, maxval=2 * jnp.pi)
    wave = lambda x: Examples(x, amplitude * jnp.sin(x + phase))
    return Task(wave(train_points(train_key)), wave(test_points(test_key)))

  return sample


def _check(num_points: int) -> None:
  if num_points < 1:
    raise ValueError(f"num_points must be at least 1, not {num_points}")
