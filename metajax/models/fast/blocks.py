"""What comes between two convolutions: batch normalization, max-pooling and ReLU.

On CPU, passes over the large arrays between the convolutions take half of a gradient's time. Two
derivatives are therefore given here by hand, those of the moments and of pooling. Both can be
differentiated again, any number of times, in forward and in reverse mode.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = Literal["SAME", "VALID"]

_PLACES = np.arange(4, dtype=np.int8).reshape(2, 1, 2, 1)  # of a window's entries, in `_windows`


def normalize(
  inputs: jax.Array, scale: jax.Array | float, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Batch normalization by the mean and the biased variance of the batch, `[..., channels]`."""
  mean, variance = _moments(inputs)
  return (inputs - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias


def max_pool(inputs: jax.Array, padding: Padding = "SAME") -> jax.Array:
  """2x2 max-pooling of stride 2: `[n, h, w, c]` to `[n, ceil(h / 2), ceil(w / 2), c]`.

  With padding `"VALID"` an odd last row or column is dropped: `floor` in place of `ceil`.

  It is computed by elementwise selections, since the gradient of XLA's window reduction is slow on
  CPU. As in XLA, the gradient goes to the first of equal entries.
  """
  return _extremes(inputs, jnp.ones(inputs.shape[-1:], inputs.dtype), padding)[0]


def normalize_pool_relu(
  inputs: jax.Array,
  scale: jax.Array | float,
  bias: jax.Array,
  epsilon: float,
  padding: Padding = "SAME",
) -> jax.Array:
  """relu(max_pool(normalize(inputs, scale, bias, epsilon), padding)), which pools first.

  Let h be the inputs, r = 1 / sqrt(variance + epsilon) and a = r scale. Normalization is increasing
  where a > 0 and decreasing where a < 0, so what wins in a window is the largest or the smallest of
  h. It is enough to normalize these, a quarter of the array:

      y = relu((P h - mean) a + bias),

  where P picks the winner of each window, or the first entry if a = 0. For a cotangent g of
  y before ReLU, the backward pass is then, over m positions,

      dh = P^T(a g) - sum(a g) / m - (h - mean) a r^2 sum(g (P h - mean)) / m,

  one pass over an array of the inputs' size. All sums are over the pooled arrays.
  """
  mean, variance = _moments(inputs)
  factor = lax.rsqrt(variance + epsilon) * scale
  winners, _ = _extremes(inputs, lax.stop_gradient(jnp.sign(factor)), padding)
  return jax.nn.relu((winners - mean) * factor + bias)


@jax.custom_jvp
def _moments(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean and the biased variance over all axes but the last.

  The derivative of the variance is 2 mean((h - mean) dh). Automatic differentiation would add
  -2 mean(h - mean) dmean, which is 0 and costs another pass.
  """
  axes = tuple(range(inputs.ndim - 1))
  mean = jnp.mean(inputs, axes)
  return mean, jnp.mean(jnp.square(inputs - mean), axes)


@_moments.defjvp
def _(primals: Any, tangents: Any) -> Any:
  (inputs,), (tangent,) = primals, tangents
  mean, variance = _moments(inputs)
  axes = tuple(range(inputs.ndim - 1))
  of_variance = 2 * jnp.mean((inputs - mean) * tangent, axes)
  return (mean, variance), (jnp.mean(tangent, axes), of_variance)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _extremes(inputs: jax.Array, sign: jax.Array, padding: Padding) -> tuple[jax.Array, jax.Array]:
  """Picks the first of the entries of each window that are largest when multiplied with a sign.

  Args:
    inputs: `[n, h, w, c]`.
    sign: `[c]`: 1 for the largest entries, -1 for the smallest, 0 for the first.
    padding: as in `max_pool`.

  Returns:
    These entries, and their places 0 ... 3 in the windows as int8. The tangent of the entries is
    P(dh), the tangents at these places; for a cotangent g this makes P^T g.
  """
  signed = _even(inputs * sign, padding, -jnp.inf)
  a, b, c, d = (signed[:, row::2, column::2] for row in (0, 1) for column in (0, 1))
  upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
  places = jnp.where(upper >= lower, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
  return jnp.where(
    sign == 0, _even(inputs, padding, 0)[:, ::2, ::2], jnp.maximum(upper, lower) * sign
  ), places.astype(jnp.int8)


@_extremes.defjvp
def _(padding: Padding, primals: Any, tangents: Any) -> Any:
  entries, places = _extremes(*primals, padding)
  chosen = places[:, :, None, :, None] == _PLACES
  tangent = jnp.where(chosen, _windows(tangents[0], padding), 0).sum((2, 4))
  return (entries, places), (tangent, np.zeros(places.shape, jax.dtypes.float0))


def _even(images: jax.Array, padding: Padding, fill: float) -> jax.Array:
  """Fills up (`"SAME"`) or cuts off (`"VALID"`) an odd last row or column."""
  odd = images.shape[1] % 2, images.shape[2] % 2
  if padding == "VALID":
    return images[:, : images.shape[1] - odd[0], : images.shape[2] - odd[1]]
  return jnp.pad(images, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), constant_values=fill)


def _windows(images: jax.Array, padding: Padding) -> jax.Array:
  """Images `[n, h, w, c]` as windows `[n, h / 2, 2, w / 2, 2, c]`, filled up with zeros."""
  images = _even(images, padding, 0)
  n, height, width, channels = images.shape
  return images.reshape(n, height // 2, 2, width // 2, 2, channels)
