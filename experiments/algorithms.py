"""The algorithms of few-shot runs by name: what each one learns, how it adapts and predicts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metajax
from experiments.recipes import Recipe
from metajax import variants
from metajax.types import LossFn, Predict, leaf_name

NORM = metajax.models.BatchStatsNorm.__name__  # in the names of its parameters
_EMBEDDING = 64  # outputs of the network of prototypical networks
_ITERATIONS = 5  # of conjugate gradients in implicit MAML, as in its paper
_CONTEXT = 100  # context parameters of CAVIA, as in its paper
_MODULATED = f"{NORM}_2"  # the layer whose outputs they scale and shift, as in its paper
_SHIPPED = ("reptile", "fomaml", "maml", "combine", "joint", "scratch", "anil", "boil",
  "multi_step", "annealed")  # fmt: skip


class Algorithm(NamedTuple):
  """An algorithm that is built for a recipe and a network.

  Attributes:
    model: what is learned, and the outputs of adapted parameters.
    gradient: the meta-gradient.
    early: that of the first `recipe.switch_at` meta-steps, if it is another one.
    protocols: how test examples are predicted, by name.
    frozen: parameters whose names contain one of these are not adapted; None if a learner file
      could not say how this algorithm adapts.
  """

  model: metajax.Model
  gradient: metajax.MetaGradient
  early: metajax.MetaGradient | None
  protocols: dict[str, Predict]
  frozen: tuple[str, ...] | None


def outputs(recipe: Recipe) -> int:
  """The number of outputs that the recipe's network has."""
  return _EMBEDDING if recipe.algorithm == "prototypical" else recipe.ways


def build(recipe: Recipe, network: metajax.Model) -> Algorithm:
  """Makes the algorithm of a recipe."""
  if recipe.algorithm == "prototypical":
    predict = variants.nearest_prototype(network.apply, recipe.ways)
    protocols = {"transductive": predict, "inductive": _one_at_a_time(predict)}
    gradient = variants.prototypical(network.apply, recipe.ways)
    return Algorithm(network, gradient, None, protocols, None)
  cavia = recipe.algorithm == "cavia"
  adapting = _with_context(network) if cavia else network  # what the loss is a function of
  model = with_rates(recipe.algorithm, adapting, recipe.inner_rate)
  fixed = () if recipe.adapt_norm else (NORM,)
  frozen = (*fixed, *not_adapted(recipe.algorithm, network))
  gradient, early = gradients(
    recipe.algorithm,
    metajax.losses.cross_entropy(adapting.apply, reduction=recipe.loss_reduction),
    _inner(recipe, frozen),
    recipe.inner_steps,
    weights=recipe.weights or (),
    strength=recipe.strength or 1.0,
    context=jnp.zeros(_CONTEXT),
  )
  protocols = {
    "transductive": metajax.transductive(model.apply),
    "inductive": metajax.inductive(model.apply),
  }
  shipped = frozen if recipe.algorithm in _SHIPPED else None
  return Algorithm(model, gradient, early, protocols, shipped)


def gradients(
  algorithm: str,
  loss: LossFn,
  inner: optax.GradientTransformation,
  num_losses: int,
  *,
  weights: Sequence[float] = (),
  strength: float = 1.0,
  context: Any = None,
) -> tuple[metajax.MetaGradient, metajax.MetaGradient | None]:
  """The meta-gradient of an algorithm, and that of its first meta-steps if it is another one.

  Args:
    algorithm: its name; any but `prototypical`.
    loss: a function of the network's parameters, for `cavia` of `WithContext`.
    inner: the inner optimizer, for `anil` and `boil` one that moves their part.
    num_losses: k.
    weights: of `combine`.
    strength: of `imaml`.
    context: of `cavia`.
  """
  maml = lambda: metajax.maml(loss, inner)
  makers: dict[str, Callable[[], metajax.MetaGradient]] = {
    "reptile": lambda: metajax.reptile(loss, inner),
    "joint": lambda: metajax.reptile(loss, inner),
    "scratch": lambda: metajax.combine(loss, inner, np.zeros(num_losses)),
    "combine": lambda: metajax.combine(loss, inner, weights, of_updates=True),
    "fomaml": lambda: metajax.fomaml(loss, inner),
    **dict.fromkeys(("maml", "anil", "boil", "annealed", "multi_step"), maml),
    "meta_sgd": lambda: variants.meta_sgd(loss),
    "layer_rates": lambda: variants.meta_sgd(loss),
    "imaml": lambda: variants.imaml(loss, inner, strength, iterations=_ITERATIONS),
    "cavia": lambda: variants.cavia(loss, inner, context),
  }
  early: dict[str, Callable[[], metajax.MetaGradient]] = {
    "annealed": lambda: metajax.fomaml(loss, inner),
    "multi_step": lambda: variants.multi_step(
      loss, inner, np.full(num_losses - 1, 1 / (num_losses - 1))
    ),
  }
  at_first = early[algorithm]() if algorithm in early else None
  return makers[algorithm](), at_first


