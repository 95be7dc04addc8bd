"""The paper's networks, those of Finn et al. (2017), and others of any size.

Batch normalization always uses the statistics of the current batch, in training and in testing. A
model therefore has no state besides its parameters, and can be vmapped.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metajax import checks, devices
from metajax.models.adapters import Model, from_linen
from metajax.models.fast import Method, convolution
from metajax.models.fast.blocks import Padding, max_pool, normalize, normalize_pool_relu

Downsample = Literal["stride", "pool"]
Head = Literal["flatten", "mean"]
P = ParamSpec("P")


class Conv(nn.Module):
  """A 3x3 convolution that is followed by batch normalization.

  It has a bias, as in the paper's code, but does not add it, because batch normalization would
  subtract it again. Its derivative is therefore exactly 0. If the bias were added, the derivative
  would be rounding error, of which Adam makes steps.

  Attributes:
    features: the number of outputs at each position.
    stride: the stride along height and width.
    method: the implementation of convolution; see `metajax.models.fast`.
  """

  features: int
  stride: int
  method: Method | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    shape = (3, 3, inputs.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
    self.param("bias", nn.initializers.zeros, (self.features,))
    inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel)
    convolve = convolution(self.method)
    strides = (self.stride, self.stride)
    return convolve(inputs, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class BatchStatsNorm(nn.Module):
  """Batch normalization that always uses the mean and the biased variance of the current batch.

  Attributes:
    epsilon: added to the variance; 1e-3 in the paper's code (TensorFlow's default).
    use_scale: whether to learn scales; offsets are always learned.
    function: `(inputs, scale, bias, epsilon) -> outputs`, normalization alone or with what follows.
  """

  epsilon: float = 1e-3
  use_scale: bool = True
  function: Callable[..., jax.Array] = normalize

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    channels = inputs.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, channels) if self.use_scale else 1.0
    bias = self.param("bias", nn.initializers.zeros, channels)
    return self.function(inputs, scale, bias, self.epsilon)


class ConvNet(nn.Module):
  """Four blocks of [conv 3x3; norm; ReLU] that each halve height and width, and a dense layer.

  Attributes:
    ways: the number of classes, which is the number of outputs.
    filters: the number of features of every convolution.
    downsample: `"stride"` (convolutions of stride 2) or `"pool"` (2x2 max-pooling).
    head: the input of the dense layer: all positions (`"flatten"`) or their average (`"mean"`).
    method: the implementation of convolution; see `metajax.models.fast`.
    pool_padding: whether pooling keeps an odd last row or column (`"SAME"`) or drops it
      (`"VALID"`).
    norm_scale: whether batch normalization has scales besides offsets.
    head_init: the initializer of the dense layer's kernel.
    invert: whether images x, from 0 to 1, become 1 - x.
  """

  ways: int
  filters: int
  downsample: Downsample = "stride"
  head: Head = "flatten"
  method: Method | None = None
  pool_padding: Padding = "SAME"
  norm_scale: bool = True
  head_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
  invert: bool = False

  def __post_init__(self) -> None:
    if self.downsample not in ("stride", "pool"):
      raise ValueError(f"downsample must be 'stride' or 'pool', not {self.downsample!r}")
    if self.head not in ("flatten", "mean"):
      raise ValueError(f"head must be 'flatten' or 'mean', not {self.head!r}")
    if self.pool_padding not in ("SAME", "VALID"):
      raise ValueError(f"pool_padding must be 'SAME' or 'VALID', not {self.pool_padding!r}")
    if self.method is not None:  # looking up the default would start a backend
      convolution(self.method)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Logits `[n, ways]` of images `[n, height, width, channels]`; uint8 is divided by 255."""
    hidden = 1 - _floats(inputs) if self.invert else _floats(inputs)
    after = self._after_convolution()
    for layer in range(4):
      stride = 1 if self.downsample == "pool" else 2
      hidden = Conv(self.filters, stride, self.method, name=f"Conv_{layer}")(hidden)
      hidden = BatchStatsNorm(use_scale=self.norm_scale, function=after)(hidden)
    if self.head == "mean":
      hidden = jnp.mean(hidden, axis=(1, 2))
    hidden = hidden.reshape(hidden.shape[0], -1)
    return nn.Dense(self.ways, kernel_init=self.head_init)(hidden)

  def _after_convolution(self) -> Callable[..., jax.Array]:
    if self.downsample == "stride":
      return lambda *arguments: nn.relu(normalize(*arguments))
    if (self.method or devices.defaults().convolution) == "cpu":
      return partial(normalize_pool_relu, padding=self.pool_padding)
    return lambda *arguments: nn.relu(max_pool(normalize(*arguments), self.pool_padding))


