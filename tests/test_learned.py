"""A learner that is saved to a file adapts as the one that was trained."""

import functools
import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import models

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MEAN = {"name": "cross_entropy", "reduction": "mean"}
ADAM = {"name": "adam", "learning_rate": 0.02, "b1": 0.0, "eps": 0.01}
IMAGES = RNG.integers(0, 256, (9, 6, 5, 1), np.uint8)
LABELS = np.array(["cat", "dog", "bee"] * 3)
MORE = RNG.integers(0, 256, (40, 6, 5, 1), np.uint8)


def loss_of(model, reduction="mean"):
  return metajax.losses.cross_entropy(model.apply, reduction=reduction)


def saved(path, model=None, inner=None, *, execution=None, state=None, **changes):
  """Saves a learner with a small network, and returns it with its state and its network."""
  model = model or models.conv4((6, 5), 3, filters=2)
  inner = inner or metajax.carried(optax.adam(0.02, b1=0.0, eps=0.01))
  execution = execution or metajax.vmapped(2)
  learner = metajax.meta_learner(metajax.reptile(loss_of(model), inner), optax.sgd(1.0), execution)
  state = state or learner.init(model.init(KEY))
  settings = {
    "example_inputs": IMAGES[:1],
    "inner_optimizer": ADAM,
    "steps": 7,
    "batch_size": 4,
    "loss": MEAN,
    **changes,
  }
  metajax.save(path, learner, state, model, **settings)
  return learner, state, model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A file of a learner whose inner state was carried through a task."""
  path = tmp_path_factory.mktemp("learned") / "small.safetensors"
  learner, state, model = saved(path)
  task = metajax.Examples(jnp.asarray(IMAGES), jnp.arange(9, dtype=jnp.int32) % 3)
  episode = metajax.Episode(task, jnp.zeros((2, 3), jnp.int32), task)
  episodes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), episode)
  state, _ = jax.jit(learner.step)(state, episodes)
  saved(path, state=state, about={"accuracy": np.float32(0.5), "classes": ("a", "b")})
  return path, learner, state, model


@pytest.fixture(scope="module")
def learned(trained):
  return metajax.load(trained[0])


def test_numbers_and_recipe_come_back(trained):
  path, learner, state, model = trained
  learned = metajax.load(path)
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  same(learned.params, state.params)
  same(learned.inner_state, learner.execution.one(state.inner))
  assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(learned.inner_state[0].nu)) > 0
  assert learned.recipe.carried and learned.recipe.about == {"accuracy": 0.5, "classes": ["a", "b"]}
  assert learned.recipe.version == metajax.__version__
  assert learned.model.spec == {**model.spec, "size": [6, 5]}


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_it_adapts_and_predicts_as_the_learner_that_was_trained(trained, protocol):
  path, learner, state, model = trained
  predict = metajax.load(path).adapt(IMAGES, LABELS, protocol=protocol)
  found = predict(MORE)

  order = ["bee", "cat", "dog"]
  targets = jnp.array([order.index(label) for label in LABELS], jnp.int32)
  task = metajax.Task(metajax.Examples(IMAGES, targets), metajax.Examples(MORE, ()))
  evaluate = metajax.evaluate(
    learner, metajax.cycling(7, 4), getattr(metajax, protocol)(model.apply)
  )
  logits = np.asarray(jax.jit(evaluate)(state, jax.random.key(0), task), np.float64)
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(found.probabilities, expected, rtol=2e-4)
  assert found.classes.tolist() == order
  assert found.labels.tolist() == [order[i] for i in expected.argmax(axis=1)]
  assert found.probabilities.shape == (40, 3)


@pytest.mark.parametrize("inputs", [np.ones((2, 4), np.float32), {"a": np.ones((2, 4), np.uint8)}])
def test_a_network_of_ones_own_must_compute_what_it_did(tmp_path, inputs):
  """Not only have parameters of the same shapes."""

  def network(activation):
    first = lambda x: x["a"] / 255 if isinstance(x, dict) else x
    apply = lambda params, x: activation(first(x) @ params["w"]) @ params["v"]
    draw = lambda key: {"w": jax.random.normal(key, (4, 8)), "v": jax.random.normal(key, (8, 3))}
    return metajax.Model(draw, apply)

  path = tmp_path / "own.safetensors"
  saved(path, network(jnp.tanh), example_inputs=inputs)
  rounded = lambda x: jnp.tanh(x.astype(jnp.bfloat16)).astype(jnp.float32)
  for same in (lambda x: jnp.tanh(x), rounded):
    metajax.load(path, model=network(same))
  for other in (jax.nn.relu, lambda x: jnp.tanh(2 * x)):
    with pytest.raises(
      ValueError, match=r"other outputs than when .* with the same activations and"
    ):
      metajax.load(path, model=network(other))


def test_a_state_that_is_carried_beside_parameters_that_are_frozen(tmp_path):
  inner = metajax.carried(
    metajax.variants.only(
      optax.adam(0.02, b1=0.0, eps=0.01), lambda name: "BatchStatsNorm" not in name
    )
  )
  path = tmp_path / "frozen.safetensors"
  learner, state, _ = saved(path, inner=inner, frozen=("BatchStatsNorm",))
  examples = metajax.Examples(jnp.asarray(IMAGES), jnp.arange(9, dtype=jnp.int32) % 3)
  found = metajax.load(path).adapt_params(examples, KEY)
  expected = learner.adapt(state, examples, metajax.cycling(7, 4)(KEY, 9))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, found, expected)
  for name, part in found.items():
    moved = [not np.array_equal(part[leaf], state.params[name][leaf]) for leaf in part]
    assert any(moved) != name.startswith("BatchStatsNorm")


def test_the_seed_determines_the_minibatches(learned):
  found = [learned.adapt(IMAGES, LABELS, seed=seed)(MORE).probabilities for seed in (0, 3, 3)]
  assert np.abs(found[0] - found[1]).max() > 1e-3
  np.testing.assert_array_equal(found[1], found[2])


def test_predictions_of_one_input_do_not_depend_on_the_others_when_inductive(learned):
  predict = learned.adapt(IMAGES, LABELS)
  together = predict(MORE).probabilities
  for rows in (slice(1), slice(3, 37)):
    np.testing.assert_array_equal(predict(MORE[rows]).probabilities, together[rows])


def test_programs_are_compiled_once(learned):
  learned.adapt(IMAGES, LABELS)(MORE)
  with jax.log_compiles(True), pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax._src.compiler, "compile_or_get_cached", None)  # compiling would fail
    learned.adapt(IMAGES[::-1], LABELS[::-1], seed=3)(MORE[:7])


def test_labels_of_any_kind(learned):
  numbers = learned.adapt(IMAGES, [30, 7, -1] * 3)(MORE)
  assert numbers.classes.tolist() == [-1, 7, 30] and set(numbers.labels) <= {-1, 7, 30}
  two = learned.adapt(IMAGES[:4], ["no", "yes"] * 2)(MORE)
  assert two.probabilities.shape == (40, 2)
  np.testing.assert_allclose(two.probabilities.sum(axis=1), 1, rtol=1e-5)


def test_images_may_be_floats_from_0_to_1(learned):
  floats = learned.adapt(IMAGES / 255, LABELS)(MORE / 255)
  np.testing.assert_allclose(
    floats.probabilities, learned.adapt(IMAGES, LABELS)(MORE).probabilities, rtol=1e-3
  )


def test_images_of_two_kinds_in_one_task(learned):
  expected = learned.adapt(IMAGES, LABELS)(MORE).probabilities
  for few, more in ((IMAGES / 255, MORE), (IMAGES, MORE / np.float32(255))):
    np.testing.assert_array_equal(learned.adapt(few, LABELS)(more).probabilities, expected)


def test_parameters_of_another_precision_than_the_network_s(tmp_path):
  path, sgd = tmp_path / "narrow.safetensors", optax.sgd(0.1)
  model = models.conv4((6, 5), 3, filters=2)
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.init(KEY))
  loss = loss_of(model)
  learner = metajax.meta_learner(metajax.reptile(loss, sgd), optax.sgd(1.0), metajax.serial(1))
  saved(
    path, model, sgd, execution=metajax.serial(1), state=learner.init(narrow),
    inner_optimizer={"name": "sgd", "learning_rate": 0.1},
  )  # fmt: skip
  found = metajax.load(path).params
  jax.tree.map(np.testing.assert_array_equal, found, narrow)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))


def test_many_tasks_at_once(learned):
  targets = jnp.arange(9, dtype=jnp.int32) % 3
  tasks = metajax.Examples(np.stack([IMAGES, IMAGES[::-1]]), jnp.stack([targets, targets]))
  keys = jnp.stack([KEY, KEY])
  many = jax.jit(jax.vmap(learned.adapt_params))(tasks, keys)
  one = learned.adapt_params(metajax.Examples(IMAGES[::-1], targets), KEY)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5), many, one)


def test_a_network_of_the_user_s_own_and_inputs_of_several_parts(tmp_path):
  path = tmp_path / "own.safetensors"
  inputs = {"tokens": RNG.integers(0, 9, (6, 4)), "mask": RNG.random((6, 4)) < 0.7}

  def init(key):
    embedding = jax.random.normal(key, (9, 3)).astype(jnp.bfloat16)
    return [embedding, (jnp.ones(3),)]

  def apply(params, inputs):
    words = params[0][inputs["tokens"]] * inputs["mask"][..., None]
    return (words.sum(axis=1) * params[1][0]).astype(jnp.float32)

  own = models.Model(init, apply)
  sgd = {"name": "sgd", "learning_rate": 0.1}
  saved(
    path, own, optax.sgd(0.1), execution=metajax.serial(1), example_inputs=inputs,
    inner_optimizer=sgd,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"network of your own: give it, as load\(path, model"):
    metajax.load(path)
  learned = metajax.load(path, model=own)
  assert learned.params[0].dtype == jnp.bfloat16 and not learned.recipe.carried
  found = learned.adapt(inputs, [1, 2, 3] * 2)(inputs)
  assert found.probabilities.shape == (6, 3)
  with pytest.raises(ValueError, match=r"mask bool \[n, 4\], tokens int64 \[n, 4\], not 'mask'$"):
    learned.adapt({"mask": inputs["mask"]}, [1, 2, 3] * 2)
  other = models.Model(lambda key: [jnp.ones((9, 4)), (jnp.ones(3),)], apply)
  with pytest.raises(ValueError, match=r"params/0 is \(9, 3\) in the file and \(9, 4\) in the net"):
    metajax.load(path, model=other)


def test_a_regression(tmp_path):
  path = tmp_path / "sine.safetensors"
  model = models.mlp(1, 1, hidden=(8,), activation="tanh")
  loss = metajax.losses.squared_error(model.apply, reduction="mean")
  learner = metajax.meta_learner(
    metajax.maml(loss, optax.sgd(0.1)), optax.sgd(1.0), metajax.vmapped(2)
  )
  x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
  metajax.save(
    path, learner, learner.init(model.init(KEY)), model, example_inputs=x, steps=200,
    inner_optimizer={"name": "sgd", "learning_rate": 0.1}, batch_size=12,
    loss={"name": "squared_error", "reduction": "mean"},
  )  # fmt: skip
  predict = metajax.load(path).adapt(x, 2 * x)
  np.testing.assert_allclose(predict(x[3:7]), 2 * x[3:7], atol=0.2)


def test_frozen_parameters_stay(tmp_path):
  path, frozen = tmp_path / "frozen.safetensors", ("BatchStatsNorm", "Dense_0/bias")
  adapted = lambda name: not any(part in name for part in frozen)
  saved(
    path,
    inner=metajax.variants.only(optax.sgd(0.1), adapted),
    inner_optimizer={"name": "sgd", "learning_rate": 0.1},
    frozen=frozen,
  )
  learned = metajax.load(path)
  examples = metajax.Examples(IMAGES, jnp.arange(9, dtype=jnp.int32) % 3)
  adapted = learned.adapt_params(examples, KEY)
  for path, (a, b) in jax.tree_util.tree_leaves_with_path(
    jax.tree.map(lambda *pair: pair, learned.params, adapted), is_leaf=lambda x: type(x) is tuple
  ):
    name = jax.tree_util.keystr(path)
    stays = "BatchStatsNorm" in name or "'bias'" in name  # biases of convolutions are never added
    assert np.array_equal(a, b) == stays, name


def rewritten(path, change):
  """Changes what metajax wrote into the header of the file."""
  content = path.read_bytes()
  (size,) = struct.unpack("<Q", content[:8])
  header = json.loads(content[8 : 8 + size])
  ours = json.loads(header["__metadata__"]["metajax"])
  change(ours)
  header["__metadata__"]["metajax"] = json.dumps(ours)
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_other_files_are_refused(trained, tmp_path):
  sound, path = trained[0].read_bytes(), tmp_path / "other.safetensors"
  with pytest.raises(ValueError, match="neither a file nor the name of a learner of metajax"):
    metajax.load(path)
  for spoilt in (b"", sound[:100], sound[:-3], sound[:8] + b"x" + sound[9:]):
    path.write_bytes(spoilt)
    with pytest.raises(ValueError, match="is no learner file, or it is damaged"):
      metajax.load(path)
  path.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
  with pytest.raises(ValueError, match="its numbers are not those that were saved"):
    metajax.load(path)
  path.write_bytes(sound)
  rewritten(path, lambda header: header["recipe"].update(steps=8))
  with pytest.raises(ValueError, match="its recipe is not the one that was saved"):
    metajax.load(path)
  path.write_bytes(sound)
  rewritten(path, lambda header: header.pop("recipe_crc32"))
  with pytest.raises(ValueError, match="is no learner file of format 1"):
    metajax.load(path)
  path.write_bytes(sound)
  rewritten(path, lambda header: header.update(format=2))
  with pytest.raises(ValueError, match="is no learner file of format 1: write it with metajax"):
    metajax.load(path)
  path.write_bytes(sound)
  rewritten(path, lambda header: header["recipe"].update(more=1))  # of a later version
  with pytest.raises(ValueError, match="or read it with the version of metajax that wrote it"):
    metajax.load(path)
  path.write_bytes(sound)
  rewritten(path, lambda header: header.update(recipe=5))
  with pytest.raises(ValueError, match="is no learner file of format 1"):
    metajax.load(path)
  path.write_bytes(sound)
  rewritten(path, dict.clear)
  with pytest.raises(ValueError, match="is no learner file of format 1"):
    metajax.load(path)


def test_a_file_that_asks_for_other_code_is_refused(trained, tmp_path):
  path = tmp_path / "other.safetensors"

  def asking_for(**changes):
    path.write_bytes(trained[0].read_bytes())
    rewritten(path, lambda header: header["recipe"].update(changes))
    checksum = metajax.learner_file._recipe_checksum  # as if it were of this recipe
    rewritten(path, lambda header: header.update(recipe_crc32=checksum(header["recipe"])))
    return path

  with pytest.raises(ValueError, match="inner_optimizer must be one of adabelief"):
    metajax.load(asking_for(inner_optimizer={"name": "__import__"}))
  with pytest.raises(ValueError, match="network 'from_linen' must be one of"):
    metajax.load(asking_for(network={"name": "from_linen"}))
  with pytest.raises(ValueError, match="loss must be one of cross_entropy"):
    metajax.load(asking_for(loss={"name": "accuracy"}))


REFUSALS = [
  (lambda: ({}, {"loss": "cross_entropy"}), "'reduction': 'mean'}, not 'cross_entropy'"),
  (lambda: ({}, {"inner_optimizer": "sgd"}), "'learning_rate': 0.1}, not 'sgd'"),
  (lambda: ({}, {"inner_optimizer": {"name": "sgd", "rate": 1}}), "optax.sgd cannot be made with"),
  (lambda: ({}, {"inner_optimizer": {"name": "chain"}}), "inner_optimizer must be one of"),
  (
    lambda: ({}, {"inner_optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}}),
    "the inner state is not that of this optimizer",
  ),
  (lambda: ({}, {"about": {"x": object()}}), "numbers, strings, lists and dicts of them"),
  (
    lambda: ({}, {"loss": {"name": "hinge"}}),
    "loss must be one of cross_entropy, squared_error with",
  ),
  (lambda: ({}, {"steps": 0}), "steps must be at least 1"),
  (lambda: ({}, {"steps": 5.0}), "steps must be a whole number, not 5.0"),
  (lambda: ({}, {"frozen": "Dense_0"}), r"frozen must be several names, as \('Dense_0',\)"),
  (lambda: ({}, {"frozen": ("Dens_0",)}), "frozen names 'Dens_0', which is in the name of no"),
  (lambda: ({}, {"frozen": ("params",)}), "frozen names 'params', which is in the name of no"),
  (lambda: ({}, {"loss": {"name": "cross_entropy", "reducton": "sum"}}), "with a reduction, as"),
]


@pytest.mark.parametrize(("make", "pattern"), REFUSALS)
def test_what_cannot_be_saved_is_refused(make, pattern, tmp_path):
  arguments, changes = make()
  with pytest.raises(ValueError, match=pattern):
    saved(tmp_path / "x.safetensors", **arguments, **changes)
  assert not list(tmp_path.iterdir())


def test_a_file_is_compared_on_more_than_its_example(tmp_path):
  """From zeros, no step moves a convolution, whether it is frozen or not."""
  inner = metajax.variants.only(optax.sgd(0.3), lambda name: "Dense" in name)
  path, zeros = tmp_path / "x.safetensors", np.zeros_like(IMAGES[:1])
  with pytest.raises(ValueError, match="would not adapt as the learner does"):
    saved(path, inner=inner, example_inputs=zeros, inner_optimizer=SGD)


def test_example_inputs_have_an_axis_of_examples(tmp_path):
  with pytest.raises(
    ValueError, match=r"must have an axis of examples, .* inputs\[:1\] rather than"
  ):
    example = np.zeros(4, np.float32)
    saved(
      tmp_path / "x.safetensors", DENSE, optax.sgd(0.3), example_inputs=example, inner_optimizer=SGD
    )


def test_outputs_may_be_a_number_for_each_input(tmp_path):
  line = metajax.Model(lambda key: {"w": jnp.zeros(1)}, lambda params, x: x @ params["w"])
  error = metajax.losses.squared_error(line.apply, reduction="mean")
  gradient = metajax.reptile(error, optax.sgd(0.1))
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.vmapped(1))
  path, x = tmp_path / "line.safetensors", np.ones((4, 1), np.float32)
  metajax.save(
    path,
    learner,
    learner.init(line.init(KEY)),
    line,
    example_inputs=x,
    inner_optimizer={"name": "sgd", "learning_rate": 0.1},
    steps=3,
    batch_size=4,
    loss={"name": "squared_error", "reduction": "mean"},
  )
  found = metajax.load(path, model=line).adapt(x, 2 * x[:, 0])(x)
  np.testing.assert_allclose(found, np.full(4, 2 * (1 - 0.8**3)), rtol=1e-5)


def test_a_file_may_be_below_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  saved("~/x.safetensors")
  assert (tmp_path / "x.safetensors").is_file()
  assert metajax.load("~/x.safetensors").recipe.steps == 7


def other_loss(model):
  """The cross-entropy again, in other words."""

  def loss(params, batch):
    logits = jax.nn.log_softmax(model.apply(params, batch.inputs))
    return -jnp.mean(jnp.take_along_axis(logits, batch.targets[:, None], axis=1))

  return loss


SGD = {"name": "sgd", "learning_rate": 0.3}
DENSE = models.mlp(4, 3, hidden=(5,))
LOUDER = DENSE._replace(apply=lambda params, inputs: 3 * DENSE.apply(params, inputs))


@pytest.mark.parametrize(
  ("gradient", "model", "settings"),
  [
    (metajax.reptile(loss_of(DENSE), optax.sgd(0.3)), DENSE, {"inner_optimizer": SGD}),
    (metajax.maml(other_loss(DENSE), optax.sgd(0.3)), DENSE, {"inner_optimizer": SGD}),
    (metajax.variants.imaml(loss_of(DENSE), optax.sgd(0.3), strength=5.0), DENSE, None),
    (metajax.reptile(loss_of(DENSE), optax.sgd(3.0)), DENSE, None),
    (metajax.reptile(loss_of(DENSE, "sum"), optax.sgd(0.3)), DENSE, None),
    (
      metajax.reptile(
        loss_of(DENSE), metajax.variants.only(optax.sgd(0.3), lambda name: "Dense_1" in name)
      ),
      DENSE,
      None,
    ),
    (metajax.reptile(loss_of(LOUDER), optax.sgd(0.3)), LOUDER, None),
  ],
  ids=["the same", "in other words", "implicit", "rate", "reduction", "frozen", "another apply"],
)
@pytest.mark.parametrize("rows", [1, 6])
def test_a_file_that_would_adapt_otherwise_is_not_written(
  gradient, model, settings, rows, tmp_path
):
  learner = metajax.meta_learner(gradient, optax.adam(1e-3), metajax.serial(2))
  state = learner.init(model.init(KEY))
  inputs = np.asarray(RNG.normal(size=(rows, 4)), np.float32)
  same = {"example_inputs": inputs, "inner_optimizer": SGD, "steps": 5, "batch_size": 3}
  write = lambda: metajax.save(tmp_path / "x.safetensors", learner, state, model, **same, loss=MEAN)
  if settings is not None:
    write()
    return
  with pytest.raises(ValueError, match="would not adapt as the learner does: give the learner's"):
    write()
  assert not list(tmp_path.iterdir())


def test_rates_in_arrays_are_compared(tmp_path):
  """The text of two programs does not show the numbers in their arrays."""
  same = {"example_inputs": np.ones((1, 4), np.float32)}
  rate = {"name": "sgd", "learning_rate": jnp.float32(0.3)}
  write = lambda own: saved(
    tmp_path / "x.safetensors", DENSE, optax.sgd(own), inner_optimizer=rate, **same
  )
  with pytest.raises(ValueError, match="would not adapt as the learner does"):
    write(jnp.float32(3.0))
  assert not list(tmp_path.iterdir())
  write(jnp.float32(0.3))


def one_hot(params, batch):
  logits = DENSE.apply(params, batch.inputs)
  return jnp.mean(-jnp.sum(batch.targets * jax.nn.log_softmax(logits), axis=-1))


def with_key(params, batch, key):
  return one_hot(params, batch)


@pytest.mark.parametrize("rate", [0.3, 3.0])
def test_a_learner_whose_loss_takes_other_targets_is_compared(rate, tmp_path):
  learner = metajax.meta_learner(
    metajax.reptile(one_hot, optax.sgd(rate)), optax.adam(1e-3), metajax.serial(2)
  )
  same = {"example_inputs": np.ones((1, 4), np.float32), "inner_optimizer": SGD, "loss": MEAN}
  state = learner.init(DENSE.init(KEY))
  write = lambda: metajax.save(
    tmp_path / "x.safetensors", learner, state, DENSE, **same, steps=2, batch_size=2
  )
  if rate == 0.3:
    write()
  else:
    with pytest.raises(ValueError, match="would not adapt as the learner does"):
      write()


def test_a_learner_that_cannot_be_compared_is_written_with_a_warning(tmp_path):
  learner = metajax.meta_learner(
    metajax.reptile(with_key, optax.sgd(0.3)), optax.adam(1e-3), metajax.serial(2)
  )
  same = {"example_inputs": np.ones((1, 4), np.float32), "inner_optimizer": SGD, "loss": MEAN}
  path, state = tmp_path / "x.safetensors", learner.init(DENSE.init(KEY))
  with pytest.warns(UserWarning, match="could not be compared with the learner, whose loss takes"):
    metajax.save(path, learner, state, DENSE, **same, steps=2, batch_size=2)
  assert path.exists()


def test_several_processes_compare_programs_and_say_so(tmp_path, monkeypatch):
  """One process stands for two: a program of other numbers has another text."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  same = {"example_inputs": np.ones((1, 4), np.float32), "inner_optimizer": SGD}
  saved(tmp_path / "x.safetensors", DENSE, optax.sgd(0.3), **same)
  saved(tmp_path / "x.safetensors")  # whose network holds arrays
  with pytest.warns(UserWarning, match="could not be compared with the learner, which several"):
    saved(tmp_path / "x.safetensors", DENSE, optax.sgd(3.0), **same)


