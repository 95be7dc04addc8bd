"""The paper's networks, and adapters for networks of any framework: a model is `(init, apply)`.

Batch normalization always uses the statistics of the batch, in training and in testing, so a model
has no state besides its parameters, and vmaps freely.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax import linen as nn

from metajax.convolution import Method, convolution
from metajax.types import Apply, Params, PRNGKey

Downsample = Literal["stride", "pool"]
Head = Literal["flatten", "mean"]
Padding = Literal["SAME", "VALID"]


_MISFITS = (
  errors.ScopeCollectionNotFound,
  errors.ScopeParamNotFoundError,
  errors.ScopeParamShapeError,
)


class Model(NamedTuple):
  """A network as two pure functions; make one by hand from any pair."""

  init: Callable[[PRNGKey], Params]
  apply: Apply  # (params, inputs [n, ...]) -> outputs [n, ...]


def from_linen(module: nn.Module, example_inputs: Any) -> Model:
  """A Flax Linen module that has parameters and nothing else.

  Args:
    module: called with one argument, the inputs.
    example_inputs: an array (or tree) of the inputs' shape, `[n, ...]`.

  Raises:
    ValueError: in `init`, if the module has state, such as `nn.BatchNorm`'s running statistics; in
      `apply`, if the parameters or the inputs are not of the shapes that it has.
  """

  def init(key: PRNGKey) -> Params:
    variables = module.init(key, example_inputs)
    if set(variables) - {"params"}:
      raise ValueError(
        f"a model has parameters only, and this one has {sorted(set(variables) - {'params'})}: "
        "use metajax.models.BatchStatsNorm in place of nn.BatchNorm"
      )
    return variables.get("params", {})

  def apply(params: Params, inputs: Any) -> Any:
    try:
      return module.apply({"params": params}, inputs)
    except _MISFITS as error:
      shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(inputs))
      raise ValueError(
        f"inputs {shapes} and the parameters do not fit each other: give inputs of the size that "
        "the model was made for, and the parameters that its init returned"
      ) from error

  return Model(init, apply)


def from_nnx(make: Callable[[Any], Any]) -> Model:
  """A Flax NNX module.

  Args:
    make: `nnx.Rngs -> nnx.Module`, called with one argument, the inputs.

  Raises:
    ValueError: in `init`, if the module has state besides parameters.
  """
  from flax import nnx

  def split(key: PRNGKey) -> tuple[Any, Any]:
    graph, *states = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
    params, rest = states
    if jax.tree.leaves(nnx.filter_state(rest, nnx.Not(nnx.RngState))):
      raise ValueError("a model has parameters only: this NNX module keeps other variables too")
    return graph, (params, rest)

  def init(key: PRNGKey) -> Params:
    return nnx.to_pure_dict(split(key)[1][0])

  def apply(params: Params, inputs: Any) -> Any:
    graph, (structure, rest) = split(jax.random.key(0))
    nnx.replace_by_pure_dict(structure, params)
    return nnx.merge(graph, structure, rest)(inputs)

  return Model(init, apply)


def from_equinox(make: Callable[[PRNGKey], Any]) -> Model:
  """An Equinox module; its call takes one example and is vmapped over the inputs.

  Args:
    make: `key -> eqx.Module`.

  Raises:
    ValueError: in `init`, if the module has arrays that are not floating point.
  """
  import equinox as eqx

  def init(key: PRNGKey) -> Params:
    params, rest = eqx.partition(make(key), eqx.is_inexact_array)
    if any(map(eqx.is_array, jax.tree.leaves(rest))):
      raise ValueError("a model has parameters only: this Equinox module has integer arrays too")
    return params

  def apply(params: Params, inputs: Any) -> Any:
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    static = eqx.filter(shapes, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
    return jax.vmap(eqx.combine(params, static))(inputs)

  return Model(init, apply)


class BatchStatsNorm(nn.Module):
  """Batch normalization by the batch's own mean and biased variance, always.

  Attributes:
    epsilon: added to the variance; 1e-3 in the paper's code (TensorFlow's default).
    use_scale: whether there are scales; there are always offsets.
  """

  epsilon: float = 1e-3
  use_scale: bool = True

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    channels = inputs.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, channels) if self.use_scale else 1.0
    bias = self.param("bias", nn.initializers.zeros, channels)
    axes = tuple(range(inputs.ndim - 1))
    centred = inputs - jnp.mean(inputs, axes)
    variance = jnp.mean(jnp.square(centred), axes)
    return centred * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias


class ConvNet(nn.Module):
  """Four blocks of [conv 3x3; norm; ReLU], each halving the image, and a dense layer.

  Attributes:
    ways: classes, the outputs.
    filters: features of every convolution.
    downsample: `"stride"` (convolutions of stride 2) or `"pool"` (2x2 max-pooling).
    head: the dense layer sees `"flatten"`, all positions, or `"mean"`, their average.
    method: of `metajax.convolution`.
    pool_padding: whether pooling an odd number of rows keeps the last (`"SAME"`) or drops it.
    norm_scale: whether batch normalization has scales besides offsets.
    head_init: of the dense layer's kernel.
  """

  ways: int
  filters: int
  downsample: Downsample = "stride"
  head: Head = "flatten"
  method: Method | None = None
  pool_padding: Padding = "SAME"
  norm_scale: bool = True
  head_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()

  def __post_init__(self) -> None:
    if self.downsample not in ("stride", "pool"):
      raise ValueError(f"downsample must be 'stride' or 'pool', not {self.downsample!r}")
    if self.head not in ("flatten", "mean"):
      raise ValueError(f"head must be 'flatten' or 'mean', not {self.head!r}")
    if self.pool_padding not in ("SAME", "VALID"):
      raise ValueError(f"pool_padding must be 'SAME' or 'VALID', not {self.pool_padding!r}")
    if self.method is not None:  # the default is that of a backend, and starts it
      convolution(self.method)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Logits `[n, ways]` of images `[n, height, width, channels]`; uint8 counts as 0..255."""
    if inputs.ndim != 4:
      raise ValueError(f"images must be [n, height, width, channels], not {inputs.shape}")
    pool = self.downsample == "pool"
    hidden = inputs.astype(jnp.float32) / 255 if inputs.dtype == jnp.uint8 else inputs
    for _ in range(4):
      hidden = nn.Conv(
        self.filters,
        (3, 3),
        strides=1 if pool else 2,
        padding="SAME",
        kernel_init=nn.initializers.glorot_uniform(),
        conv_general_dilated=convolution(self.method),
      )(hidden)
      hidden = BatchStatsNorm(use_scale=self.norm_scale)(hidden)
      hidden = nn.relu(max_pool(hidden, self.pool_padding) if pool else hidden)
    if self.head == "mean":
      hidden = jnp.mean(hidden, axis=(1, 2))
    hidden = hidden.reshape(hidden.shape[0], -1)
    return nn.Dense(self.ways, kernel_init=self.head_init)(hidden)


