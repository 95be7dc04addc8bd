import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import metajax
from metajax import models

KEY = jax.random.key(0)


def size(model):
  return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, KEY)))


def test_parameter_counts():
  assert size(models.omniglot(5)) == 113_221
  assert size(models.omniglot(20)) == 113_221 + 15 * 257
  # Four blocks of kernel, bias, scale and offset, at 32 filters; then 6 x 6 x 32 = 1152 features.
  assert size(models.mini_imagenet(5)) == 27 * 32 + 3 * 288 * 32 + 4 * 3 * 32 + 1152 * 5 + 5
  # Finn et al.'s: blocks of kernel, bias and offset; 64 means, or 5 x 5 x 32 = 800 features.
  assert size(models.finn_omniglot(5)) == 9 * 64 + 3 * 576 * 64 + 4 * 2 * 64 + 64 * 5 + 5
  assert size(models.finn_mini_imagenet(5)) == 27 * 32 + 3 * 288 * 32 + 4 * 2 * 32 + 800 * 5 + 5
  assert size(models.sine()) == 64 * 2 + 64 * 65 + 65


def finn(params, images, pool):
  """Finn et al.'s network in NumPy: positions one by one, and ReLU before pooling."""
  hidden = np.asarray(images, np.float64) if pool else 1 - np.asarray(images, np.float64)
  for block in range(4):
    kernel, bias = (np.float64(params[f"Conv_{block}"][name]) for name in ("kernel", "bias"))
    height, stride = hidden.shape[1], 1 if pool else 2
    out = -(-height // stride)
    before = max((out - 1) * stride + 3 - height, 0) // 2  # SAME, as TensorFlow has it
    padded = np.pad(hidden, ((0, 0), (before, 2), (before, 2), (0, 0)))
    window = lambda i, padded=padded, stride=stride: slice(i * stride, i * stride + 3)
    rows = [
      [np.tensordot(padded[:, window(i), window(j)], kernel, 3) + bias for j in range(out)]
      for i in range(out)
    ]
    hidden = np.moveaxis(np.array(rows), 2, 0)
    mean, variance = hidden.mean(axis=(0, 1, 2)), hidden.var(axis=(0, 1, 2))
    hidden = (hidden - mean) / np.sqrt(variance + 1e-3) + params[f"BatchStatsNorm_{block}"]["bias"]
    hidden = np.maximum(hidden, 0)
    if pool:
      half = out // 2
      cells = hidden[:, : 2 * half, : 2 * half].reshape(len(hidden), half, 2, half, 2, -1)
      hidden = cells.max(axis=(2, 4))
  hidden = hidden.reshape(len(hidden), -1) if pool else hidden.mean(axis=(1, 2))
  return hidden @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


@pytest.mark.parametrize(
  ("network", "shape"),
  [(models.finn_omniglot, (28, 28, 1)), (models.finn_mini_imagenet, (84, 84, 3))],
)
def test_finn_s_networks_are_finn_s(x64, network, shape):
  rng = np.random.default_rng(0)
  model = network(3, filters=2)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), jax.eval_shape(model.init, KEY))
  images = rng.normal(size=(4, *shape))
  pool = network is models.finn_mini_imagenet
  np.testing.assert_allclose(
    jax.jit(model.apply)(params, images), finn(params, images, pool), rtol=1e-5, atol=1e-5
  )


def test_finn_s_last_layer_starts_from_the_normal_distribution():
  kernel = jax.jit(models.finn_omniglot(100).init)(KEY)["Dense_0"]["kernel"]
  assert abs(float(jnp.std(kernel)) - 1) < 5 / np.sqrt(2 * kernel.size)


def test_batch_statistics_are_those_of_the_batch():
  inputs = 3.0 + 2.0 * jax.random.normal(KEY, (50, 4, 4, 2))
  norm = models.BatchStatsNorm()
  outputs = norm.apply(norm.init(KEY, inputs), inputs)
  array = np.asarray(inputs, np.float64)
  mean, variance = array.mean(axis=(0, 1, 2)), array.var(axis=(0, 1, 2))
  np.testing.assert_allclose(
    outputs, (array - mean) / np.sqrt(variance + 1e-3), rtol=1e-4, atol=1e-5
  )


def test_bytes_count_as_0_to_255():
  model = models.mini_imagenet(5, filters=4)
  params = jax.jit(model.init)(KEY)
  images = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8)
  apply = jax.jit(model.apply)
  np.testing.assert_allclose(
    apply(params, jnp.asarray(images)),
    apply(params, jnp.asarray(images / 255, jnp.float32)),
    rtol=1e-4,
    atol=1e-5,
  )


