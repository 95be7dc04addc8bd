"""From a few-shot recipe to the functions that run it."""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import metajax
from experiments import algorithms
from experiments.algorithms import Algorithm
from experiments.folders import Line, plain_warnings
from experiments.recipes import Recipe
from metajax.types import MakeEpisode, SampleTask

SPREAD = "sharded"  # the execution that uses all devices
_LOADING = threading.Lock()  # of runs side by side, one reads the data, and the others share it


class Evaluation(NamedTuple):
  """How a learner is judged on new tasks: the arguments of `metajax.judge` but for the mesh."""

  evaluate_task: Callable[..., Any]
  sample_task: SampleTask
  metric: Callable[..., Any]


class Experiment(NamedTuple):
  """A run that is built and checked; nothing is computed yet."""

  model: metajax.Model
  learner: metajax.MetaLearner
  frozen: tuple[str, ...] | None  # see Algorithm
  sample_task: SampleTask
  make_episode: MakeEpisode
  evaluations: dict[str, dict[str, Evaluation]]  # by split, such as "test", and "5-shot"
  mesh: jax.sharding.Mesh
  chunk: int | None  # tasks that run at once on a device, in training and in judging
  example_inputs: Any  # of the data set, [1, ...]


def load(recipe: Recipe) -> metajax.data.Splits:
  """Reads the data set."""
  seed = recipe.seed_of_data
  with _LOADING:
    if recipe.dataset == "folder":
      return _load_folder(
        recipe.data_dir,
        recipe.cache_dir,
        recipe.image_shape,
        recipe.min_examples or 1,
        recipe.unreadable or "refuse",
        seed,
      )
    pooled = recipe.dataset == "omniglot" and recipe.omniglot_protocol == "pooled"
    if recipe.dataset != "glyphs" and not pooled:
      seed = 0  # it determines nothing here, so that all seeds share what is read
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
  """All devices if tasks are spread over them or several processes share the run; else one.

  With the other executions, all devices do the same work.
  """
  one = recipe.execution != SPREAD and jax.process_count() == 1
  return metajax.task_mesh(jax.devices()[:1] if one else None)


def build(recipe: Recipe, splits: metajax.data.Splits, mesh: jax.sharding.Mesh) -> Experiment:
  """Makes the functions; the data must be on the mesh.

  Raises:
    ValueError: if the data set is too small for the tasks.
  """
  _check_sizes(recipe, splits)
  algorithm = algorithms.build(recipe, _model(recipe))
  learner = _learner(recipe, algorithm, mesh)
  sample_task = metajax.data.few_shot.sample_task(
    splits.train,
    ways=recipe.ways,
    train_shots=recipe.train_shots - recipe.held_back,
    test_shots=recipe.held_back,
  )
  evaluations = {
    split: {
      f"{shots}-shot": _evaluation(recipe, shots, batch, classes, algorithm, learner)
      for shots, batch in recipe.shots_and_batches
    }
    for split, classes in splits._asdict().items()
    if split in (*recipe.curve_splits, "test")
  }
  return Experiment(
    algorithm.model,
    learner,
    algorithm.frozen,
    sample_task,
    _make_episode(recipe),
    evaluations,
    mesh,
    recipe.chunk,
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
      problems.append(
        f"it has {len(classes.sizes)} {split} classes: lower --ways={recipe.ways}"
        + (", or divide them yourself into train/ and test/" if recipe.dataset == "folder" else "")
      )
    judged = split in (*recipe.curve_splits, "test")
    taken = [(recipe.train_shots, "--train_shots")] if split == "train" else []
    taken += [(evaluated, "--eval_shots or --eval_queries")] if judged else []
    smallest = int(np.argmin(classes.sizes))
    too_many = [(shots, flag) for shots, flag in taken if shots > classes.sizes[smallest]]
    if too_many:
      problems.append(
        f"a task takes {max(too_many)[0]} examples of each class, and {split} class "
        f"{classes.names[smallest]!r} has {classes.sizes[smallest]}: lower "
        + ", and ".join(flag for _, flag in too_many)
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
    outputs = algorithms.outputs(recipe)
    return of_size(size, outputs, channels=channels, method=recipe.convolution, **options)
  network: Callable[..., metajax.Model] = {
    ("paper", False): metajax.models.omniglot,
    ("paper", True): metajax.models.mini_imagenet,
    ("finn", False): metajax.models.finn_omniglot,
    ("finn", True): metajax.models.finn_mini_imagenet,
  }[recipe.network, recipe.dataset == "mini_imagenet"]
  return network(algorithms.outputs(recipe), method=recipe.convolution, **options)


def _learner(recipe: Recipe, algorithm: Algorithm, mesh: jax.sharding.Mesh) -> metajax.MetaLearner:
  outer, execution = _outer_optimizer(recipe), _execution(recipe, mesh)
  learner = metajax.meta_learner(algorithm.gradient, outer, execution)
  if algorithm.early is None:
    return learner
  at_first = metajax.meta_learner(algorithm.early, outer, execution)
  return metajax.variants.switched(at_first, learner, recipe.switch_at)


def _make_episode(recipe: Recipe) -> MakeEpisode:
  """How the minibatches of a training task are drawn."""
  steps, batch = (1 if recipe.algorithm == "joint" else recipe.inner_steps), recipe.inner_batch
  draw = {"cycling": metajax.cycling, "replacement": metajax.replacement}[recipe.minibatches]
  schedule = draw(steps, batch)
  if recipe.least_shots is not None:
    schedule = metajax.varying_shots(steps, batch, ways=recipe.ways, at_least=recipe.least_shots)
  tail = {"shared": metajax.shared_tail, "separate": metajax.separate_tail}[recipe.tail]
  if recipe.least_steps is not None:
    return metajax.varying_steps(tail(schedule), at_least=recipe.least_steps)
  return tail(schedule)


def ship(
  recipe: Recipe, experiment: Experiment, state: metajax.MetaState, path: Path, about: Line
) -> None:
  """Writes the learner file of a trained state, of algorithms that adapt as such a file can say.

  The file adapts as the run was judged with the most shots, and holds the accuracy with these.
  """
  if experiment.frozen is None:
    return
  name, arguments = algorithms.inner_optimizer(recipe)
  shots, batch = max(recipe.shots_and_batches)
  if "accuracy" in about:
    cells = about["accuracy"].items()
    of_shots = {name: cell for name, cell in cells if name.startswith(f"{shots}-shot ")}
    about = {**about, "accuracy": of_shots}
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
    frozen=experiment.frozen,
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
  first, last = recipe.outer_rate, recipe.outer_rate_final
  rate = optax.linear_schedule(first, last, recipe.meta_steps)
  if recipe.outer_schedule == "cosine":
    rate = optax.cosine_decay_schedule(first, recipe.meta_steps, alpha=last / first)
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
  algorithm: Algorithm,
  learner: metajax.MetaLearner,
) -> Evaluation:
  """Accuracy on tasks of these classes by both protocols, after one adaptation."""
  predict_all = lambda params, task: {
    name: predict(params, task) for name, predict in algorithm.protocols.items()
  }
  schedule = metajax.cycling(recipe.eval_steps, batch)
  evaluate_task = metajax.evaluate(learner, schedule, predict_all)
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=recipe.ways, train_shots=shots, test_shots=recipe.eval_queries
  )
  return Evaluation(evaluate_task, sample_task, accuracies)


def accuracies(outputs: dict[str, jax.Array], targets: jax.Array) -> dict[str, jax.Array]:
  """The accuracy of each protocol on one task."""
  return {name: metajax.losses.accuracy(output, targets) for name, output in outputs.items()}
