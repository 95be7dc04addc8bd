"""Few-shot classification (Section 6.1): meta-train one algorithm on one data set, and report.

  python -m experiments.few_shot
  python -m experiments.few_shot --flagfile=experiments/flags/omniglot_5shot_5way_reptile.flags

The run folder (--out) gets flags.txt, metrics.jsonl, result.json, learning_curve.png and
checkpoints; the same command with the same --out goes on where it stopped.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import metajax
from experiments import common

_GLYPHS, _OMNIGLOT, _MINI_IMAGENET = "glyphs", "omniglot", "mini_imagenet"

# fmt: off
_FLAGS = (
  flags.DEFINE_enum("dataset", _GLYPHS, [_GLYPHS, _OMNIGLOT, _MINI_IMAGENET],
    "Where tasks come from; glyphs needs no data."),
  flags.DEFINE_string("data_dir", None,
    "Folder with the data set's archives; Omniglot is downloaded without it."),
  flags.DEFINE_string("cache_dir", None,
    "Where prepared data is kept; by default $METAJAX_CACHE or ~/.cache/metajax."),
  flags.DEFINE_enum("omniglot_protocol", "pooled", ["pooled", "alphabets"],
    "The paper's random 1200 / 423 characters, or the background / evaluation alphabets."),
  flags.DEFINE_enum("algorithm", "reptile", ["reptile", "fomaml", "maml", "joint"],
    "joint is the baseline: Reptile with one inner step (for SGD, joint training on all tasks)."),
  flags.DEFINE_integer("ways", 5, "Classes of a task."),
  flags.DEFINE_integer("shots", 5, "Examples of each class to adapt on when judged."),
  flags.DEFINE_integer("train_shots", 10,
    "Examples of each class in a training task, those of the tail included."),
  flags.DEFINE_enum("tail", "shared", ["shared", "separate"],
    "Whether the last minibatch is drawn like the others, or is --tail_shots held back."),
  flags.DEFINE_integer("tail_shots", 1, "Examples of each class held back for a separate tail."),
  flags.DEFINE_enum("minibatches", "cycling", ["cycling", "replacement"],
    "How training minibatches are drawn."),
  flags.DEFINE_enum("inner_optimizer", "adam", ["adam", "sgd"],
    "Adam has beta1 = 0, beta2 = 0.999."),
  flags.DEFINE_float("inner_rate", 1e-3, "Inner learning rate alpha."),
  flags.DEFINE_float("inner_eps_root", 0.0,
    "Adam's eps_root; MAML through Adam needs one above 0."),
  flags.DEFINE_enum("inner_state", "carried", ["carried", "fresh"],
    "Whether the inner optimizer's state is carried from task to task."),
  flags.DEFINE_integer("inner_batch", 10, "Examples of an inner minibatch."),
  flags.DEFINE_integer("inner_steps", 5,
    "k, the minibatches of a training task, the tail included."),
  flags.DEFINE_enum("loss_reduction", "sum", ["sum", "mean"], "Over a minibatch's examples."),
  flags.DEFINE_enum("outer_optimizer", "sgd", ["sgd", "adam"],
    "Fed with phi - U^k(phi) for reptile and joint, else with the gradient of the last loss."),
  flags.DEFINE_float("outer_rate", 1.0, "Outer learning rate at the start."),
  flags.DEFINE_float("outer_rate_final", 0.0, "Outer learning rate to which it falls, linearly."),
  flags.DEFINE_float("outer_clip", None,
    "Clip every entry of the outer gradient to [-outer_clip, outer_clip]."),
  flags.DEFINE_integer("meta_batch", 5, "T, the tasks of a meta-step."),
  flags.DEFINE_integer("steps_per_call", 25,
    "Meta-steps in one call of the compiled loop: between two updates of the progress bar."),
  flags.DEFINE_enum("execution", "sharded", ["sharded", "vmap", "serial", "chunked"],
    "A meta-batch spread over all devices, or on one: at once, one task after another with one "
    "inner state, or --chunk at a time."),
  flags.DEFINE_integer("chunk", None,
    "Tasks at once, with sharded on each device; by default one on CPU."),
  flags.DEFINE_integer("filters", None, "Of every convolution; by default the paper's."),
  flags.DEFINE_enum("head", "flatten", ["flatten", "mean"],
    "What the last layer sees: all positions, or their mean as in Finn et al.'s network."),
  flags.DEFINE_enum("convolution", None, ["patches", "xla"],
    "How to convolve; by default whichever is faster on this backend."),
  flags.DEFINE_integer("eval_batch", 5, "Examples of a minibatch when judged."),
  flags.DEFINE_integer("eval_steps", 50, "Inner steps when judged."),
  flags.DEFINE_integer("eval_queries", 1, "Test examples of each class when judged."),
  flags.DEFINE_integer("eval_every", 200,
    "Meta-steps between points of the learning curve; the state is saved at each."),
  flags.DEFINE_integer("curve_tasks", 50, "Train and test tasks of each point."),
)
# fmt: on
_DEFAULTS = {"meta_steps": 600, "eval_tasks": 300}

_AT_LEAST_ONE = (
  "shots",
  "train_shots",
  "inner_batch",
  "inner_steps",
  "meta_batch",
  "eval_batch",
  "eval_steps",
  "eval_queries",
  "eval_every",
  "steps_per_call",
  "tail_shots",
)


class Experiment(NamedTuple):
  """A run, built and checked, nothing computed yet."""

  model: metajax.Model
  learner: metajax.MetaLearner
  sample_episodes: Callable[[jax.Array], metajax.Episode]
  inner_state: Callable[[metajax.MetaState], Any]  # what an evaluation starts from
  judges: dict[str, common.Judge]  # by split, "train" and "test"


def _held_back(settings: SimpleNamespace) -> int:
  """Examples of each class that only the tail sees."""
  return settings.tail_shots if settings.tail == "separate" else 0


def check(settings: SimpleNamespace) -> None:
  """Refuses flags that are out of range or contradict each other, in one line."""
  common.check_numbers(settings, *_AT_LEAST_ONE)
  for name in ("curve_tasks", "ways"):
    if getattr(settings, name) < 2:
      raise ValueError(f"--{name}={getattr(settings, name)} must be at least 2")
  for name in ("inner_rate", "outer_rate", "outer_clip"):
    value = getattr(settings, name)
    if value is not None and not 0 < value < float("inf"):
      raise ValueError(f"--{name}={value} must be positive and finite")
  for name in ("outer_rate_final", "inner_eps_root"):
    if not 0 <= getattr(settings, name) < float("inf"):
      raise ValueError(f"--{name}={getattr(settings, name)} must not be negative, and finite")
  held_back = _held_back(settings)
  if held_back >= settings.train_shots:
    raise ValueError(
      f"--tail_shots={held_back} leaves none of --train_shots={settings.train_shots} to adapt on: "
      "raise --train_shots"
    )
  if settings.tail == "separate" and (settings.inner_steps < 2 or settings.algorithm == "joint"):
    raise ValueError(
      "--tail=separate takes the last of --inner_steps minibatches, and there is only one: "
      "use --inner_steps=2 or more, or --tail=shared"
    )
  examples = settings.ways * (settings.train_shots - held_back)
  if settings.minibatches == "replacement" and settings.inner_batch > examples:
    raise ValueError(
      f"--inner_batch={settings.inner_batch} cannot be drawn without duplicates from {examples} "
      "training examples: lower it, or use --minibatches=cycling"
    )
  through_adam = settings.algorithm == "maml" and settings.inner_optimizer == "adam"
  if through_adam and settings.inner_eps_root == 0:
    raise ValueError(
      "--algorithm=maml through --inner_optimizer=adam gives NaN where a gradient is 0: "
      "set --inner_eps_root, say to 1e-8, or use --inner_optimizer=sgd"
    )
  if settings.chunk is not None and not 1 <= settings.chunk <= settings.meta_batch:
    raise ValueError(
      f"--chunk={settings.chunk} must be from 1 to --meta_batch={settings.meta_batch}"
    )


def load(settings: SimpleNamespace) -> metajax.data.Splits:
  """The data set."""
  if settings.dataset == _GLYPHS:
    return metajax.data.glyphs.load(settings.seed)
  if settings.dataset == _MINI_IMAGENET:
    return metajax.data.mini_imagenet.load(settings.data_dir, cache_dir=settings.cache_dir)
  return metajax.data.omniglot.load(
    settings.data_dir,
    protocol=settings.omniglot_protocol,
    seed=settings.seed,
    cache_dir=settings.cache_dir,
  )


def build(settings: SimpleNamespace, splits: metajax.data.Splits) -> Experiment:
  """From flags to functions."""
  network = (
    metajax.models.mini_imagenet if settings.dataset == _MINI_IMAGENET else metajax.models.omniglot
  )
  options = {} if settings.filters is None else {"filters": settings.filters}
  model = network(settings.ways, head=settings.head, method=settings.convolution, **options)
  loss = metajax.losses.cross_entropy(model.apply, reduction=settings.loss_reduction)
  if settings.inner_optimizer == "adam":
    inner = optax.adam(settings.inner_rate, b1=0.0, eps_root=settings.inner_eps_root)
  else:
    inner = optax.sgd(settings.inner_rate)

  estimators = {
    "reptile": metajax.reptile,
    "joint": metajax.reptile,
    "fomaml": metajax.fomaml,
    "maml": metajax.maml,
  }
  gradient = estimators[settings.algorithm](loss, inner)
  inner_state: Callable[[metajax.MetaState], Any]
  if settings.inner_state == "fresh":
    gradient = metajax.stateless(gradient)
  if settings.execution == "serial":
    gradient = metajax.serial(gradient)
    inner_state = lambda state: state.inner
  elif settings.execution == "sharded":
    gradient = metajax.sharded(gradient, settings.meta_batch, chunk=settings.chunk)
    inner_state = lambda state: metajax.first_slot(state.inner)
  else:
    chunk = (settings.chunk or 1) if settings.execution == "chunked" else None
    gradient = metajax.batched(gradient, settings.meta_batch, chunk=chunk)
    inner_state = lambda state: metajax.first_slot(state.inner)
  if settings.inner_state == "fresh":
    inner_state = lambda state: None

  rate = optax.linear_schedule(settings.outer_rate, settings.outer_rate_final, settings.meta_steps)
  outer = {"sgd": optax.sgd, "adam": optax.adam}[settings.outer_optimizer](rate)
  if settings.outer_clip is not None:
    outer = optax.chain(optax.clip(settings.outer_clip), outer)

  steps = 1 if settings.algorithm == "joint" else settings.inner_steps
  draw = {"cycling": metajax.cycling, "replacement": metajax.replacement}[settings.minibatches]
  tail = {"shared": metajax.shared_tail, "separate": metajax.separate_tail}[settings.tail]
  held_back = _held_back(settings)
  sample_task = metajax.data.few_shot.sample_task(
    splits.train,
    ways=settings.ways,
    train_shots=settings.train_shots - held_back,
    test_shots=held_back,
  )
  make_episode = tail(draw(steps, settings.inner_batch))
  return Experiment(
    model,
    metajax.meta_learner(gradient, outer),
    metajax.sample_episodes(sample_task, make_episode, settings.meta_batch),
    inner_state,
    {
      split: _judge(settings, classes, model, loss, inner)
      for split, classes in (("train", splits.train), ("test", splits.test))
    },
  )


def _judge(
  settings: SimpleNamespace,
  classes: metajax.data.Classes,
  model: metajax.Model,
  loss: Any,
  inner: optax.GradientTransformation,
) -> common.Judge:
  """Accuracy on tasks of these classes by both protocols, after one adaptation."""
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=settings.ways, train_shots=settings.shots, test_shots=settings.eval_queries
  )
  protocols = {
    "transductive": metajax.transductive(model.apply),
    "inductive": metajax.inductive(model.apply),
  }
  adapt_and_predict = metajax.evaluate(
    loss,
    inner,
    metajax.cycling(settings.eval_steps, settings.eval_batch),
    lambda params, task: {name: predict(params, task) for name, predict in protocols.items()},
  )

  def draw(key: jax.Array, index: jax.Array) -> tuple[jax.Array, metajax.Task]:
    task_key, batch_key = jax.random.split(jax.random.fold_in(key, index))
    return batch_key, sample_task(task_key)

  def one(shared: Any, drawn: tuple[jax.Array, metajax.Task]) -> dict[str, jax.Array]:
    (params, inner_state), (batch_key, task) = shared, drawn
    outputs = adapt_and_predict(params, inner_state, batch_key, task)
    return {
      name: metajax.losses.accuracy(output, task.test.targets) for name, output in outputs.items()
    }

  def judge(
    params: Any, inner_state: Any, key: jax.Array, first: jax.Array
  ) -> dict[str, jax.Array]:
    indices = first + jnp.arange(common.TASKS_PER_CALL)
    tasks = jax.vmap(draw, in_axes=(None, 0))(key, indices)
    return metajax.map_tasks(one)((params, inner_state), tasks)

  return jax.jit(judge)


def prepare(settings: SimpleNamespace) -> tuple[Experiment, common.RunFolder]:
  """Checks the flags, reads the data, builds the experiment and opens its folder.

  Raises:
    ValueError: if a flag or the data is no good; nothing has been written over then.
  """
  check(settings)
  folder = common.open_folder(f"few_shot-{settings.dataset}", settings)
  splits = common.on_all_devices(load(settings))
  experiment = build(settings, splits)
  folder.begin(common.describe(splits))
  return experiment, folder


def run(
  settings: SimpleNamespace, experiment: Experiment, folder: common.RunFolder
) -> dict[str, Any]:
  """Trains, judges and reports; returns what it writes to result.json."""
  init_key, train_key, curve_key, test_key = jax.random.split(jax.random.key(settings.seed), 4)
  state = experiment.learner.init(jax.jit(experiment.model.init)(init_key))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

  def judge(state: metajax.MetaState, key: jax.Array, split: str, num_tasks: int) -> dict[str, Any]:
    inner_state = experiment.inner_state(state)
    judge = experiment.judges[split]
    values = common.accuracies(judge, state.params, inner_state, key, num_tasks, f"{split} tasks")
    return common.with_interval(values)

  state, seconds = common.train(
    experiment.learner,
    experiment.sample_episodes,
    state,
    train_key,
    meta_steps=settings.meta_steps,
    eval_every=settings.eval_every,
    steps_per_call=settings.steps_per_call,
    evaluate=lambda state: {
      split: judge(state, curve_key, split, settings.curve_tasks) for split in experiment.judges
    },
    folder=folder,
  )
  cells = judge(state, test_key, "test", settings.eval_tasks)
  result: dict[str, Any] = {
    name: {**cell, "tasks": settings.eval_tasks} for name, cell in cells.items()
  }
  result |= {
    "meta_steps": settings.meta_steps,
    "train_seconds": round(seconds, 3),
    "meta_steps_per_second": round(settings.meta_steps / seconds, 3),
    "parameters": parameters,
    "versions": common.versions(),
  }
  folder.finish(result)
  print(
    f"{settings.dataset}, {settings.ways}-way {settings.shots}-shot, {settings.algorithm}: "
    f"accuracy over {settings.eval_tasks} test tasks, with its 95 % interval"
  )
  for name, cell in cells.items():
    print(f"  {name:13s} {common.percent(cell)}")
  print(f"  {settings.meta_steps} meta-steps in {seconds:.1f} s; the run is in {folder.path}")
  return result


def defaults(**changes: Any) -> SimpleNamespace:
  """The flags' default values, but for `changes`: to prepare and run from Python."""
  return common.defaults(_FLAGS, **{**_DEFAULTS, **changes})


def main(argv: list[str]) -> None:
  common.main("few_shot", argv, _FLAGS, _DEFAULTS, prepare, run)


if __name__ == "__main__":
  app.run(main)