class WithState(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(inputs))


def test_linen_modules_with_state_are_refused():
  with pytest.raises(ValueError, match=r"use metajax.models.BatchStatsNorm"):
    models.from_linen(WithState(), jnp.ones((3, 4))).init(KEY)


def trains(model, inputs):
  """A meta-step runs, and changes every parameter."""
  loss = metajax.losses.squared_error(model.apply, reduction="mean")
  gradient = metajax.maml(loss, optax.sgd(0.1))
  learner = metajax.meta_learner(gradient, optax.sgd(0.1), metajax.serial(1))
  params = model.init(KEY)
  targets = jnp.ones_like(model.apply(params, inputs))
  pool = metajax.Examples(inputs, targets)
  episode = metajax.Episode(pool, jnp.zeros((2, 3), jnp.int32), pool)
  episodes = jax.tree.map(lambda leaf: leaf[None], episode)
  state, info = jax.jit(learner.step)(learner.init(params), episodes)
  assert np.isfinite(info.losses).all()
  changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, params)
  assert all(jax.tree.leaves(changed)) and jax.tree.leaves(changed)


def test_nnx_modules():
  class Network(nnx.Module):
    def __init__(self, rngs):
      self.hidden, self.out = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, inputs):
      return self.out(jnp.tanh(self.hidden(inputs)))

  model = models.from_nnx(Network)
  inputs = jax.random.normal(KEY, (5, 4))
  params = model.init(KEY)
  by_hand = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  by_hand = by_hand @ params["out"]["kernel"] + params["out"]["bias"]
  np.testing.assert_allclose(model.apply(params, inputs), by_hand, rtol=1e-4, atol=1e-6)
  trains(model, inputs)


def test_an_nnx_module_is_made_once(monkeypatch):
  made = []

  def make(rngs):
    made.append(rngs)
    return nnx.Linear(4, 2, rngs=rngs)

  model = models.from_nnx(make)
  params = model.init(KEY)
  for _ in range(3):
    model.apply(params, jnp.ones((5, 4)))
  assert len(made) == 2  # for init, and once for all calls of apply
  other = model.init(jax.random.key(1))  # numbers of one call do not stay for the next
  outputs = [model.apply(one, jnp.ones((5, 4))) for one in (params, other, params)]
  assert np.array_equal(outputs[0], outputs[2]) and not np.array_equal(outputs[0], outputs[1])


def test_twins_of_batch_statistics_norm():
  inputs = 3.0 + 2.0 * jax.random.normal(KEY, (6, 4, 5, 2))
  scale, bias = jnp.array([0.5, 2.0]), jnp.array([1.0, -1.0])
  expected = models.BatchStatsNorm().apply({"params": {"scale": scale, "bias": bias}}, inputs)

  of_nnx = metajax.models.nnx.BatchStatsNorm
  twin = models.from_nnx(lambda rngs: of_nnx(2, rngs=rngs))
  assert jax.tree.map(jnp.shape, twin.init(KEY)) == {"scale": (2,), "bias": (2,)}
  found = twin.apply({"scale": scale, "bias": bias}, inputs)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  unscaled = models.from_nnx(lambda rngs: of_nnx(2, use_scale=False))
  found = unscaled.apply({"bias": bias}, inputs)
  np.testing.assert_allclose(found, (expected - bias) / scale + bias, rtol=1e-4, atol=1e-5)

  eqx = pytest.importorskip("equinox")
  equinox = metajax.models.equinox
  twin = models.from_equinox(lambda key: equinox.BatchStatsNorm(2))
  params = eqx.tree_at(lambda p: (p.scale, p.bias), twin.init(KEY), (scale, bias))
  found = twin.apply(params, jnp.moveaxis(inputs, -1, 1))
  np.testing.assert_allclose(jnp.moveaxis(found, 1, -1), expected, rtol=1e-5, atol=1e-6)


def test_a_haiku_style_pair():
  """`hk.without_apply_rng(hk.transform(f))` has these two functions."""

  def init(key, inputs):
    return {"linear": {"w": jax.random.normal(key, (inputs.shape[-1], 2))}}

  def apply(params, inputs):
    return inputs @ params["linear"]["w"]

  inputs = jax.random.normal(KEY, (5, 4))
  trains(models.Model(lambda key: init(key, inputs), apply), inputs)


