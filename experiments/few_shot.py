"""Few-shot classification (Section 6.1): meta-train one algorithm on one data set, and report.

  python -m experiments.few_shot
  python -m experiments.few_shot --flagfile=experiments/flags/omniglot_5way_reptile.flags

The run folder (--out) gets flags.txt, metrics.jsonl, test_tasks.jsonl, result.json,
learning_curve.png and checkpoints; the same command with the same --out goes on where it stopped.
With --seeds each run has a folder of its own inside.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

import metajax
from experiments import common, folders, reports, training

TASKS_PER_CALL = 25  # of a judge: one program, whatever the number of tasks
_FINN = 600  # tasks of a test in Finn et al. (2017), reported besides if there are more

# (state, key, first) -> {protocol: accuracies [TASKS_PER_CALL]}, of the tasks from `first` on
Judge = Callable[..., dict[str, jax.Array]]

_GLYPHS, _OMNIGLOT, _MINI_IMAGENET = "glyphs", "omniglot", "mini_imagenet"

# fmt: off
FLAGS = (
  flags.DEFINE_enum("dataset", _GLYPHS, [_GLYPHS, _OMNIGLOT, _MINI_IMAGENET],
    "Where tasks come from; glyphs needs no data."),
  flags.DEFINE_string("data_dir", None,
    "Folder with the data set's archives; Omniglot is downloaded without it."),
  flags.DEFINE_string("cache_dir", None,
    "Where prepared data is kept; by default $METAJAX_CACHE or ~/.cache/metajax."),
  flags.DEFINE_enum("omniglot_protocol", "pooled", ["pooled", "alphabets"],
    "The paper's random 1200 / 423 characters, or the background / evaluation alphabets."),
  flags.DEFINE_enum("algorithm", "reptile", ["reptile", "fomaml", "maml", "combine", "joint"],
    "combine sums --weights of the inner optimizer's updates; joint is the baseline: Reptile with "
    "one inner step (for SGD, joint training on all tasks)."),
  flags.DEFINE_list("weights", None, "Of combine: --inner_steps numbers."),
  flags.DEFINE_integer("ways", 5, "Classes of a task."),
  flags.DEFINE_list("eval_shots", ["5"],
    "Examples of each class to adapt on when judged; several numbers are judged one by one."),
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
    "Fed with phi - U^k(phi) for reptile and joint, for fomaml and maml with the gradient of the "
    "last loss, for combine with the weighted sum."),
  flags.DEFINE_float("outer_rate", 1.0, "Outer learning rate at the start."),
  flags.DEFINE_float("outer_rate_final", 0.0, "Outer learning rate to which it falls, linearly."),
  flags.DEFINE_float("outer_clip", None,
    "Clip every entry of the outer gradient to [-outer_clip, outer_clip]."),
  flags.DEFINE_integer("meta_batch", 5, "T, the tasks of a meta-step."),
  flags.DEFINE_integer("steps_per_call", 25,
    "Meta-steps in one call of the compiled loop: between two updates of the progress bar."),
  flags.DEFINE_enum("execution", "sharded",
    ["sharded", "vmap", "serial", "chunked"],
    "How the tasks of a meta-batch run: spread over all devices, or on one device all at once, one "
    "after another or --chunk at a time. A carried inner state is one for all tasks with serial, "
    "and one for each task of the meta-batch otherwise."),
  flags.DEFINE_integer("chunk", None,
    "Tasks at once, with sharded on each device; by default one on CPU."),
  flags.DEFINE_integer("filters", None, "Of every convolution; by default the paper's."),
  flags.DEFINE_enum("network", "paper", ["paper", "finn"],
    "The paper's for the data set, or that of Finn et al. (2017)."),
  flags.DEFINE_bool("adapt_norm", True,
    "Whether inner steps move batch normalization's scales and offsets; Finn et al.'s do not. "
    "Reptile never learns what they do not move."),
  flags.DEFINE_enum("convolution", None, ["patches", "xla"],
    "How to convolve; by default whichever is faster on this backend."),
  flags.DEFINE_list("eval_batch", ["5"],
    "Examples of a minibatch when judged; one number, or one for each of --eval_shots."),
  flags.DEFINE_integer("eval_steps", 50, "Inner steps when judged."),
  flags.DEFINE_integer("eval_queries", 1, "Test examples of each class when judged."),
  flags.DEFINE_integer("eval_every", 200,
    "Meta-steps between points of the learning curve; the state is saved at each."),
  flags.DEFINE_integer("curve_tasks", 50, "Tasks of each split at each point."),
  flags.DEFINE_list("curve_splits", ["train", "test"], "Which tasks the learning curve is of."),
)
# fmt: on
_DEFAULTS = {"meta_steps": 600, "eval_tasks": 300}

# Plain SGD inside and out, a task at a time: the setting of Figures 3 and 4.
PLAIN_SGD: dict[str, Any] = {
  "dataset": _OMNIGLOT,
  "algorithm": "combine",
  "inner_optimizer": "sgd",
  "inner_rate": 0.003,
  "inner_steps": None,  # by the curve
  "outer_rate": 0.25,
  "meta_batch": 1,
  "meta_steps": 40_000,
  "execution": "serial",
  "steps_per_call": 50,
  "eval_batch": ["25"],
  "eval_steps": 5,
  "eval_tasks": 1_000,
  "curve_splits": ["test"],
}

_TEST_TASKS = "test_tasks.jsonl"
_SPREAD = "sharded"  # the execution that uses all devices

_AT_LEAST_ONE = (
  "train_shots",
  "inner_batch",
  "inner_steps",
  "meta_batch",
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
  sample_task: training.SampleTask
  make_episode: training.MakeEpisode
  judges: dict[str, dict[str, Judge]]  # by split, "train" and "test", and shots, as "5-shot"
  mesh: jax.sharding.Mesh


def _held_back(settings: SimpleNamespace) -> int:
  """Examples of each class that only the tail sees."""
  return settings.tail_shots if settings.tail == "separate" else 0


def _numbers(settings: SimpleNamespace, name: str, kind: Callable[[str], Any]) -> list[Any]:
  """The entries of a flag that is a list."""
  try:
    numbers = [kind(entry) for entry in getattr(settings, name)]
  except ValueError:
    numbers = []
  if not numbers or not all(map(math.isfinite, numbers)):
    given = ",".join(map(str, getattr(settings, name)))
    raise ValueError(f"--{name}={given} must be numbers separated by commas")
  return numbers


def _shots_and_batches(settings: SimpleNamespace) -> list[tuple[int, int]]:
  """Of every evaluation: examples of each class, and of a minibatch."""
  shots = _numbers(settings, "eval_shots", int)
  batches = _numbers(settings, "eval_batch", int)
  for name, numbers in (("eval_shots", shots), ("eval_batch", batches)):
    if min(numbers) < 1:
      raise ValueError(f"--{name}={min(numbers)} must be at least 1")
  if len(set(shots)) < len(shots):
    raise ValueError(f"--eval_shots={','.join(map(str, shots))} must be different numbers")
  if len(batches) not in (1, len(shots)):
    raise ValueError(
      f"--eval_batch={','.join(map(str, batches))} must be one number, or one for each of "
      f"--eval_shots={','.join(map(str, shots))}"
    )
  return list(zip(shots, batches * len(shots) if len(batches) == 1 else batches, strict=True))


def _check_choices(settings: SimpleNamespace) -> None:
  """Of flags that are one of a few: the binary's are parsed, those from Python are not."""
  for flag in FLAGS:
    choices = getattr(flags.FLAGS[flag.name].parser, "enum_values", None)
    value = getattr(settings, flag.name)
    if choices and value not in choices and not (value is None and flag.default is None):
      raise ValueError(f"--{flag.name}={value} must be one of {', '.join(choices)}")