class MLP(nn.Module):
  """A fully connected network, its last layer linear.

  Kernels and biases start uniform in +-1 / sqrt(fan in), as in the authors' PyTorch script: with
  biases of 0, all units of a first layer on one-dimensional inputs would have the same centre.
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


def max_pool(inputs: jax.Array, padding: Padding = "SAME") -> jax.Array:
  """2x2 max-pooling of stride 2: `[n, h, w, c]` to `[n, ceil(h / 2), ceil(w / 2), c]`.

  With padding `"VALID"` an odd last row or column is dropped: `floor` in place of `ceil`.

  As elementwise selections, since the gradient of XLA's window reduction is slow on CPU; it goes to
  the first of equal entries, as there.
  """
  n, height, width, channels = inputs.shape
  if padding == "SAME":
    odd = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    inputs = jnp.pad(inputs, odd, constant_values=-jnp.inf)
  else:
    inputs = inputs[:, : height - height % 2, : width - width % 2]
  inputs = inputs.reshape(n, inputs.shape[1] // 2, 2, inputs.shape[2] // 2, 2, channels)
  larger = lambda a, b: jnp.where(a >= b, a, b)
  top = larger(inputs[:, :, 0, :, 0], inputs[:, :, 0, :, 1])
  bottom = larger(inputs[:, :, 1, :, 0], inputs[:, :, 1, :, 1])
  return larger(top, bottom)


def omniglot(
  ways: int,
  *,
  filters: int = 64,
  downsample: Downsample = "stride",
  method: Method | None = None,
) -> Model:
  """The paper's Omniglot network: 4 x [conv 3x3, 64 filters, stride 2; norm; ReLU], dense.

  Args:
    ways: classes.
    filters: 64 in the paper; 113,221 parameters at 5 ways.
    downsample: `"stride"`, as in the paper, or `"pool"`.
    method: of `metajax.convolution`.

  Returns:
    A model of images `[n, 28, 28, 1]`, float or uint8 in 0..255.
  """
  return _images((28, 28, 1), ways, filters, downsample=downsample, method=method)


def mini_imagenet(ways: int, *, filters: int = 32, method: Method | None = None) -> Model:
  """The paper's mini-ImageNet network: 4 x [conv 3x3, 32 filters; norm; max-pool 2x2; ReLU], dense.

  Args:
    ways: classes.
    filters: 32 in the paper.
    method: of `metajax.convolution`.

  Returns:
    A model of images `[n, 84, 84, 3]`, float or uint8 in 0..255.
  """
  return _images((84, 84, 3), ways, filters, downsample="pool", method=method)


def finn_omniglot(ways: int, *, filters: int = 64, method: Method | None = None) -> Model:
  """The Omniglot network of Finn et al. (2017), of the paper's MAML and FOMAML rows.

  As `omniglot`, but the dense layer sees the mean over positions and starts from N(0, 1), and batch
  normalization has no scales. Its offsets are not theirs to adapt: leave them out of inner steps.
  """
  return _images(
    (28, 28, 1),
    ways,
    filters,
    head="mean",
    method=method,
    norm_scale=False,
    head_init=nn.initializers.normal(1.0),
  )


def finn_mini_imagenet(ways: int, *, filters: int = 32, method: Method | None = None) -> Model:
  """The mini-ImageNet network of Finn et al. (2017), of the paper's MAML and FOMAML rows.

  As `mini_imagenet`, but pooling drops odd rows and columns, which leaves 5 x 5 positions of 6 x 6,
  and batch normalization has no scales. Its offsets are not theirs to adapt: leave them out of
  inner steps.
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


def _images(size: tuple[int, int, int], ways: int, filters: int, **options: Any) -> Model:
  network = ConvNet(_positive(ways=ways), _positive(filters=filters), **options)
  return from_linen(network, np.zeros((1, *size), np.float32))


def sine(
  features: Sequence[int] = (64, 64, 1), activation: Callable[[jax.Array], jax.Array] = nn.tanh
) -> Model:
  """The paper's regression network, 1-64-64-1: inputs `[n, 1]` to outputs `[n, 1]`.

  Raises:
    ValueError: if there is no layer, or one without a unit.
  """
  if not features or min(features) < 1:
    raise ValueError(f"features must be numbers of at least 1, not {tuple(features)}")
  return from_linen(MLP(tuple(features), activation), np.zeros((1, 1), np.float32))


def _positive(**named: int) -> int:
  ((name, value),) = named.items()
  if value < 1:
    raise ValueError(f"{name} must be at least 1, not {value}")
  return value