def test_a_learner_that_also_learns_rates_is_not_written(tmp_path):
  gradient = metajax.variants.meta_sgd(loss_of(DENSE))
  learner = metajax.meta_learner(gradient, optax.sgd(0.1), metajax.serial(2))
  state = learner.init(metajax.variants.with_rates(DENSE.init(KEY), 0.3))
  same = {"example_inputs": np.ones((1, 4), np.float32), "inner_optimizer": SGD, "loss": MEAN}
  with pytest.raises(
    ValueError, match=r"not those of this model: give .* such as Meta-SGD, cannot"
  ):
    metajax.save(tmp_path / "x.safetensors", learner, state, DENSE, **same, steps=1, batch_size=1)
  assert not list(tmp_path.iterdir())


def test_probabilities_of_a_network_that_computes_in_bfloat16_are_float32(tmp_path):
  half = lambda params, inputs: DENSE.apply(params, inputs).astype(jnp.bfloat16)
  path = tmp_path / "x.safetensors"
  model, inputs = DENSE._replace(apply=half, spec=None), np.eye(4, dtype=np.float32)
  saved(path, model, optax.sgd(0.3), example_inputs=inputs, inner_optimizer=SGD)
  found = metajax.load(path, model=model).adapt(inputs, [2, 3, 5, 2])(inputs).probabilities
  assert found.dtype == np.float32
  np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-6)  # bfloat16 has 8 bits