def _float32(value: float) -> float:
  """As JAX will compute with it: out of its range is infinite or 0."""
  with np.errstate(over="ignore", under="ignore"):
    return float(np.float32(value))


def check(settings: SimpleNamespace) -> None:
  """Refuses flags that are out of range or contradict each other, in one line."""
  _check_choices(settings)
  common.check_numbers(settings, *_AT_LEAST_ONE)
  for name in ("curve_tasks", "ways"):
    if getattr(settings, name) < 2:
      raise ValueError(f"--{name}={getattr(settings, name)} must be at least 2")
  for name in ("meta_steps", "eval_tasks", "curve_tasks"):
    if getattr(settings, name) >= 2**31:
      raise ValueError(f"--{name}={getattr(settings, name)} must be below 2^31, to be counted")
  for name in ("inner_rate", "outer_rate", "outer_clip"):
    value = getattr(settings, name)
    if value is not None and not 0 < _float32(value) < float("inf"):
      raise ValueError(f"--{name}={value} must be positive and finite")
  for name in ("outer_rate_final", "inner_eps_root"):
    if not 0 <= _float32(getattr(settings, name)) < float("inf"):
      raise ValueError(f"--{name}={getattr(settings, name)} must not be negative, and finite")
  _shots_and_batches(settings)
  unknown = sorted(set(settings.curve_splits) - {"train", "test"})
  if unknown or not settings.curve_splits:
    raise ValueError("--curve_splits must be train, test or both, separated by a comma")
  if (settings.algorithm == "combine") != (settings.weights is not None):
    raise ValueError("--weights and --algorithm=combine go together")
  if settings.weights is not None:
    weights = _numbers(settings, "weights", float)
    if len(weights) != settings.inner_steps:
      raise ValueError(
        f"--weights has {len(weights)} numbers for --inner_steps={settings.inner_steps}: "
        "give one for each"
      )
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
  if through_adam and _float32(settings.inner_eps_root) == 0:
    raise ValueError(
      "--algorithm=maml through --inner_optimizer=adam gives NaN where a gradient is 0: "
      "set --inner_eps_root, say to 1e-8, or use --inner_optimizer=sgd"
    )
  if settings.chunk is not None and not 1 <= settings.chunk <= settings.meta_batch:
    raise ValueError(
      f"--chunk={settings.chunk} must be from 1 to --meta_batch={settings.meta_batch}"
    )
  if settings.chunk is not None and settings.execution not in ("chunked", "sharded"):
    raise ValueError(
      f"--chunk is of no use with --execution={settings.execution}: leave it out, or use "
      "--execution=chunked"
    )
  if settings.filters is not None and settings.filters < 1:
    raise ValueError(f"--filters={settings.filters} must be at least 1")


