"""The convolutions and blocks that are written for speed, against plain forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import metajax
from metajax import models
from metajax.models.fast import blocks, convolution
from metajax.models.networks import ConvNet

KEY = jax.random.key(0)
LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def agree(ours, theirs, tolerance=1e-10):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
  )


def dot(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))


def derivatives(function, arguments, rng):
  """The value and derivatives of first and second order, in every combination of modes."""
  draw = lambda: jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), arguments)
  v, w = draw(), draw()
  forward = lambda x: jax.jvp(function, x, v)[1]

  def all_of_them(arguments):
    value, pull_back = jax.vjp(function, *arguments)
    weights = jnp.cos(jnp.arange(value.size)).reshape(value.shape)
    scalar = lambda *x: jnp.sum(jnp.sin(function(*x)) * weights)
    gradient = jax.grad(scalar, argnums=tuple(range(len(arguments))))
    again = lambda *x: dot(gradient(*x), v)
    return {
      "value": value,
      "reverse": pull_back(weights),
      "forward": forward(arguments),
      "forward over forward": jax.jvp(forward, (arguments,), (w,))[1],
      "forward over reverse": jax.jvp(gradient, arguments, v)[1],
      "reverse over reverse": jax.grad(again, argnums=tuple(range(len(arguments))))(*arguments),
      "checkpoint": jax.grad(jax.checkpoint(scalar), argnums=0)(*arguments),
    }

  return jax.jit(all_of_them)(arguments)


CONVOLUTIONS = [
  # method, size, window, strides, padding, channels
  ("patches", (14, 14), (3, 3), (2, 2), "SAME", 1),
  ("patches", (7, 7), (3, 3), (2, 2), "SAME", 6),
  ("patches", (9, 8), (3, 3), (2, 1), "VALID", 2),
  ("patches", (6, 6), (3, 3), (1, 1), [(2, 0), (1, 1)], 2),
  ("cpu", (4, 4), (3, 3), (2, 2), "SAME", 6),
  ("cpu", (11, 6), (3, 3), (1, 1), "SAME", 3),
  ("cpu", (7, 5), (3, 3), (1, 1), "VALID", 1),
  ("cpu", (6, 6), (2, 4), (1, 1), "SAME", 2),
  ("cpu", (6, 6), (3, 3), (1, 1), [(2, 0), (1, 1)], 2),
  ("cpu", (5, 5), (2, 2), (1, 1), [(3, 0), (0, 2)], 2),  # more padding than the window is wide
]


@pytest.mark.parametrize(
  ("method", "image", "window", "strides", "padding", "channels"), CONVOLUTIONS
)
def test_every_method_is_convolution(x64, method, image, window, strides, padding, channels):
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(2, *image, channels)))
  kernel = jnp.asarray(rng.normal(size=(*window, channels, 5)))
  ours, theirs = (
    derivatives(
      lambda x, w, name=name: convolution(name)(x, w, strides, padding, **LAYOUT),
      (inputs, kernel),
      np.random.default_rng(1),
    )
    for name in (method, "xla")
  )
  agree(ours, theirs)


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (2, 1)])
def test_convolutions_are_mapped_over_tasks(x64, axes):
  """Values and gradients under vmap, whichever argument is mapped, are those of a loop."""
  rng = np.random.default_rng(0)
  inputs, kernels = rng.normal(size=(3, 2, 5, 6, 2)), rng.normal(size=(3, 3, 3, 2, 4))
  arguments = [
    jnp.asarray(array[0] if axis is None else np.moveaxis(array, 0, axis))
    for array, axis in zip((inputs, kernels), axes, strict=True)
  ]

  def results(x, w):
    function = lambda x, w: convolution("cpu")(x, w, (1, 1), "SAME", **LAYOUT)
    return function(x, w), jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1))(x, w)

  mapped = jax.jit(jax.vmap(results, in_axes=axes))(*arguments)
  for task in range(3):
    x, w = (
      jnp.asarray(array[0 if axis is None else task])
      for array, axis in zip((inputs, kernels), axes, strict=True)
    )
    agree(jax.tree.map(lambda leaf, task=task: leaf[task], mapped), results(x, w))


def test_convolutions_at_stride_1_need_no_derivative_rule_of_jax():
  """Within a scan, an ordinary convolution is fast on CPU, and the one in JAX's rule is not."""

  def loss(kernel, inputs):
    hidden = convolution("cpu")(inputs, kernel, (1, 1), "SAME", **LAYOUT)
    return jnp.sum(convolution("cpu")(hidden, kernel, (1, 1), "SAME", **LAYOUT) ** 2)

  product = lambda k, x: jax.jvp(jax.grad(loss, (0, 1)), (k, x), (k, x))
  text = jax.jit(product).lower(jnp.ones((3, 3, 2, 2)), jnp.ones((2, 6, 6, 2))).as_text()
  assert text.count("stablehlo.convolution(") > 4
  ordinary = "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
  assert (
    text.count("dim_numbers = ") == text.count(ordinary) == text.count("stablehlo.convolution(")
  )


@pytest.mark.parametrize("method", ["cpu", "patches"])
@pytest.mark.parametrize(
  "options",
  [
    {"rhs_dilation": (2, 2)},
    {"feature_group_count": 2},
    {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
  ],
)
def test_convolutions_refuse_what_they_do_not_do(method, options):
  with pytest.raises(ValueError, match=r"only convolution\('xla'\) has|or use 'xla'"):
    convolution(method)(
      jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2)), (1, 1), "SAME", **{**LAYOUT, **options}
    )


