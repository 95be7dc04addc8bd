"""A learner to ship: one file, from which it adapts to new tasks without any other setting."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from metajax import checks, losses
from metajax.data import few_shot
from metajax.devices import task_mesh
from metajax.episodes import cycling
from metajax.evaluation import inductive, transductive
from metajax.gradients import reptile
from metajax.inner import all_finite, begin_task, carried, initial_state
from metajax.learner_file import Recipe, filled, named, read, write
from metajax.meta import MetaLearner, MetaState, check_state
from metajax.models import Model, from_spec
from metajax.programs import without_sharding
from metajax.types import (
  Examples,
  InnerState,
  LossFn,
  Params,
  PRNGKey,
  Task,
  num_examples,
)
from metajax.variants import only

_AT_ONCE = 32  # test examples in one call of the compiled inductive prediction
_LOSSES = {"cross_entropy": losses.cross_entropy, "squared_error": losses.squared_error}
_OPTIMIZERS = (
  "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adan", "amsgrad", "lamb", "lars",
  "lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "yogi",
)  # fmt: skip
_MADE_UP = "outputs"  # the array of a file that holds those for made-up inputs
_MAKE_MODEL = "make one, as models.from_linen(module, example_inputs)"
Protocol = Literal["inductive", "transductive"]


class Predictions(NamedTuple):
  """What an adapted learner says about `m` inputs.

  Attributes:
    labels: `[m]`, the most probable class of each input, in the user's labels.
    probabilities: float32 `[m, c]`, of each class.
    classes: `[c]`, the user's labels in increasing order.
  """

  labels: np.ndarray
  probabilities: np.ndarray
  classes: np.ndarray


class Learned(NamedTuple):
  """A trained learner, from `load`.

  Attributes:
    params: the initialization that was learned.
    inner_state: of the inner optimizer, if it is carried from task to task.
    recipe: how it adapts.
    model: the network.
    adapt: `(inputs, labels, *, protocol="inductive", seed=0) -> predict` adapts to a task. Labels
      are integers or strings `[n]`, of two classes or more, and at most as many as the network has
      outputs. Then `predict(inputs)` returns the `Predictions` for inputs `[m, ...]`. For a
      regression, labels are the targets, and `predict` returns outputs `[m, ...]`. The programs are
      compiled once for each shape. The seed determines the minibatches.
    adapt_params: `(examples, key) -> params`, the same as a pure function of arrays, with labels
      from 0: to be compiled, mapped over many tasks by `jax.vmap`, judged, or exported.
  """

  params: Params
  inner_state: InnerState
  recipe: Recipe
  model: Model
  adapt: Callable[..., Callable[[Any], Any]]
  adapt_params: Callable[[Examples, PRNGKey], Params]


def save(
  path: str | os.PathLike,
  learner: MetaLearner,
  state: MetaState,
  model: Model,
  *,
  example_inputs: Any,
  inner_optimizer: dict[str, Any],
  steps: int,
  batch_size: int,
  loss: dict[str, Any],
  frozen: Sequence[str] = (),
  about: dict[str, Any] | None = None,
) -> None:
  """Writes a trained learner to one file, in the safetensors format with its recipe as JSON.

  If several processes share the run, all of them call this together, and the first one writes.

  Args:
    path: of the file, which ends in `.safetensors`.
    learner: from `meta_learner`.
    state: its trained state.
    model: the network. One that `metajax.models` makes by name, such as `conv4`, is made again by
      `load`; any other must be given to `load` again, which compares its outputs for two made-up
      inputs and refuses it if they are more than 10 % off. (They are not compared if inputs are
      nested trees, or if the network cannot be given made-up ones.)
    example_inputs: inputs `[n, ...]` of the shape and dtype that the network was trained on.
    inner_optimizer: the name of an optimizer of optax and its arguments, as `{"name": "sgd",
      "learning_rate": 0.1}`: `adabelief`, `adadelta`, `adagrad`, `adam`, `adamax`, `adamw`, `adan`,
      `amsgrad`, `lamb`, `lars`, `lion`, `nadam`, `nadamw`, `novograd`, `radam`, `rmsprop`, `rprop`,
      `sgd`, `sign_sgd` or `yogi`. A chain cannot be saved.
    steps: the number of inner steps of an adaptation.
    batch_size: the examples in the minibatch of a step.
    loss: as `{"name": "cross_entropy", "reduction": "mean"}`: `cross_entropy` or `squared_error`,
      with the reduction `sum` or `mean`.
    frozen: inner steps do not move parameters whose names contain one of these strings.
    about: anything else that JSON can hold, such as class names, accuracy or data.

  Raises:
    ValueError: if an argument has the wrong type or an unknown name, the parameters are not finite
      or do not fit the model, `frozen` names no parameter, or the file would not adapt as the
      learner does, as far as the first two inner steps show. Nothing is written then. A warning is
      given if the two cannot be compared, because the learner's loss takes a key or targets of
      another form, or because several processes share the run and the two programs differ.
    OSError: if the file cannot be written.
  """
  path, example_inputs = Path(path).expanduser(), _arrays(example_inputs)
  check_state(state)
  checks.is_a(Model, "model", model, _MAKE_MODEL)
  if isinstance(frozen, str):
    raise ValueError(f"frozen must be several names, as ({frozen!r},), not one string")
  checks.at_least_one(steps=steps, batch_size=batch_size)
  if path.suffix != ".safetensors":
    raise ValueError(f"a learner file ends in .safetensors, and {path} does not: rename it")
  params, inner_state = _fetched(learner, state)
  recipe = Recipe(
    inner_optimizer=inner_optimizer,
    steps=steps,
    batch_size=batch_size,
    loss=loss,
    frozen=tuple(frozen),
    network=model.spec,
    carried=type(inner_state) is not tuple or len(inner_state) > 0,
    inputs={
      name: {"shape": list(np.shape(leaf)[1:]), "dtype": str(leaf.dtype)}
      for name, leaf in named(example_inputs).items()
    },
    about=about or {},
    version=metadata.version("metajax"),
  )
  if not all_finite(params):
    raise ValueError("the parameters are not all finite, so there is nothing to ship: train again")
  arrays = {**named(params, "params"), **named(inner_state, "inner")}
  shapes = lambda tree: {name: np.shape(leaf) for name, leaf in named(tree).items()}
  if shapes(params) != shapes(jax.eval_shape(model.init, jax.random.key(0))):
    raise ValueError(
      "the learner's parameters are not those of this model: give the model that it was trained "
      "with; a learner that also learns something else, such as Meta-SGD, cannot be saved"
    )
  for part in frozen:
    if not any(part in name for name in named(params)):
      raise ValueError(f"frozen names {part!r}, which is in the name of no parameter")
  model = model if model.spec is None else from_spec(model.spec)  # as `load` makes it
  _learned(recipe, model, params, inner_state)  # raises what does not fit
  outputs = jax.eval_shape(model.apply, params, example_inputs)
  least = 2 if recipe.loss["name"] == "cross_entropy" else 1
  if outputs.ndim < least or outputs.shape[0] != num_examples(example_inputs):
    raise ValueError(
      "example_inputs must have an axis of examples, [n, ...], of which the model makes n rows of "
      f"outputs, not {outputs.shape}: give inputs[:1] rather than inputs[0]"
    )
  _check_adapts_as(learner, state, recipe, model, example_inputs, outputs.shape)
  if model.spec is None:
    with suppress(Exception):  # the user's own network may not take such inputs
      made_up = _of_made_up_inputs(recipe, model, params)
      arrays |= {} if made_up is None else {_MADE_UP: made_up}
  write(path, recipe, arrays)


def _check_adapts_as(
  learner: MetaLearner,
  state: MetaState,
  recipe: Recipe,
  model: Model,
  example_inputs: Any,
  outputs: tuple[int, ...],
) -> None:
  """Checks that the recipe adapts as the learner does, to any labels of inputs like the example."""
  given = num_examples(example_inputs)
  n = max(given, 4)  # of one example, the sum is the mean
  example_inputs = jax.tree.map(
    lambda leaf: np.stack([np.roll(leaf[row % given], row // given) for row in range(n)]),
    example_inputs,
  )
  outputs = n, *outputs[1:]
  if recipe.loss["name"] == "squared_error":
    targets = of_learner = np.zeros(outputs, np.float32)
  else:
    targets = np.resize(np.arange(outputs[-1], dtype=np.int32), outputs[:-1])
    of_learner = np.eye(outputs[-1], dtype=np.float32)[targets]  # if it takes probabilities
  examples = Examples(example_inputs, targets)
  # Not as many as classes, or one label for each example would pass for a row of probabilities.
  rows = cycling(min(recipe.steps, 2), 3 if outputs[-1] != 3 else 2)(jax.random.key(0), n)
  plain = reptile(_loss(recipe, model), _optimizer(recipe))

  def by_recipe(state: MetaState, examples: Examples, rows: jax.Array) -> Params:
    inner_state = learner.execution.one(state.inner)
    return plain.adapt(state.params, inner_state, examples, rows, None)

  shapes = jax.tree.map(without_sharding, state)
  for own in (examples, Examples(example_inputs, of_learner)):
    with suppress(TypeError, ValueError):
      program = jax.make_jaxpr(learner.adapt)(shapes, own, rows)
      break
  else:
    warnings.warn(
      "the file could not be compared with the learner, whose loss takes a key or targets of "
      "another form: see yourself that inner_optimizer, loss and frozen are those of the learner",
      stacklevel=3,
    )
    return
  other = jax.make_jaxpr(by_recipe)(shapes, examples, rows)
  if str(program) == str(other) and _equal(program.consts, other.consts):
    return
  if jax.process_count() > 1:
    warnings.warn(
      "the file could not be compared with the learner, which several processes share, and whose "
      "program is another one: see yourself that inner_optimizer, loss and frozen are those of the "
      "learner",
      stacklevel=3,
    )
    return
  largest = lambda a, b: max(
    jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b))
  )
  drawn = jax.tree.map(_drawn_like, example_inputs)
  for inputs in (example_inputs, drawn):  # the examples may be zeros, which move little
    with jax.default_matmul_precision("float32"):  # they may differ by less than TF32 rounds
      one = jax.jit(learner.adapt)(state, own._replace(inputs=inputs), rows)
      other = jax.jit(by_recipe)(state, examples._replace(inputs=inputs), rows)
    moved = largest(one, state.params)
    if inputs is drawn and not np.isfinite(moved):  # the network cannot take such inputs
      break
    if not largest(one, other) <= 1e-3 * moved + 1e-6:
      raise ValueError(
        "the file would not adapt as the learner does: give the learner's own inner_optimizer, "
        "loss, frozen and model; a learner that adapts in another way than by plain inner steps "
        "cannot be saved"
      )


def _equal(constants: list[Any], others: list[Any]) -> bool:
  """Whether the arrays of two programs, which their texts do not show, are known to be equal."""
  try:
    return all(
      one is other or np.array_equal(one, other)
      for one, other in zip(constants, others, strict=True)
    )
  except (TypeError, ValueError, RuntimeError):  # keys, or arrays that other processes hold
    return False


def _drawn_like(leaf: np.ndarray) -> np.ndarray:
  """Random inputs of this dtype. Integers such as tokens stay as they are: not all may exist."""
  rng = np.random.default_rng(0)
  if leaf.dtype in (np.uint8, np.bool_):
    return rng.integers(0, 2 if leaf.dtype == np.bool_ else 256, leaf.shape).astype(leaf.dtype)
  if jnp.issubdtype(leaf.dtype, jnp.floating):
    return rng.normal(size=leaf.shape).astype(leaf.dtype)
  return leaf


def _fetched(learner: MetaLearner, state: MetaState) -> tuple[Params, InnerState]:
  """The parameters and the inner state of one learner, as NumPy arrays."""
  one = lambda state: (state.params, learner.execution.one(state.inner))
  if jax.process_count() == 1:
    return jax.device_get(one(state))
  everywhere = jax.NamedSharding(task_mesh(), jax.P())  # each process fetches what it has
  return jax.device_get(jax.jit(one, out_shardings=everywhere)(state))


def load(path: str | os.PathLike, *, model: Model | None = None) -> Learned:
  """Reads a learner from its file. Nothing in a file is ever executed.

  Args:
    path: of a file that `save` wrote; or the name of a learner that comes with metajax, such as
      `"glyphs_5way_reptile"`.
    model: the network, if it is the user's own; by default the one that the file names.

  Raises:
    ValueError: if there is no such file, it is damaged, its numbers do not fit the network, the
      network's outputs for two made-up inputs are more than 10 % off, or of another shape, it was
      saved with a network of the user's own and `model` is not given, or it has numbers of 64 bits
      and JAX is not set to them.
  """
  path, recipe, arrays = read(path)
  if model is None:
    if recipe.network is None:
      raise ValueError(
        f"{path} was saved with a network of your own: give it, as load(path, model=model)"
      )
    model = from_spec(recipe.network)
  checks.is_a(Model, "model", model, _MAKE_MODEL)
  like = jax.eval_shape(model.init, jax.random.key(0))
  params = filled(path, "params", like, arrays)
  if _MADE_UP in arrays:
    now = _of_made_up_inputs(recipe, model, params)
    if now is None or now.shape != arrays[_MADE_UP].shape or _apart(now, arrays[_MADE_UP]) > 0.1:
      raise ValueError(
        f"the network has other outputs than when {path} was saved, for the same inputs: load it "
        "with the network that it was saved with, with the same activations and scale of inputs"
      )
  like = jax.eval_shape(partial(initial_state, _optimizer(recipe)), params)
  inner_state = filled(path, "inner", like, arrays)
  return _learned(recipe, model, params, inner_state)


def _of_made_up_inputs(recipe: Recipe, model: Model, params: Params) -> np.ndarray | None:
  """The network's outputs for two inputs, which are the same each time.

  None if they are not finite, or if the structure of its inputs is not known from their names.
  """

  def made_up(shape: list[int], dtype: str) -> np.ndarray:
    numbers = np.arange(2 * math.prod(shape)).reshape(2, *shape)
    if np.dtype(dtype) in (np.uint8, np.bool_):
      return (37 * numbers % (2 if dtype == "bool" else 256)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
      return np.sin(numbers).astype(dtype)
    return np.zeros_like(numbers, dtype)  # of tokens, not all may exist

  leaves = {name: made_up(**of_leaf) for name, of_leaf in recipe.inputs.items()}
  if any("/" in name for name in leaves):
    return None
  with jax.default_matmul_precision("float32"):  # alike on all backends
    outputs = np.asarray(model.apply(params, leaves.get("", leaves)), np.float32)
  return outputs if np.all(np.isfinite(outputs)) else None


def _apart(one: np.ndarray, other: np.ndarray) -> float:
  """The distance of two arrays, relative to their size."""
  return float(np.linalg.norm(one - other) / np.maximum(np.linalg.norm(other), 1e-6))


def _loss(recipe: Recipe, model: Model) -> LossFn:
  known = isinstance(recipe.loss, dict) and recipe.loss.get("name") in _LOSSES
  if not known or set(recipe.loss) != {"name", "reduction"}:
    raise ValueError(
      f"loss must be one of {', '.join(_LOSSES)} with a reduction, as {{'name': 'cross_entropy', "
      f"'reduction': 'mean'}}, not {recipe.loss!r}"
    )
  return _LOSSES[recipe.loss["name"]](model.apply, reduction=recipe.loss["reduction"])


def _learned(recipe: Recipe, model: Model, params: Params, inner_state: InnerState) -> Learned:
  loss = _loss(recipe, model)
  optimizer, schedule = _optimizer(recipe), cycling(recipe.steps, recipe.batch_size)
  begin_task(optimizer, params, inner_state)  # raises what does not fit

  def adapt_from(
    params: Params, inner_state: InnerState, examples: Examples, key: PRNGKey
  ) -> Params:
    rows = schedule(key, num_examples(examples))
    # All algorithms adapt alike.
    return reptile(loss, optimizer).adapt(params, inner_state, examples, rows, None)

  compiled = partial(jax.jit(adapt_from), params, inner_state)
  protocols = {
    "inductive": jax.jit(inductive(model.apply)),
    "transductive": jax.jit(transductive(model.apply)),
  }

  def adapted_to(train: Examples, seed: int) -> Params:
    adapted = compiled(train, jax.random.key(seed))
    if not all_finite(adapted):
      raise ValueError(
        "the network diverged in adapting to these examples: see that they are like those that it "
        "was trained on"
      )
    return adapted

  def outputs(adapted: Params, train: Examples, inputs: Any, protocol: Protocol) -> np.ndarray:
    predict = lambda inputs: protocols[protocol](adapted, Task(train, Examples(inputs, ())))
    if protocol == "transductive":
      return np.asarray(predict(inputs))
    m, parts = num_examples(inputs), []
    for start in range(0, m, _AT_ONCE):  # of one shape, so that any number is compiled once
      rows = np.minimum(np.arange(start, start + _AT_ONCE), m - 1)
      parts.append(np.asarray(predict(jax.tree.map(lambda leaf, rows=rows: leaf[rows], inputs))))
    return np.concatenate(parts)[:m]

  def adapt(
    inputs: Any, labels: ArrayLike, *, protocol: Protocol = "inductive", seed: int = 0
  ) -> Callable[[Any], Any]:
    if protocol not in protocols:
      raise ValueError(f"protocol must be 'inductive' or 'transductive', not {protocol!r}")
    inputs, given, labels = _fitting(recipe, inputs), labels, np.asarray(labels)
    if np.shape(labels)[:1] != (num_examples(inputs),):
      raise ValueError(
        f"there are {num_examples(inputs)} inputs, and labels of shape {labels.shape}: give one "
        "label for each input"
      )
    if recipe.loss["name"] == "squared_error":
      if not (labels.dtype.kind in "iub" or jnp.issubdtype(labels.dtype, jnp.floating)):
        raise ValueError(f"labels must be real numbers, not {labels.dtype}: convert them")
      if not np.all(np.isfinite(labels)):
        raise ValueError("labels must be finite: there are NaN or infinite ones, remove them")
      train = Examples(inputs, labels.astype(np.float32))
      adapted = adapted_to(train, seed)
      return lambda inputs: outputs(adapted, train, _fitting(recipe, inputs), protocol)
    classes, numbers = np.unique(few_shot.class_labels(given), return_inverse=True)
    ways = jax.eval_shape(model.apply, params, inputs).shape[-1]
    if labels.ndim != 1:
      raise ValueError(f"labels must be [n], one for each input, not {labels.shape}")
    if len(classes) < 2:
      raise ValueError("all labels are the same: give examples of two classes or more")
    if len(classes) > ways:
      raise ValueError(
        f"this learner tells at most {ways} classes apart, and there are {len(classes)}: leave "
        "some out, or train a learner with more ways"
      )
    train = Examples(inputs, numbers.astype(np.int32))
    adapted = adapted_to(train, seed)

    def predict(inputs: Any) -> Predictions:
      from scipy.special import softmax  # importing it takes a quarter of a second

      logits = outputs(adapted, train, _fitting(recipe, inputs), protocol)[:, : len(classes)]
      logits = logits.astype(np.float32)  # a network may compute in bfloat16
      probabilities = softmax(logits, axis=1)
      return Predictions(classes[probabilities.argmax(axis=1)], probabilities, classes)

    return predict

  return Learned(
    params, inner_state, recipe, model, adapt, partial(adapt_from, params, inner_state)
  )


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
  given = recipe.inner_optimizer if isinstance(recipe.inner_optimizer, dict) else {}
  name = given.get("name")
  arguments = {k: v for k, v in given.items() if k != "name"}
  if name not in _OPTIMIZERS:
    raise ValueError(
      f"inner_optimizer must be one of {', '.join(_OPTIMIZERS)}, as {{'name': 'sgd', "
      f"'learning_rate': 0.1}}, not {recipe.inner_optimizer!r}"
    )
  try:
    optimizer = getattr(optax, name)(**arguments)
  except TypeError as error:
    raise ValueError(f"optax.{name} cannot be made with {arguments}: {error}") from error
  if recipe.frozen:
    optimizer = only(optimizer, lambda name: not any(part in name for part in recipe.frozen))
  return carried(optimizer) if recipe.carried else optimizer


def _fitting(recipe: Recipe, inputs: Any) -> Any:
  """The inputs in the dtype of the network, if they are such as it was trained on."""
  inputs = _arrays(inputs)
  given = named(inputs)
  if set(given) != set(recipe.inputs):
    raise ValueError(
      f"inputs must be {_of_inputs(recipe)}, not {', '.join(map(repr, given)) or 'nothing'}"
    )
  for name, leaf in given.items():
    shape, dtype = tuple(recipe.inputs[name]["shape"]), np.dtype(recipe.inputs[name]["dtype"])
    if leaf.shape[1:] != shape or not leaf.ndim:
      raise ValueError(
        f"inputs must be [n, {', '.join(map(str, shape))}], not {leaf.shape}: this learner was "
        f"trained on {_of_inputs(recipe)}"
      )
    if not len(leaf):
      raise ValueError("there is no input: give at least one")
    given[name] = _in_dtype(leaf, dtype)
  return jax.tree.unflatten(jax.tree.structure(inputs), list(given.values()))


def _arrays(inputs: Any) -> Any:
  return jax.tree.map(np.asarray, inputs, is_leaf=lambda part: isinstance(part, list))


def _in_dtype(leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
  floats, of_floats = (jnp.issubdtype(kind, jnp.floating) for kind in (leaf.dtype, dtype))
  if dtype == np.uint8 and floats:
    if not np.all(np.isfinite(leaf)):
      raise ValueError("images must be finite: there are NaN or infinite entries, remove them")
    if leaf.size and not 0 <= leaf.min() <= leaf.max() <= 1:
      raise ValueError(
        f"images are from {leaf.min():g} to {leaf.max():g}: give uint8, or floats from 0 to 1"
      )
    return np.rint(255 * leaf).astype(np.uint8)  # of one dtype, whatever the others are given in
  converted = leaf.astype(dtype)
  one_bool = (leaf.dtype.kind == "b") != (dtype.kind == "b")
  if one_bool or floats != of_floats or (not floats and not np.array_equal(converted, leaf)):
    raise ValueError(f"inputs must be {dtype}, as this learner was trained on, not {leaf.dtype}")
  if of_floats and not np.all(np.isfinite(converted)):
    raise ValueError("inputs must be finite: there are NaN or infinite entries, remove them")
  return converted


def _of_inputs(recipe: Recipe) -> str:
  parts = [
    f"{name} {leaf['dtype']} [n, {', '.join(map(str, leaf['shape']))}]".strip()
    for name, leaf in recipe.inputs.items()
  ]
  return ", ".join(parts)