def load(settings: SimpleNamespace) -> metajax.data.Splits:
  """The data set."""
  return _load(
    settings.dataset,
    settings.data_dir,
    settings.cache_dir,
    settings.omniglot_protocol,
    settings.seed,
  )


@lru_cache(maxsize=2)  # for many runs in one process
def _load(
  dataset: str, data_dir: str | None, cache_dir: str | None, protocol: Any, seed: int
) -> metajax.data.Splits:
  if dataset == _GLYPHS:
    return metajax.data.glyphs.load(seed)
  if dataset == _MINI_IMAGENET:
    return metajax.data.mini_imagenet.load(data_dir, cache_dir=cache_dir)
  return metajax.data.omniglot.load(data_dir, protocol=protocol, seed=seed, cache_dir=cache_dir)


def _of_norms(params: Any) -> Any:
  """Which parameters are batch normalization's, as a mask."""
  return jax.tree.map_with_path(
    lambda path, _: metajax.models.BatchStatsNorm.__name__ in jax.tree_util.keystr(path), params
  )


def build(
  settings: SimpleNamespace, splits: metajax.data.Splits, mesh: jax.sharding.Mesh
) -> Experiment:
  """From flags to functions; the data must be on the mesh."""
  network = {
    ("paper", False): metajax.models.omniglot,
    ("paper", True): metajax.models.mini_imagenet,
    ("finn", False): metajax.models.finn_omniglot,
    ("finn", True): metajax.models.finn_mini_imagenet,
  }[settings.network, settings.dataset == _MINI_IMAGENET]
  options = {} if settings.filters is None else {"filters": settings.filters}
  model = network(settings.ways, method=settings.convolution, **options)
  loss = metajax.losses.cross_entropy(model.apply, reduction=settings.loss_reduction)
  if settings.inner_optimizer == "adam":
    inner = optax.adam(settings.inner_rate, b1=0.0, eps_root=settings.inner_eps_root)
  else:
    inner = optax.sgd(settings.inner_rate)
  if not settings.adapt_norm:
    inner = optax.chain(inner, optax.masked(optax.set_to_zero(), _of_norms))
  if settings.inner_state == "carried":
    inner = metajax.carried(inner)

  estimators = {
    "reptile": metajax.reptile,
    "joint": metajax.reptile,
    "fomaml": metajax.fomaml,
    "maml": metajax.maml,
    "combine": lambda loss, inner: metajax.combine(
      loss, inner, _numbers(settings, "weights", float), of_updates=True
    ),
  }
  gradient = estimators[settings.algorithm](loss, inner)
  if settings.execution == "serial":
    execution = metajax.serial(settings.meta_batch)
  elif settings.execution == "sharded":
    execution = metajax.sharded(settings.meta_batch, mesh, chunk=settings.chunk)
  else:
    chunk = (settings.chunk or 1) if settings.execution == "chunked" else None
    execution = metajax.vmapped(settings.meta_batch, chunk=chunk)

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
  learner = metajax.meta_learner(gradient, outer, execution)
  return Experiment(
    model,
    learner,
    sample_task,
    tail(draw(steps, settings.inner_batch)),
    {
      split: {
        f"{shots}-shot": _judge(settings, shots, batch, classes, model, learner, mesh)
        for shots, batch in _shots_and_batches(settings)
      }
      for split, classes in (("train", splits.train), ("test", splits.test))
    },
    mesh,
  )