def residual(params, images):
  """ResNet-12 with one block, by NumPy: loops over positions, and statistics of the batch."""

  def norm(x, p):
    centred = x - x.mean(axis=(0, 1, 2))
    return centred / np.sqrt(x.var(axis=(0, 1, 2)) + 1e-3) * p["scale"] + p["bias"]

  def conv(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
      padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )

  leaky = lambda x: np.where(x > 0, x, 0.1 * x)
  norms = [params[f"BatchStatsNorm_{i}"] for i in range(4)]
  x = leaky(norm(conv(images, params["Conv_0"]["kernel"]), norms[1]))
  x = leaky(norm(conv(x, params["Conv_1"]["kernel"]), norms[2]))
  x = norm(conv(x, params["Conv_2"]["kernel"]), norms[3])
  x = leaky(x + norm(images @ params["Dense_0"]["kernel"], norms[0]))
  n, height, width, channels = x.shape
  x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
  return x.mean(axis=(1, 2)) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def test_resnet12(x64):
  rng = np.random.default_rng(0)
  model = models.resnet12((6, 4), 2, channels=2, filters=(3,))
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), jax.eval_shape(model.init, KEY))
  images = rng.normal(size=(3, 6, 4, 2))
  np.testing.assert_allclose(model.apply(params, images), residual(params, images), rtol=1e-9)
  size = sum(
    leaf.size for leaf in jax.tree.leaves(jax.eval_shape(models.resnet12(84, 5).init, KEY))
  )
  biases_of_convolutions = 3 * (64 + 160 + 320 + 640)  # never added, see Conv
  assert size - biases_of_convolutions == 12_427_525


def test_conv4_has_the_paper_s_networks_as_instances():
  for general, particular in (
    (models.conv4(28, 5, downsample="stride"), models.omniglot(5)),
    (models.conv4((84, 84), 5, channels=3, filters=32), models.mini_imagenet(5)),
  ):
    shapes = [jax.eval_shape(model.init, KEY) for model in (general, particular)]
    assert shapes[0] == shapes[1]
  model = models.conv4((8, 5), 3, channels=2, filters=4)
  assert model.apply(model.init(KEY), jnp.ones((2, 8, 5, 2))).shape == (2, 3)


def test_a_summary_counts_parameters_and_operations():
  found = models.summary(models.omniglot(5), np.zeros((10, 28, 28, 1), np.uint8))
  lines = [line.split() for line in found.splitlines()]
  assert lines[0] == ["part", "shapes", "parameters"] and lines[-2] == ["all", "113,221"]
  assert ["Conv_1", "64,", "3x3x64x64", "36,928"] in lines
  products = 1960 * 9 + (490 + 160 + 40) * 576  # rows x depth of the convolutions, 64 columns each
  flops = 2 * (64 * products + 10 * 256 * 5)
  shown = re.fullmatch(
    r"minibatch of 10: a forward pass: ([\d.]+) MFLOP; a gradient: [\d.]+ MB of .*",
    " ".join(lines[-1]),
  )
  assert flops <= 1e6 * float(shown[1]) <= 1.05 * flops  # normalization is little
  own = models.Model(lambda key: jnp.ones((3, 2)), lambda params, x: x @ params)
  assert "params  3x2              6" in models.summary(own, np.zeros((1, 3), np.float32))


def test_a_summary_leaves_out_what_the_backend_does_not_count(monkeypatch):
  monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda lowered: None)  # as on a GPU
  own = models.Model(lambda key: jnp.ones((3, 2)), lambda params, x: x @ params)
  last = models.summary(own, np.zeros((1, 3), np.float32)).splitlines()[-1]
  assert re.fullmatch(r"minibatch of 1: a gradient: [\d.]+ MB of temporary memory", last)


def test_networks_are_made_again_from_their_spec():
  for model in (
    models.omniglot(5, filters=3, method="xla"),
    models.conv4((9, 8), 4, filters=2, head="mean"),
    models.finn_mini_imagenet(5, filters=2),
    models.mlp(3, 2, hidden=(4, 5), activation="silu"),
    models.resnet12(8, 3, filters=(2, 2)),
    models.sine(),
  ):
    spec = json.loads(json.dumps(model.spec))
    again = models.from_spec(spec)
    assert json.loads(json.dumps(again.spec)) == spec and "method" not in spec
    assert jax.eval_shape(again.init, KEY) == jax.eval_shape(model.init, KEY)
  with pytest.raises(ValueError, match="network 'os' must be one of conv4, omniglot"):
    models.from_spec({"name": "os"})
  with pytest.raises(ValueError, match=r"network omniglot cannot be made with {'depth': 3}"):
    models.from_spec({"name": "omniglot", "depth": 3})