def _inner(recipe: Recipe, frozen: tuple[str, ...]) -> optax.GradientTransformation:
  name, arguments = inner_optimizer(recipe)
  inner: optax.GradientTransformation = {"adam": optax.adam, "sgd": optax.sgd}[name](**arguments)
  inner = moving(inner, frozen)
  return metajax.carried(inner) if recipe.inner_state == "carried" else inner


def inner_optimizer(recipe: Recipe) -> tuple[str, dict[str, float]]:
  """The name of the inner optimizer in optax, and its arguments."""
  if recipe.inner_optimizer == "sgd":
    return "sgd", {"learning_rate": recipe.inner_rate}
  arguments = {"learning_rate": recipe.inner_rate, "b1": 0.0, "eps_root": recipe.inner_eps_root}
  return "adam", arguments


def not_adapted(algorithm: str, network: metajax.Model) -> tuple[str, ...]:
  """Parts of the names of parameters that the inner steps of ANIL or BOIL do not move."""
  if algorithm not in ("anil", "boil"):
    return ()
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  dense = {name.split("/")[0] for name in names if name.startswith("Dense_")}
  head = max(dense, key=lambda name: int(name.removeprefix("Dense_"))) + "/"
  return (head,) if algorithm == "boil" else tuple(n for n in names if not n.startswith(head))


def moving(
  inner: optax.GradientTransformation, frozen: tuple[str, ...]
) -> optax.GradientTransformation:
  """The inner optimizer, without the parameters whose names contain one of these."""
  if not frozen:
    return inner
  return variants.only(inner, lambda name: not any(part in name for part in frozen))


def with_rates(algorithm: str, network: metajax.Model, rate: float) -> metajax.Model:
  """The network, for Meta-SGD with learned rates: for each number, or for each parameter."""
  if algorithm not in ("meta_sgd", "layer_rates"):
    return network

  def init(key: jax.Array) -> variants.WithRates:
    params = network.init(key)
    if algorithm == "meta_sgd":
      return variants.with_rates(params, rate)
    return variants.WithRates(params, jax.tree.map(lambda leaf: jnp.full((), rate), params))

  return metajax.Model(init, lambda both, inputs: network.apply(both.params, inputs))


def _with_context(network: metajax.Model) -> metajax.Model:
  """The network with a context that scales and shifts the outputs of its third convolution.

  The factors and the shifts are linear functions of the context, as in Zintgraf et al. (2019). Here
  they change the scales and offsets of the batch normalization behind the convolution.
  """

  def init(key: jax.Array) -> Any:
    network_key, film_key = jax.random.split(key)
    params = network.init(network_key)
    channels = params[_MODULATED]["bias"].size
    film = 0.1 * jax.random.normal(film_key, (_CONTEXT, 2, channels))
    return {"network": params, "film": film}

  def apply(params: Any, inputs: jax.Array) -> jax.Array:
    if not isinstance(params, variants.WithContext):  # of a learner that has not adapted
      params = variants.WithContext(params, jnp.zeros(_CONTEXT))
    theta = params.params
    factor, shift = jnp.tensordot(params.context, theta["film"], 1)
    layer = theta["network"][_MODULATED]
    modulated = jax.tree.map(lambda leaf: leaf * (1 + factor), layer)
    modulated["bias"] += shift
    return network.apply({**theta["network"], _MODULATED: modulated}, inputs)

  return metajax.Model(init, apply)


def _one_at_a_time(predict: Predict) -> Predict:
  """The same prediction, for each test example without the others."""

  def each(params: Any, task: metajax.Task) -> Any:
    def one(example: metajax.Examples) -> Any:
      alone = jax.tree.map(lambda leaf: leaf[None], example)
      return jax.tree.map(lambda leaf: leaf[0], predict(params, task._replace(test=alone)))

    return jax.lax.map(one, task.test)

  return each