def _judge(
  settings: SimpleNamespace,
  shots: int,
  batch: int,
  classes: metajax.data.Classes,
  model: metajax.Model,
  learner: metajax.MetaLearner,
  mesh: jax.sharding.Mesh,
) -> Judge:
  """Accuracy on tasks of these classes by both protocols, after one adaptation."""
  sample_task = metajax.data.few_shot.sample_task(
    classes, ways=settings.ways, train_shots=shots, test_shots=settings.eval_queries
  )
  protocols = {
    "transductive": metajax.transductive(model.apply),
    "inductive": metajax.inductive(model.apply),
  }
  adapt_and_predict = metajax.evaluate(
    learner,
    metajax.cycling(settings.eval_steps, batch),
    lambda params, task: {name: predict(params, task) for name, predict in protocols.items()},
  )

  def accuracies(outputs: dict[str, jax.Array], targets: jax.Array) -> dict[str, jax.Array]:
    return {name: metajax.losses.accuracy(output, targets) for name, output in outputs.items()}

  return metajax.judge(adapt_and_predict, sample_task, accuracies, TASKS_PER_CALL, mesh)


def _mesh(settings: SimpleNamespace) -> jax.sharding.Mesh:
  """All devices if tasks are spread over them; else one, where all would do the same work."""
  one = settings.execution != _SPREAD and jax.process_count() == 1
  return metajax.task_mesh(jax.devices()[:1] if one else None)