def test_examples_that_are_not_finite_have_no_label(tmp_path):
  """The largest of NaN probabilities would be the first."""
  inner = optax.sgd(0.3)
  learner = metajax.meta_learner(
    metajax.reptile(loss_of(DENSE), inner), optax.sgd(1.0), metajax.serial(1)
  )
  inputs = np.asarray(RNG.normal(size=(3, 4)), np.float32)
  settings = {"example_inputs": inputs, "steps": 5, "batch_size": 3, "loss": MEAN}
  path, state = tmp_path / "x.safetensors", learner.init(DENSE.init(KEY))
  metajax.save(path, learner, state, DENSE, **settings, inner_optimizer=SGD)
  learned = metajax.load(path)
  predict = learned.adapt(inputs, ["a", "b", "c"])
  spoilt = inputs.copy()
  spoilt[1, 2] = np.nan
  for use in (lambda: learned.adapt(spoilt, ["a", "b", "c"]), lambda: predict(spoilt)):
    with pytest.raises(ValueError, match="inputs must be finite: there are NaN or infinite"):
      use()
  with pytest.raises(ValueError, match="diverged in adapting to these examples"):
    learned.adapt(inputs * 1e38, ["a", "b", "c"])


def test_a_file_of_64_bits_is_read_with_64_bits(x64, tmp_path):
  learner = metajax.meta_learner(
    metajax.reptile(loss_of(DENSE), optax.sgd(0.3)), optax.sgd(1.0), metajax.serial(1)
  )
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), DENSE.init(KEY))
  path = tmp_path / "wide.safetensors"
  settings = {"example_inputs": np.zeros((3, 4)), "steps": 5, "batch_size": 3, "loss": MEAN}
  metajax.save(path, learner, learner.init(params), DENSE, **settings, inner_optimizer=SGD)
  assert metajax.load(path).params["Dense_0"]["kernel"].dtype == jnp.float64
  with jax.enable_x64(False), pytest.raises(ValueError, match="64 bits: set jax_enable_x64"):
    metajax.load(path)