def test_nnx_modules_with_state_are_refused():
  with pytest.raises(ValueError, match="keeps mean, var too: make constant"):
    models.from_nnx(lambda rngs: nnx.BatchNorm(3, rngs=rngs)).init(KEY)


def test_equinox_modules():
  eqx = pytest.importorskip("equinox")
  model = models.from_equinox(lambda key: eqx.nn.MLP(4, 2, 8, 1, key=key))
  inputs = jax.random.normal(KEY, (5, 4))
  np.testing.assert_allclose(
    model.apply(model.init(KEY), inputs),
    jax.vmap(eqx.nn.MLP(4, 2, 8, 1, key=KEY))(inputs),
    rtol=1e-6,
  )
  trains(model, inputs)


def test_an_equinox_module_may_keep_a_function_of_its_own():
  """It is another function each time that the module is made, and each time means the same."""
  eqx = pytest.importorskip("equinox")

  class Network(eqx.Module):
    dense: eqx.nn.Linear
    act: object = eqx.field(static=True)

    def __init__(self, key):
      self.dense, self.act = eqx.nn.Linear(4, 2, key=key), lambda x: jnp.maximum(x, 0.1 * x)

    def __call__(self, x):
      return self.act(self.dense(x))

  model, inputs = models.from_equinox(lambda key: Network(key)), jnp.ones((3, 4))
  np.testing.assert_allclose(
    model.apply(model.init(KEY), inputs), jax.vmap(Network(KEY))(inputs), rtol=1e-6
  )
  with pytest.raises(ValueError, match="not the parameters of this module: give those that init"):
    model.apply({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, inputs)


def test_equinox_modules_with_integers_are_refused():
  eqx = pytest.importorskip("equinox")

  class Counting(eqx.Module):
    calls: jax.Array

  with pytest.raises(ValueError, match="integer arrays"):
    models.from_equinox(lambda key: Counting(jnp.zeros((), jnp.int32))).init(KEY)


def test_plain_functions():
  model = models.Model(
    lambda key: {"w": jax.random.normal(key, (4, 2))}, lambda params, x: x @ params["w"]
  )
  trains(model, jax.random.normal(KEY, (5, 4)))


@pytest.mark.parametrize("network", [models.omniglot, models.mini_imagenet])
def test_networks_refuse_no_classes(network):
  with pytest.raises(ValueError, match="ways must be at least 1"):
    network(0)


def test_making_a_network_starts_no_backend():
  """So that `cores_as_devices` may come after."""
  program = "import metajax; metajax.models.omniglot(5); metajax.cores_as_devices(3)"
  subprocess.run([sys.executable, "-c", program], check=True)


def dropout_of_linen():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))

  return models.from_linen(Network(), np.ones((1, 6), np.float32))


def dropout_of_nnx():
  class Network(nnx.Module):
    def __init__(self, rngs):
      self.dense, self.dropout = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      return self.dropout(self.dense(x))

  return models.from_nnx(Network)


def dropout_of_equinox():
  eqx = pytest.importorskip("equinox")

  class Network(eqx.Module):
    dense: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key):
      self.dense, self.dropout = eqx.nn.Linear(6, 3, key=key), eqx.nn.Dropout(0.5)

    def __call__(self, x):
      return self.dropout(self.dense(x))

  return models.from_equinox(Network)


@pytest.mark.parametrize(
  ("make", "pattern"),
  [
    (dropout_of_linen, "has dropout: make it deterministic here"),
    (dropout_of_nnx, "keeps a key for them: make its dropout without rngs"),
    (dropout_of_equinox, "has dropout: make it deterministic here"),
  ],
)
def test_dropout_is_refused(make, pattern):
  """Its mask would be the same in all steps, all tasks and when predicting."""
  model = make()
  with pytest.raises(ValueError, match=pattern):
    model.apply(model.init(jax.random.key(0)), jnp.ones((2, 6)))


