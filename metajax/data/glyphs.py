"""Glyphs: a data set of invented characters that the library draws itself, without a download.

A class is a few strokes, each a cubic Bezier curve. To imitate handwriting, each drawing of a class
moves the control points a little, tilts, scales, shears and shifts the whole character, and picks
a pen width. Images have the format of Omniglot's: 28x28, paper 255, ink 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from metajax.data.few_shot import Classes, Splits, from_arrays
from metajax.types import PRNGKey

SIZE = 28
_MAX_STROKES = 4
_POINTS_PER_STROKE = 24


def load(
  seed: int = 0, *, train_classes: int = 400, test_classes: int = 100, drawings: int = 20
) -> Splits:
  """Draws the glyphs of a seed: disjoint train and test classes, no validation classes.

  Args:
    seed: the same seed draws the same glyphs.
    train_classes: the number of classes for meta-training.
    test_classes: the number of other classes, for testing.
    drawings: the number of examples of each class.

  Returns:
    Splits with inputs uint8 `[classes * drawings, 28, 28, 1]`.

  Raises:
    ValueError: if a number is below 1.
  """
  if min(train_classes, test_classes, drawings) < 1:
    raise ValueError("train_classes, test_classes and drawings must each be at least 1")
  num_classes = train_classes + test_classes
  # With fold_in, the characters are independent of a run that uses key(seed) itself.
  with jax.default_device(_cpu()), jax.default_matmul_precision("float32"):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0x676C7970), num_classes)
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: draw_class(key, drawings), keys))
    images = np.asarray(draw(keys))

  def classes(images: np.ndarray) -> Classes:
    labels = np.repeat(np.arange(len(images)), drawings)
    return from_arrays(images.reshape(-1, SIZE, SIZE, 1), labels)

  return Splits(classes(images[:train_classes]), None, classes(images[train_classes:]))


def _cpu() -> jax.Device | None:
  """Where glyphs are drawn, if JAX may use it: an accelerator would round to other pixels."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None


def draw_class(key: PRNGKey, drawings: int) -> jax.Array:
  """Invents a character and draws it `drawings` times: uint8 `[drawings, 28, 28, 1]`."""
  character_key, drawing_key = jax.random.split(key)
  strokes, drawn = _character(character_key)
  keys = jax.random.split(drawing_key, drawings)
  return jax.vmap(lambda key: _drawing(key, strokes, drawn))(keys)


def _character(key: PRNGKey) -> tuple[jax.Array, jax.Array]:
  """Control points `[strokes, 4, 2]` in the unit square, and a mask `[strokes]` of those drawn."""
  start_key, heading_key, turn_key, length_key, count_key = jax.random.split(key, 5)
  start = jax.random.uniform(start_key, (_MAX_STROKES, 1, 2), minval=0.2, maxval=0.8)
  heading = jax.random.uniform(heading_key, (_MAX_STROKES, 1), maxval=2 * jnp.pi)
  turns = jax.random.normal(turn_key, (_MAX_STROKES, 3)).at[:, 0].set(0.0) * 1.2
  length = jax.random.uniform(length_key, (_MAX_STROKES, 3), minval=0.12, maxval=0.4)
  angle = heading + jnp.cumsum(turns, axis=1)
  moves = length[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
  strokes = jnp.concatenate([start, start + jnp.cumsum(moves, axis=1)], axis=1)
  count = jax.random.randint(count_key, (), 2, _MAX_STROKES + 1)
  drawn = jnp.arange(_MAX_STROKES) < count
  # Centred and scaled to fill the frame, so that position and size do not reveal the class.
  inside = drawn[:, None, None]
  low = jnp.min(jnp.where(inside, strokes, jnp.inf), axis=(0, 1))
  high = jnp.max(jnp.where(inside, strokes, -jnp.inf), axis=(0, 1))
  return 0.5 + 0.72 * (strokes - (low + high) / 2) / jnp.max(high - low), drawn


def _drawing(key: PRNGKey, strokes: jax.Array, drawn: jax.Array) -> jax.Array:
  """One drawing of a character, uint8 `[28, 28, 1]`; lengths are fractions of the frame."""
  wobble_key, shape_key, place_key, pen_key = jax.random.split(key, 4)
  strokes = strokes + 0.04 * jax.random.normal(wobble_key, strokes.shape)
  tilt, stretch_x, stretch_y, shear = jax.random.normal(shape_key, (4,)) * jnp.array(
    [0.19, 0.12, 0.12, 0.16]
  )
  rotation = jnp.array([[jnp.cos(tilt), -jnp.sin(tilt)], [jnp.sin(tilt), jnp.cos(tilt)]])
  scale = jnp.array([[1 + stretch_x, shear], [0.0, 1 + stretch_y]])
  shift = 0.5 + 0.05 * jax.random.normal(place_key, (2,))
  strokes = (strokes - 0.5) @ (rotation @ scale).T + shift

  t = jnp.linspace(0.0, 1.0, _POINTS_PER_STROKE)[:, None]
  bernstein = jnp.concatenate(
    [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1
  )
  pen_points = jnp.einsum("tp,spd->std", bernstein, strokes)
  centres = (jnp.arange(SIZE) + 0.5) / SIZE
  square = lambda x: jnp.square(x[..., None] - centres)  # [strokes, points, SIZE]
  distance = square(pen_points[..., 1])[..., :, None] + square(pen_points[..., 0])[..., None, :]
  distance = jnp.where(drawn[:, None, None, None], distance, jnp.inf).min(axis=(0, 1))
  pen = jax.random.uniform(pen_key, minval=0.026, maxval=0.042)
  return jnp.where(distance < pen**2, 0, 255).astype(jnp.uint8)[..., None]