def prepare(
  settings: SimpleNamespace, mesh: jax.sharding.Mesh | None = None
) -> tuple[Experiment, folders.RunFolder]:
  """Checks the flags, reads the data, builds the experiment and opens its folder.

  Args:
    settings: of one run, `out` included.
    mesh: where to run; by default all devices if tasks are spread over them, else one.

  Raises:
    ValueError: if a flag or the data is no good; nothing has been written over then.
  """
  check(settings)
  folder = folders.open_folder(settings)
  mesh = _mesh(settings) if mesh is None else mesh
  splits = training.on_mesh(load(settings), mesh)
  experiment = build(settings, splits, mesh)
  conditions = [folders.describe(splits)]
  if settings.execution == _SPREAD and settings.inner_state == "carried":
    each = -(-settings.meta_batch // mesh.size)
    conditions.append(f"inner states: {each * mesh.size}")
  folder.begin(*conditions)
  return experiment, folder


def run(
  settings: SimpleNamespace,
  experiment: Experiment,
  folder: folders.RunFolder,
  label: str = "meta-training",
) -> dict[str, Any]:
  """Trains and judges; returns what it writes to result.json."""
  keys = jax.random.split(jax.random.key(settings.seed), 4)
  init_key, train_key, curve_key, test_key = training.on_mesh(tuple(keys), experiment.mesh)
  state = experiment.learner.init(jax.jit(experiment.model.init)(init_key))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  everywhere = jax.NamedSharding(experiment.mesh, jax.P())
  programs: dict[tuple[str, str], Judge] = {}  # by split and shots

  def judge(
    state: metajax.MetaState, key: jax.Array, split: str, num_tasks: int, log: str | None = None
  ) -> dict[str, Any]:
    """Accuracy on each task, by cell; with a log, what is in it is not computed again."""
    logged = folder.keep(name=log) if log else []
    done = {(part["shots"], part["first"]): part["accuracy"] for part in logged}
    values = {}
    for shots, judge in experiment.judges[split].items():
      columns: dict[str, list[float]] = {}
      with training.progress(
        total=num_tasks, unit="task", desc=f"{label}, {shots} {split} tasks", mesh=experiment.mesh
      ) as bar:
        for first in range(0, num_tasks, TASKS_PER_CALL):
          part = done.get((shots, first))
          if part is None:
            if log and training.stopping():
              raise training.StoppedError(
                f"stopped at {shots} test task {first} of {folder.path}: the same command goes on "
                "from there"
              )
            arguments = (state, key, np.int32(first))
            if (split, shots) not in programs:
              programs[split, shots] = training.compiled(
                judge, experiment.mesh, *arguments, out_shardings=everywhere
              )
            # One program at a time: two processes might start several in different orders.
            found = programs[split, shots](*arguments)
            found = jax.device_get(jax.block_until_ready(found))
            part = {protocol: column.tolist() for protocol, column in found.items()}
            if log:
              folder.append({"shots": shots, "first": first, "accuracy": part}, log)
          for protocol, column in part.items():
            columns.setdefault(protocol, []).extend(column)
          bar.update(min(TASKS_PER_CALL, num_tasks - first))
      for protocol, column in columns.items():
        values[f"{shots} {protocol}"] = np.array(column[:num_tasks])
    return values

  def record(state: metajax.MetaState) -> dict[str, Any]:
    folder.keep(lambda line: False, _TEST_TASKS)  # they are of a later state, or of this one anew
    return {
      split: reports.with_intervals(judge(state, curve_key, split, settings.curve_tasks))
      for split in settings.curve_splits
    }

  state, seconds = training.train(
    experiment.learner,
    experiment.sample_task,
    experiment.make_episode,
    state,
    train_key,
    meta_steps=settings.meta_steps,
    eval_every=settings.eval_every,
    steps_per_call=settings.steps_per_call,
    evaluate=record,
    summary=reports.learning_curve_summary,
    score=reports.learning_curve_score,
    folder=folder,
    mesh=experiment.mesh,
    label=label,
  )
  values = judge(state, test_key, "test", settings.eval_tasks, log=_TEST_TASKS)
  cells = reports.with_intervals(values)
  for name, cell in cells.items():
    cell["tasks"] = settings.eval_tasks
    if settings.eval_tasks > _FINN:
      cell["first_600"] = reports.with_intervals({name: values[name][:_FINN]})[name]
  result: dict[str, Any] = {
    "cells": cells,
    "meta_steps": settings.meta_steps,
    "train_seconds": round(seconds, 3),
    "meta_steps_per_second": round(settings.meta_steps / seconds, 3),
    "parameters": parameters,
    "versions": folders.versions(),
  }
  reports.draw_learning_curve([folder.records()], folder.path / "learning_curve.png")
  folder.finish(result)
  return result


def check_all(many: Sequence[SimpleNamespace]) -> None:
  """Raises what is wrong with any of several runs, by the first's data, before one is trained."""
  splits = load(many[0])
  for settings in many:
    check(settings)
    folders.open_folder(settings)
    build(settings, splits, _mesh(settings))


def run_all(
  many: Sequence[tuple[str, SimpleNamespace]], *, diverging_guesses: bool = False
) -> list[dict[str, Any]]:
  """The results of several labelled runs, in order; those that are complete are left as they are.

  One after another on all devices if they spread their tasks, else each on a device of its own. A
  run that diverges ends them all, or, with `diverging_guesses`, has the accuracy of guessing.
  """

  def job(label: str, settings: SimpleNamespace, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    folder = folders.open_folder(settings)
    try:
      return folder.result() or run(settings, *prepare(settings, mesh), label)
    except training.DivergedError as error:
      if not diverging_guesses:
        raise
      guess = {"accuracy": 1 / settings.ways, "interval95": 0.0, "tasks": settings.eval_tasks}
      cells = [
        f"{shots}-shot {protocol}"
        for shots, _ in _shots_and_batches(settings)
        for protocol in ("transductive", "inductive")
      ]
      result = {"cells": dict.fromkeys(cells, guess), "diverged": str(error)}
      folder.finish(result)
      tqdm.write(f"{label}: {error}; it counts as guessing")
      return result

  if any(settings.execution == _SPREAD for _, settings in many):
    return [job(label, settings, None) for label, settings in many]
  return training.side_by_side([partial(job, label, settings) for label, settings in many])


def program(settings: SimpleNamespace) -> Callable[[], Any]:
  """What the binary does, checked."""
  check(settings)
  picture = Path(settings.out, "learning_curve.png")
  if settings.plot_only:
    logs = folders.logs_of_seeds(settings.out) or [folders.logged(settings.out)]
    return partial(reports.draw_learning_curve, logs, picture)
  folder = folders.open_folder(settings)
  if settings.seeds == 1:
    complete = folder.result()
    if complete is not None:
      return partial(report, settings, complete)
    prepared = prepare(settings)
    return lambda: report(settings, run(settings, *prepared))
  runs = common.of_each_seed(settings)
  check_all(runs)
  folder.begin("a run of each seed")

  def each_seed() -> None:
    results = run_all([(f"seed {run.seed}", run) for run in runs])
    mean = lambda key: round(sum(result[key] for result in results) / len(results), 3)
    whole = {
      **results[0],
      "cells": reports.cells_over_seeds(results),
      "train_seconds": mean("train_seconds"),
      "meta_steps_per_second": mean("meta_steps_per_second"),
    }
    folder.finish(whole)
    reports.draw_learning_curve([folders.logged(run.out) for run in runs], picture)
    report(settings, whole)

  return each_seed


def report(settings: SimpleNamespace, result: dict[str, Any]) -> None:
  """Prints a result."""
  print(
    f"{settings.dataset}, {settings.ways}-way, {settings.algorithm}: "
    f"accuracy over {settings.eval_tasks} test tasks, with its 95 % interval"
  )
  for name, cell in result["cells"].items():
    print(f"  {name:20s} {reports.percent(cell)}")
  seconds = result["train_seconds"]
  each = " each" if settings.seeds > 1 else ""
  print(
    f"  {settings.meta_steps} meta-steps in {seconds:.1f} s{each}; the run is in {settings.out}"
  )


def defaults(**changes: Any) -> SimpleNamespace:
  """The flags' default values, but for `changes`: to prepare and run from Python."""
  return common.defaults(FLAGS, **{**_DEFAULTS, **changes})


def main(argv: list[str]) -> None:
  common.main("few_shot", argv, FLAGS, _DEFAULTS, program)


if __name__ == "__main__":
  app.run(main, flags_parser=common.parse_flags)