class ResNet(nn.Module):
  """Residual blocks of three 3x3 convolutions that each halve height and width, and a dense layer.

  A block is pool(a(norm(conv(a(norm(conv(a(norm(conv(x)))))))) + norm(W x))), with a the leaky ReLU
  of slope 0.1, applied last after the sum, and W a matrix at each position (a 1x1 convolution).

  Attributes:
    ways: the number of classes, which is the number of outputs.
    filters: the number of features of each block.
    method: the implementation of convolution; see `metajax.models.fast`.
  """

  ways: int
  filters: Sequence[int]
  method: Method | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Logits `[n, ways]` of images `[n, height, width, channels]`; uint8 is divided by 255."""
    hidden = _floats(inputs)
    rectify = partial(nn.leaky_relu, negative_slope=0.1)
    for width in self.filters:
      shortcut = BatchStatsNorm()(nn.Dense(width, use_bias=False)(hidden))
      for layer in range(3):
        hidden = BatchStatsNorm()(Conv(width, 1, self.method)(hidden))
        hidden = rectify(hidden if layer < 2 else hidden + shortcut)
      hidden = max_pool(hidden, "SAME")
    return nn.Dense(self.ways)(jnp.mean(hidden, axis=(1, 2)))


def _floats(images: jax.Array) -> jax.Array:
  if images.ndim != 4:
    raise ValueError(f"images must be [n, height, width, channels], not {images.shape}")
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


class MLP(nn.Module):
  """A fully connected network whose last layer is linear.

  Kernels and biases are initialized uniformly in +-1 / sqrt(fan in), as in the authors' PyTorch
  script. If biases were 0 and inputs one-dimensional, all units of the first layer would have the
  same centre.
  """

  features: Sequence[int]
  activation: Callable[[jax.Array], jax.Array] = nn.tanh

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    for layer, width in enumerate(self.features):
      if layer:
        inputs = self.activation(inputs)
      bound = inputs.shape[-1] ** -0.5
      uniform = lambda key, shape, dtype=jnp.float32, bound=bound: jax.random.uniform(
        key, shape, dtype, -bound, bound
      )
      inputs = nn.Dense(width, kernel_init=uniform, bias_init=uniform)(inputs)
    return inputs


NETWORKS: dict[str, Callable[..., Model]] = {}  # by name, what `from_spec` makes


def _network(make: Callable[P, Model]) -> Callable[P, Model]:
  """Gives the models that a function makes their spec: its name and its arguments."""

  @wraps(make)
  def named(*args: P.args, **kwargs: P.kwargs) -> Model:
    given = inspect.signature(make).bind(*args, **kwargs)
    given.apply_defaults()
    arguments = {name: value for name, value in given.arguments.items() if name != "method"}
    return make(*args, **kwargs)._replace(spec={"name": make.__name__, **arguments})

  NETWORKS[make.__name__] = named
  return named


def from_spec(spec: dict[str, Any]) -> Model:
  """Makes the model that has such a `Model.spec`.

  Raises:
    ValueError: if there is no such network, or it does not take these arguments.
  """
  spec = spec if isinstance(spec, dict) else {"name": spec}
  name, arguments = spec.get("name"), {k: v for k, v in spec.items() if k != "name"}
  if not isinstance(name, str) or name not in NETWORKS:
    raise ValueError(f"network {name!r} must be one of {', '.join(NETWORKS)}")
  try:
    return NETWORKS[name](**arguments)
  except TypeError as error:
    raise ValueError(f"network {name} cannot be made with {arguments}: {error}") from error


@_network
def conv4(
  size: int | Sequence[int],
  ways: int,
  *,
  channels: int = 1,
  filters: int = 64,
  downsample: Downsample = "pool",
  head: Head = "flatten",
  method: Method | None = None,
) -> Model:
  """The field's small network, for images of any size.

  It is 4 x [3x3 convolution; batch normalization; ReLU; halving of height and width], and a dense
  layer. `omniglot` and `mini_imagenet` are the instances of the paper.

  Args:
    size: height and width of the images, or one number for both.
    ways: the number of classes.
    channels: 1 for gray images, 3 for RGB.
    filters: the number of features of every convolution.
    downsample: what halves height and width, `"pool"` (2x2 max-pooling) or `"stride"`.
    head: the input of the dense layer: all positions (`"flatten"`) or their average (`"mean"`).
    method: the implementation of convolution; see `metajax.models.fast`.

  Returns:
    A model of images `[n, height, width, channels]`, floats from 0 to 1, or uint8.

  Raises:
    ValueError: if a size is below 1, or an option has another value than those above.
  """
  return _images(
    _image(size, channels), ways, filters, downsample=downsample, head=head, method=method
  )


@_network
def omniglot(
  ways: int,
  *,
  filters: int = 64,
  downsample: Downsample = "stride",
  method: Method | None = None,
) -> Model:
  """The paper's Omniglot network: 4 x [conv 3x3, 64 filters, stride 2; norm; ReLU], dense.

  Args:
    ways: the number of classes.
    filters: 64 in the paper, which gives 113,221 parameters at 5 ways.
    downsample: `"stride"`, as in the paper, or `"pool"`.
    method: the implementation of convolution; see `metajax.models.fast`.

  Returns:
    A model of images `[n, 28, 28, 1]`, floats from 0 to 1, or uint8.

  Raises:
    ValueError: if a size is below 1, or an option has another value than those above.
  """
  return _images((28, 28, 1), ways, filters, downsample=downsample, method=method)


@_network
def mini_imagenet(ways: int, *, filters: int = 32, method: Method | None = None) -> Model:
  """The paper's mini-ImageNet network: 4 x [conv 3x3, 32 filters; norm; max-pool 2x2; ReLU], dense.

  Args:
    ways: the number of classes.
    filters: 32 in the paper.
    method: the implementation of convolution; see `metajax.models.fast`.

  Returns:
    A model of images `[n, 84, 84, 3]`, floats from 0 to 1, or uint8.

  Raises:
    ValueError: if a size is below 1, or an option has another value than those above.
  """
  return _images((84, 84, 3), ways, filters, downsample="pool", method=method)


@_network
def finn_omniglot(ways: int, *, filters: int = 64, method: Method | None = None) -> Model:
  """The Omniglot network of Finn et al. (2017), for the paper's MAML and FOMAML results.

  It differs from `omniglot` in that it inverts images, so that ink is 1 and paper 0, that the dense
  layer takes the mean over positions, that its kernel is initialized from N(0, 1), and that batch
  normalization has no scales. Finn et al. do not adapt the offsets of batch normalization:
  `metajax.variants.only` does the same. Inputs are those of `omniglot`, and so are the arguments,
  but for `downsample`.
  """
  return _images(
    (28, 28, 1),
    ways,
    filters,
    head="mean",
    method=method,
    norm_scale=False,
    head_init=nn.initializers.normal(1.0),
    invert=True,
  )


@_network
def finn_mini_imagenet(ways: int, *, filters: int = 32, method: Method | None = None) -> Model:
  """The mini-ImageNet network of Finn et al. (2017), for the paper's MAML and FOMAML results.

  It differs from `mini_imagenet` in that pooling drops odd rows and columns, which leaves 5 x 5
  positions instead of 6 x 6, and that batch normalization has no scales. Finn et al. do not adapt
  the offsets of batch normalization: `metajax.variants.only` does the same. Arguments and inputs
  are those of `mini_imagenet`.
  """
  return _images(
    (84, 84, 3),
    ways,
    filters,
    downsample="pool",
    method=method,
    pool_padding="VALID",
    norm_scale=False,
  )


@_network
def resnet12(
  size: int | Sequence[int],
  ways: int,
  *,
  channels: int = 3,
  filters: Sequence[int] = (64, 160, 320, 640),
  method: Method | None = None,
) -> Model:
  """ResNet-12, the deeper network of few-shot learning (Lee et al. 2019, without DropBlock).

  Args:
    size: height and width of the images, or one number for both.
    ways: the number of classes.
    channels: 1 for gray images, 3 for RGB.
    filters: the features of each of the four blocks; with these, 12.4 million parameters.
    method: the implementation of convolution; see `metajax.models.fast`.

  Returns:
    A model of images `[n, height, width, channels]`, floats from 0 to 1, or uint8.

  Raises:
    ValueError: if a size is below 1, or an option has another value than those above.
  """
  checks.at_least_one(ways=ways, **{f"filters {i}": width for i, width in enumerate(filters)})
  network = ResNet(ways, tuple(filters), method)
  return from_linen(network, np.zeros((1, *_image(size, channels)), np.float32))


@_network
def mlp(
  inputs: int,
  outputs: int,
  *,
  hidden: Sequence[int] = (64, 64),
  activation: Literal["relu", "tanh", "gelu", "silu"] = "relu",
) -> Model:
  """A fully connected network: inputs `[n, inputs]` to outputs `[n, outputs]`.

  Args:
    inputs: the number of input features.
    outputs: the number of outputs, such as the number of classes.
    hidden: the width of each hidden layer.
    activation: between the layers.

  Raises:
    ValueError: if a width is below 1, or there is no such activation.
  """
  checks.at_least_one(inputs=inputs, outputs=outputs)
  return _fully_connected(inputs, (*hidden, outputs), activation)


@_network
def sine(
  features: Sequence[int] = (64, 64, 1),
  activation: Literal["relu", "tanh", "gelu", "silu"] = "tanh",
) -> Model:
  """The paper's regression network, 1-64-64-1: inputs `[n, 1]` to outputs `[n, 1]`.

  Args:
    features: the width of each layer, the last one that of the outputs.
    activation: between the layers.

  Raises:
    ValueError: if there is no layer, a layer without units, or no such activation.
  """
  return _fully_connected(1, features, activation)


def _fully_connected(inputs: int, features: Sequence[int], activation: str) -> Model:
  if not features or min(features) < 1:
    raise ValueError(f"the widths of the layers must be at least 1, not {tuple(features)}")
  if activation not in ("relu", "tanh", "gelu", "silu"):
    raise ValueError(f"activation must be relu, tanh, gelu or silu, not {activation!r}")
  network = MLP(tuple(features), getattr(nn, activation))
  return from_linen(network, np.zeros((1, inputs), np.float32))


def _images(size: tuple[int, int, int], ways: int, filters: int, **options: Any) -> Model:
  checks.at_least_one(ways=ways, filters=filters)
  network = ConvNet(ways, filters, **options)
  return from_linen(network, np.zeros((1, *size), np.float32))


def _image(size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
  sides: Any = size if np.shape(size) == (2,) else (size, size)
  height, width = sides
  checks.at_least_one(height=height, width=width, channels=channels)
  return height, width, channels