@pytest.mark.parametrize("method", ["cpu", "patches"])
def test_convolutions_accumulate_in_the_type_asked_for(method):
  images, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
  outputs = convolution(method)(
    images, kernel, (1, 1), "SAME", preferred_element_type=jnp.float32, **LAYOUT
  )
  assert outputs.dtype == jnp.float32
  assert convolution(method)(images, kernel, (1, 1), "SAME", **LAYOUT).dtype == jnp.bfloat16


def test_convolution_refuses_another_method():
  with pytest.raises(ValueError, match="'cpu', 'patches' or 'xla', not 'fast'"):
    convolution("fast")


# Blocks


def plain_block(inputs, scale, bias, padding):
  """Normalization, pooling and ReLU one after the other, by argmax over lists of entries."""
  mean, variance = jnp.mean(inputs, (0, 1, 2)), jnp.var(inputs, (0, 1, 2))
  hidden = (inputs - mean) / jnp.sqrt(variance + 1e-3) * scale + bias
  n, height, width, channels = hidden.shape
  rows, columns = ((-(-size // 2), size // 2)[padding == "VALID"] for size in (height, width))
  hidden = jnp.pad(hidden, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
  hidden = hidden[:, : 2 * rows, : 2 * columns].reshape(n, rows, 2, columns, 2, channels)
  entries = jnp.moveaxis(hidden, (2, 4), (-2, -1)).reshape(n, rows, columns, channels, 4)
  winners = jnp.argmax(entries, -1, keepdims=True)  # the first of equal entries
  return jax.nn.relu(jnp.take_along_axis(entries, winners, -1)[..., 0])


@pytest.mark.parametrize("entries", ["distinct", "equal"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("size", [(6, 4), (7, 5)])
def test_a_block_is_its_three_parts(x64, size, padding, entries):
  """With positive, negative and zero scales, and with entries that are equal."""
  rng = np.random.default_rng(0)
  draw = rng.normal if entries == "distinct" else lambda size: 1.0 * rng.integers(0, 3, size)
  arguments = (
    jnp.asarray(draw(size=(2, *size, 5))),
    jnp.array([1.5, -0.7, 0.0, 1.0, -1.0]),
    jnp.array([0.1, 0.2, 0.3, -0.3, 0.0]),
  )
  ours, theirs = (
    derivatives(lambda h, s, b, f=f: f(h, s, b), arguments, np.random.default_rng(1))
    for f in (
      lambda h, s, b: blocks.normalize_pool_relu(h, s, b, 1e-3, padding),
      lambda h, s, b: plain_block(h, s, b, padding),
    )
  )
  agree(ours, theirs)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("height", [6, 7])
def test_max_pool_and_its_gradient_are_flax_s(height, padding):
  """With ties, too, as a ReLU or a constant background makes them."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 3, (2, height, 5, 3)), jnp.float32)
  ours, pull_ours = jax.vjp(lambda x: models.max_pool(x, padding), images)
  theirs, pull_theirs = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2), padding), images)
  np.testing.assert_array_equal(ours, theirs)
  weigh = jnp.asarray(rng.normal(size=ours.shape), jnp.float32)
  np.testing.assert_array_equal(pull_ours(weigh)[0], pull_theirs(weigh)[0])


# Networks

NETWORKS = {
  "strides": {"downsample": "stride"},
  "pooling": {"downsample": "pool"},
  "Finn et al.'s": {"downsample": "pool", "pool_padding": "VALID", "norm_scale": False},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_share_parameters_and_results(x64, network):
  """The gradient and a Hessian-vector product, of images whose sizes are odd at every block."""
  shape = (4, 23, 17, 2)
  examples = metajax.Examples(jax.random.normal(KEY, shape, jnp.float64), jnp.array([0, 1, 2, 0]))
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape))

  def model(method):
    return models.from_linen(ConvNet(3, 4, method=method, **NETWORKS[network]), np.zeros(shape))

  shapes = jax.eval_shape(model("xla").init, KEY)
  assert set(shapes["Conv_0"]) == {"kernel", "bias"}
  params, v = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)

  def results(method):
    loss = metajax.losses.cross_entropy(model(method).apply, reduction="mean")
    gradient = lambda params: jax.grad(loss)(params, examples)
    return jax.jit(lambda params, v: jax.jvp(gradient, (params,), (v,)))(params, v)

  method = "patches" if network == "strides" else "cpu"
  starts = (jax.jit(model(name).init)(KEY) for name in ("xla", method))
  jax.tree.map(np.testing.assert_array_equal, *starts)
  plain = results("xla")
  assert not any(np.any(plain[0][f"Conv_{layer}"]["bias"]) for layer in range(4))
  agree(results(method), plain)


def test_the_default_convolution_is_that_of_the_backend(monkeypatch):
  for backend, method in (("cpu", "cpu"), ("gpu", "patches"), ("tpu", "xla")):
    monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
    assert convolution() is convolution(method)


def test_on_cpu_networks_use_what_is_written_for_it():
  def gradient(method):
    model = models.from_linen(ConvNet(3, 4, "pool", method=method), np.zeros((2, 8, 8, 1)))
    params = jax.eval_shape(model.init, KEY)
    loss = lambda params: jnp.sum(model.apply(params, jnp.zeros((2, 8, 8, 1))))
    return jax.jit(jax.grad(loss)).lower(params).as_text()

  assert gradient(None) == gradient("cpu") != gradient("patches")
