"""From a few-shot recipe to the functions that run it."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import metajax
from experiments.folders import Line, plain_warnings
from experiments.recipes import Recipe
from metajax.types import MakeEpisode, SampleTask

SPREAD = "sharded"  # the execution that uses all devices
NORM = metajax.models.BatchStatsNorm.__name__  # in the names of its parameters


class Evaluation(NamedTuple):
  """How a learner is judged on new tasks: the arguments of `metajax.judge` but for the mesh."""

  evaluate_task: Callable[..., Any]
  sample_task: SampleTask
  metric: Callable[..., Any]


class Experiment(NamedTuple):
  """A run that is built and checked; nothing is computed yet."""

  model: metajax.Model
  learner: metajax.MetaLearner
  sample_task: SampleTask
  make_episode: MakeEpisode
  evaluations: dict[str, dict[str, Evaluation]]  # by split, such as "test", and "5-shot"
  mesh: jax.sharding.Mesh
  example_inputs: Any  # of the data set, [1, ...]


def load(recipe: Recipe) -> metajax.data.Splits:
  """Reads the data set."""
  seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
  if recipe.dataset == "folder":
    return _load_folder(
      recipe.data_dir,
      recipe.cache_dir,
      recipe.image_shape,
      recipe.min_examples or 1,
      recipe.unreadable or "refuse",
      seed,
    )
  return _load(recipe.dataset, recipe.data_dir, recipe.cache_dir, recipe.omniglot_protocol, seed)


@lru_cache(maxsize=2)  # for many runs in one process
def _load(
  dataset: str, data_dir: str | None, cache_dir: str | None, protocol: Any, seed: int
) -> metajax.data.Splits:
  if dataset == "glyphs":
    return metajax.data.glyphs.load(seed)
  if dataset in ("cifar_fs", "fc100"):
    if data_dir is None:
      raise ValueError(f"--dataset={dataset} needs --data_dir, with cifar-100-binary.tar.gz")
    return {"cifar_fs": metajax.data.cifar_fs, "fc100": metajax.data.fc100}[dataset](data_dir)
  if dataset == "mini_imagenet":
    return metajax.data.mini_imagenet.load(data_dir, cache_dir=cache_dir)
  return metajax.data.omniglot.load(data_dir, protocol=protocol, seed=seed, cache_dir=cache_dir)


@lru_cache(maxsize=2)
def _load_folder(
  data_dir: str | None,
  cache_dir: str | None,
  shape: tuple[int, int, int],
  min_examples: int,
  unreadable: Any,
  seed: int,
) -> metajax.data.Splits:
  if data_dir is None:
    raise ValueError("--dataset=folder needs --data_dir, a folder of images for each class")
  with plain_warnings():
    return metajax.data.from_folder(
      data_dir,
      size=shape[:2],
      mode="L" if shape[2] == 1 else "RGB",
      min_examples=min_examples,
      unreadable=unreadable,
      seed=seed,
      cache_dir=cache_dir,
    )


def mesh_of(recipe: Recipe) -> jax.sharding.Mesh:
  """All devices if tasks are spread over them; else one, since all would do the same work."""
  one = recipe.execution != SPREAD and jax.process_count() == 1
  return metajax.task_mesh(jax.devices()[:1] if one else None)


def build(recipe: Recipe, splits: metajax.data.Splits, mesh: jax.sharding.Mesh) -> Experiment:
  """Makes the functions; the data must be on the mesh.

  Raises:
    ValueError: if the data set is too small for the tasks.
  """
  _check_sizes(recipe, splits)
  model = _model(recipe)
  learner = metajax.meta_learner(
    _meta_gradient(recipe, model), _outer_optimizer(recipe), _execution(recipe, mesh)
  )
  steps = 1 if recipe.algorithm == "joint" else recipe.inner_steps
  draw = {"cycling": metajax.cycling, "replacement": metajax.replacement}[recipe.minibatches]
  tail = {"shared": metajax.shared_tail, "separate": metajax.separate_tail}[recipe.tail]
  sample_task = metajax.data.few_shot.sample_task(
    splits.train,
    ways=recipe.ways,
    train_shots=recipe.train_shots - recipe.held_back,
    test_shots=recipe.held_back,
  )
  evaluations = {
    split: {
      f"{shots}-shot": _evaluation(recipe, shots, batch, classes, model, learner)
      for shots, batch in recipe.shots_and_batches
    }
    for split, classes in splits._asdict().items()
    if split in (*recipe.curve_splits, "test")
  }
  return Experiment(
    model,
    learner,
    sample_task,
    tail(draw(steps, recipe.inner_batch)),
    evaluations,
    mesh,
    np.asarray(splits.test.inputs[:1]),
  )


def _check_sizes(recipe: Recipe, splits: metajax.data.Splits) -> None:
  """Raises everything for which there are too few classes or examples, in one message."""
  evaluated = max(recipe.eval_shots) + recipe.eval_queries
  problems = []
  for split, classes in splits._asdict().items():
    if split not in ("train", *recipe.curve_splits, "test"):
      continue
    if classes is None:
      problems.append(f"it has no {split} classes: take them out of --curve_splits")
      continue
    if len(classes.sizes) < recipe.ways:
      problems.append(f"it has {len(classes.sizes)} {split} classes: lower --ways={recipe.ways}")
    judged = split in (*recipe.curve_splits, "test")
    flags = [(evaluated, "--eval_shots or --eval_queries")] if judged else []
    flags += [(recipe.train_shots, "--train_shots")] if split == "train" else []
    shots, flag = max(flags)
    smallest = int(np.argmin(classes.sizes))
    if classes.sizes[smallest] < shots:
      problems.append(
        f"a task takes {shots} examples of each class, and {split} class "
        f"{classes.names[smallest]!r} has {classes.sizes[smallest]}: lower {flag}"
        + (", or raise --min_examples" if recipe.dataset == "folder" else "")
      )
  if problems:
    raise ValueError(f"{recipe.data_name} is too small: {'; '.join(problems)}")


def _model(recipe: Recipe) -> metajax.Model:
  options: dict[str, Any] = {} if recipe.filters is None else {"filters": recipe.filters}
  *size, channels = recipe.image_shape
  if recipe.network in ("conv4", "resnet12"):
    of_size: Callable[..., metajax.Model] = (
      metajax.models.conv4 if recipe.network == "conv4" else metajax.models.resnet12
    )
    return of_size(size, recipe.ways, channels=channels, method=recipe.convolution, **options)
  network: Callable[..., metajax.Model] = {
    ("paper", False): metajax.models.omniglot,
    ("paper", True): metajax.models.mini_imagenet,
    ("finn", False): metajax.models.finn_omniglot,
    ("finn", True): metajax.models.finn_mini_imagenet,
  }[recipe.network, recipe.dataset == "mini_imagenet"]
  return network(recipe.ways, method=recipe.convolution, **options)


def _meta_gradient(recipe: Recipe, model: metajax.Model) -> metajax.MetaGradient:
  loss = metajax.losses.cross_entropy(model.apply, reduction=recipe.loss_reduction)
  name, arguments = inner_optimizer(recipe)
  inner = {"adam": optax.adam, "sgd": optax.sgd}[name](**arguments)
  if not recipe.adapt_norm:
    inner = metajax.variants.only(inner, lambda name: NORM not in name)
  if recipe.inner_state == "carried":
    inner = metajax.carried(inner)
  if recipe.weights is not None:
    return metajax.combine(loss, inner, recipe.weights, of_updates=True)
  estimators: dict[str, Callable[..., metajax.MetaGradient]] = {
    "reptile": metajax.reptile,
    "joint": metajax.reptile,
    "fomaml": metajax.fomaml,
    "maml": metajax.maml,
  }
  return estimators[recipe.algorithm](loss, inner)


def inner_optimizer(recipe: Recipe) -> tuple[str, dict[str, float]]:
  """The name of the inner optimizer in optax, and its arguments."""
  if recipe.inner_optimizer == "sgd":
    return "sgd", {"learning_rate": recipe.inner_rate}
  arguments = {"learning_rate": recipe.inner_rate, "b1": 0.0, "eps_root": recipe.inner_eps_root}
  return "adam", arguments


def ship(
  recipe: Recipe, experiment: Experiment, state: metajax.MetaState, path: Path, about: Line
) -> None:
  """Writes the learner file of a trained state."""
  name, arguments = inner_optimizer(recipe)
  _, batch = max(recipe.shots_and_batches)
  metajax.save(
    path,
    experiment.learner,
    state,
    experiment.model,
    example_inputs=experiment.example_inputs,
    inner_optimizer={"name": name, **arguments},
    steps=recipe.eval_steps,
    batch_size=batch,
    loss={"name": "cross_entropy", "reduction": recipe.loss_reduction},
    frozen=() if recipe.adapt_norm else (NORM,),
    about={
      "data": recipe.data_name,
      "ways": recipe.ways,
      "algorithm": recipe.algorithm,
      "meta_steps": int(state.step),
      "seed": recipe.seed,
      **about,
    },
  )


def _outer_optimizer(recipe: Recipe) -> optax.GradientTransformation:
  rate = optax.linear_schedule(recipe.outer_rate, recipe.outer_rate_final, recipe.meta_steps)
  outer = {"sgd": optax.sgd, "adam": optax.adam}[recipe.outer_optimizer](rate)
  if recipe.outer_clip is None:
    return outer
  return optax.chain(optax.clip(recipe.outer_clip), outer)


def _execution(recipe: Recipe, mesh: jax.sharding.Mesh) -> metajax.Execution:
  if recipe.execution == "serial":
    return metajax.serial(recipe.meta_batch)
  if recipe.execution == SPREAD:
    return metajax.sharded(recipe.meta_batch, mesh, chunk=recipe.chunk)
  chunk = (recipe.chunk or 1) if recipe.execution == "chunked" else None
  return metajax.vmapped(recipe.meta_batch, chunk=chunk)


def _evaluation(
  recipe: Recipe,
  shots: int,
  batch: int,
  classes: metajax.data.Classes,
  model: metajax.Model,
  learner: metajax.MetaLearner,
) -> Evaluation:
  """Accuracy on tasks of these classes by both protocols, after one adaptation."""
  protocols = {
    "transductive": metajax.transductive(model.apply),
    "inductive": metajax.inductive(model.apply),
  }
  evaluate_task = metajax.evaluate(
    learner,
    metajax.cycling(recipe.eval_steps, batch),
    lambda params, task: {name: predict(params, task) for name, predict in protocols.items()},
  )
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=recipe.ways, train_shots=shots, test_shots=recipe.eval_queries
  )
  return Evaluation(evaluate_task, sample_task, accuracies)


def accuracies(outputs: dict[str, jax.Array], targets: jax.Array) -> dict[str, jax.Array]:
  """The accuracy of each protocol on one task."""
  return {name: metajax.losses.accuracy(output, targets) for name, output in outputs.items()}