def test_a_folder_does_not_hide_a_learner_that_comes_with_metajax(tmp_path, monkeypatch):
  (tmp_path / "glyphs_5way_reptile").mkdir()
  monkeypatch.chdir(tmp_path)
  assert metajax.load("glyphs_5way_reptile").recipe.about["data"] == "glyphs"


def test_names_and_folders_of_files(trained, tmp_path):
  with pytest.raises(ValueError, match=r"ends in \.safetensors, and .*learner\.bin does not"):
    saved(tmp_path / "learner.bin")
  with pytest.raises(OSError, match="cannot be written"):
    saved(tmp_path / "nowhere" / "x.safetensors")
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"file/x\.safetensors cannot be written \(Not a directory\)"):
    saved(tmp_path / "file" / "x.safetensors")
  nan = trained[2]._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, trained[2].params))
  with pytest.raises(ValueError, match="not all finite, so there is nothing to ship"):
    saved(tmp_path / "x.safetensors", state=nan)


BAD_TASKS = [
  (IMAGES[:, :5], LABELS, {}, r"must be \[n, 6, 5, 1\], not \(9, 5, 5, 1\): this learner was"),
  (IMAGES.astype(np.int32) * 2, LABELS, {}, "must be uint8, as this learner was trained on, not"),
  (IMAGES * 1.0, LABELS, {}, "give uint8, or floats from 0 to 1"),
  (IMAGES * np.nan, LABELS, {}, "images must be finite: there are NaN or infinite entries"),
  (IMAGES > 99, LABELS, {}, "must be uint8, as this learner was trained on, not bool"),
  (IMAGES[:0], [], {}, "there is no input: give at least one"),
  (IMAGES, [1.0, 2.0, np.nan] * 3, {}, "labels must be integers or strings, not float64"),
  ({"x": IMAGES}, LABELS, {}, r"inputs must be uint8 \[n, 6, 5, 1\], not 'x'"),
  (IMAGES, LABELS[:4], {}, r"9 inputs, and labels of shape \(4,\): give"),
  (IMAGES, range(9), {}, "at most 3 classes apart, and there are 9: leave some out"),
  (IMAGES, LABELS, {"protocol": "both"}, "'inductive' or 'transductive', not 'both'"),
]