def test_a_module_is_not_its_factory():
  with pytest.raises(ValueError, match=r"from_linen takes a module such as MyNetwork\(\)"):
    models.from_linen(nn.Dense, np.ones((1, 6)))
  with pytest.raises(ValueError, match="not the module itself: give lambda rngs"):
    models.from_nnx(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
  eqx = pytest.importorskip("equinox")
  with pytest.raises(ValueError, match="not the module itself: give lambda key"):
    models.from_equinox(eqx.nn.Linear(6, 3, key=jax.random.key(0)))


def linen_with_dropout():
  class Network(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
      x = nn.relu(models.BatchStatsNorm()(nn.Dense(8)(x)))
      return nn.Dense(3)(nn.Dropout(0.5, deterministic=not self.train)(x))

  def apply(params, x, key):
    return Network(train=True).apply({"params": params}, x, rngs={"dropout": key})

  return models.from_linen(Network(), np.ones((1, 6), np.float32)), apply


def nnx_with_dropout():
  from metajax.models.nnx import BatchStatsNorm

  class Network(nnx.Module):
    def __init__(self, rngs, dropout_key=None):
      self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
      self.norm, self.dropout = BatchStatsNorm(8), nnx.Dropout(0.5)
      self.dropout_key = dropout_key

    def __call__(self, x):
      x = nnx.relu(self.norm(self.hidden(x)))
      if self.dropout_key is not None:
        x = self.dropout(x, rngs=nnx.Rngs(self.dropout_key))
      return self.out(x)

  def apply(params, x, key):
    graph, state = nnx.split(Network(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, params)
    network = nnx.merge(graph, state)
    network.dropout_key = key
    return network(x)

  return models.from_nnx(Network), apply


def equinox_with_dropout():
  eqx = pytest.importorskip("equinox")
  from metajax.models.equinox import BatchStatsNorm

  class Network(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear
    norm: BatchStatsNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
      self.hidden, self.out = eqx.nn.Linear(6, 8, key=key), eqx.nn.Linear(8, 3, key=key)
      self.norm, self.dropout = BatchStatsNorm(8), eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
      x = self.dropout(jax.nn.relu(self.norm(self.hidden(x))), key=key, inference=key is None)
      return self.out(x)

  def apply(params, x, key):
    network = eqx.combine(params, eqx.filter(Network(key), eqx.is_inexact_array, inverse=True))
    return jax.vmap(network, axis_name="batch")(x, jax.random.split(key, len(x)))

  return models.from_equinox(Network), apply


@pytest.mark.filterwarnings("ignore:sample_task does not use its key")
@pytest.mark.parametrize("make", [linen_with_dropout, nnx_with_dropout, equinox_with_dropout])
def test_networks_with_dropout_train_with_a_key(make):
  """Batch normalization and dropout: a new mask in each step, and none in predictions."""
  model, with_key = make()

  def loss(params, batch, key):
    logits = with_key(params, batch.inputs, key)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.mean(losses)

  data = metajax.Examples(jax.random.normal(KEY, (9, 6)), jnp.arange(9, dtype=jnp.int32) % 3)
  learner = metajax.meta_learner(
    metajax.fomaml(loss, optax.sgd(0.1)), optax.sgd(0.1), metajax.vmapped(2)
  )
  make_episode = metajax.shared_tail(metajax.cycling(3, 9))
  many_steps = jax.jit(metajax.run(learner, lambda key: metajax.Task(data, data), make_episode, 2))
  state, infos = many_steps(learner.init(model.init(KEY)), KEY)
  assert np.isfinite(infos.losses).all() and len(np.unique(infos.losses)) == 6
  outputs = [model.apply(state.params, data.inputs) for _ in range(2)]
  np.testing.assert_array_equal(*outputs)  # predictions draw nothing


def test_fully_connected_networks_by_hand():
  model = models.mlp(3, 2, hidden=(5, 4), activation="tanh")
  params = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), model.init(KEY))
  inputs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
  hidden = inputs
  for layer in range(3):
    hidden = np.tanh(hidden) if layer else hidden
    dense = params[f"Dense_{layer}"]
    hidden = hidden @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
  np.testing.assert_allclose(model.apply(params, inputs), hidden, rtol=1e-5, atol=1e-5)


def test_fully_connected_networks_begin_uniform_in_one_over_the_root_of_the_fan_in():
  params = models.mlp(100, 50, hidden=(400,)).init(KEY)
  for name, fan_in in (("Dense_0", 100), ("Dense_1", 400)):
    for leaf in params[name].values():
      assert 0.8 < float(jnp.abs(leaf).max()) * fan_in**0.5 <= 1
      assert abs(float(leaf.mean())) * fan_in**0.5 < 0.25 and leaf.min() < 0 < leaf.max()