@pytest.mark.parametrize(("inputs", "labels", "options", "pattern"), BAD_TASKS)
def test_tasks_that_do_not_fit_are_refused(learned, inputs, labels, options, pattern):
  with pytest.raises(ValueError, match=pattern):
    learned.adapt(inputs, labels, **options)


WITHOUT_METAJAX = """
import sys
import jax, numpy as np
from jax import export

folder = sys.argv[1]
read = lambda name: export.deserialize(bytearray(open(f"{folder}/{name}.bin", "rb").read()))
adapt, predict = read("adapt"), read("predict")
data = np.load(f"{folder}/task.npz")
params = adapt.call(data["images"], data["labels"], data["seed"])
np.save(f"{folder}/outputs.npy", predict.call(params, data["more"]))
assert not [name for name in sys.modules if name.startswith("metajax")]
"""


def test_adaptation_is_exported_to_a_process_without_metajax(learned, tmp_path):
  labels = np.arange(9, dtype=np.int32) % 3

  def adapt(images, labels, seed):
    return learned.adapt_params(metajax.Examples(images, labels), jax.random.key(seed))

  arguments = IMAGES, labels, np.int32(4)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
  (many,) = jax.export.symbolic_shape("m")
  images = jax.ShapeDtypeStruct((many, *IMAGES.shape[1:]), np.uint8)
  params = jax.eval_shape(adapt, *shapes)
  for name, exported in (
    ("adapt", jax.export.export(jax.jit(adapt))(*shapes)),
    ("predict", jax.export.export(jax.jit(learned.model.apply))(params, images)),
  ):
    (tmp_path / f"{name}.bin").write_bytes(exported.serialize())
  np.savez(tmp_path / "task.npz", images=IMAGES, labels=labels, seed=arguments[2], more=MORE)
  subprocess.run([sys.executable, "-c", WITHOUT_METAJAX, str(tmp_path)], check=True, cwd=tmp_path)
  expected = learned.model.apply(adapt(*arguments), MORE)
  np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("data", ["glyphs", "omniglot"])
def test_a_learner_that_comes_with_metajax(data, splits):
  """Drawn characters are told apart by what was trained on them, and on real ones."""
  learned = metajax.load(f"{data}_5way_reptile")
  assert learned.recipe.about["data"] == data and learned.recipe.network["name"] == "omniglot"
  task = metajax.data.few_shot.sample_task(splits.test, ways=5, train_shots=5, test_shots=4)(KEY)
  found = learned.adapt(task.train.inputs, task.train.targets)(task.test.inputs)
  assert np.mean(found.labels == task.test.targets) >= 0.7


def test_predictions_of_nothing_are_refused(learned):
  with pytest.raises(ValueError, match="there is no input: give at least one"):
    learned.adapt(IMAGES, LABELS)(MORE[:0])


def test_labels_of_one_class_are_refused(learned):
  with pytest.raises(ValueError, match="all labels are the same: give examples of two classes"):
    learned.adapt(IMAGES, ["a"] * len(IMAGES))
