"""The cases that the benchmarks measure: settings, compiled meta-steps and counts of FLOPs.

This module defines no flags. Model FLOPs are counted from the network: a multiply-add is
2, a gradient is 3 forward passes, and differentiating through one inner gradient costs 2 gradients
more. Only convolutions and dense layers count.
"""

import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import metajax
from experiments import folders

ALGORITHMS = ("reptile", "fomaml", "maml", "maml_reverse", "maml_remat", "evaluation")
# What is after the underscore: how MAML differentiates through the inner steps.
_COSTS: dict[str, dict[str, bool]] = {
  "": {},
  "reverse": {"mixed_mode": False},
  "remat": {"mixed_mode": False, "remat": True},
}
MODELS = ("omniglot", "omniglot_pool", "mini_imagenet", "sine")
EXECUTIONS = ("vmap", "chunked", "serial", "sharded")
INNER_RATES = {"adam": 1e-3, "sgd": 0.01}


class Case(NamedTuple):
  """The settings of one table row. The tasks are 5-way classification, or sine waves.

  Attributes:
    algorithm: one of `ALGORITHMS`; `"evaluation"` adapts and predicts, without a meta-gradient.
    model: one of `MODELS`.
    inner_steps: k, the number of losses in an episode, counting the tail's.
    meta_batch: T, the number of tasks in a meta-step.
    execution: one of `EXECUTIONS`.
    convolution: `"cpu"`, `"patches"` or `"xla"`.
    batch: the number of examples in an inner minibatch.
    tail: the number of examples in the last minibatch; in an evaluation, of those that are
      predicted together.
    optimizer: the inner optimizer, `"adam"` or `"sgd"`; MAML always uses SGD.
    chunk: the number of tasks that run together with `"chunked"`, and on each device with
      `"sharded"`.
  """

  algorithm: str
  model: str
  inner_steps: int
  meta_batch: int
  execution: str
  convolution: str
  batch: int
  tail: int
  optimizer: str
  chunk: int


class Program(NamedTuple):
  """A compiled case, with what compiling it cost."""

  case: Case
  compiled: jax.stages.Compiled
  call: Callable[[], Any]
  flops: float
  lower_seconds: float
  compile_seconds: float
  temporary_bytes: int
  gradient_error: float | None  # relative, for the first task; None if not compared


class Layer(NamedTuple):
  """A convolution or dense layer as the matrix product of an example's patches and the kernel.

  Attributes:
    positions: the number of output positions, which are the rows of an example's patches.
    depth: the number of entries in a patch, which are the rows of the kernel.
    features: the number of columns of the kernel.
  """

  positions: int
  depth: int
  features: int


class Network(NamedTuple):
  """A model, the shape of one of its inputs, and its layers."""

  model: metajax.Model
  inputs: tuple[int, ...]
  layers: list[Layer]

  @property
  def flops(self) -> float:
    """The FLOPs of one example's forward pass."""
    return 2.0 * sum(layer.positions * layer.depth * layer.features for layer in self.layers)


def network(name: str, convolution: Any) -> Network:
  """The paper's networks for 5-way tasks; for sine waves 1-40-40-1, as in Finn et al. (2017).

  Args:
    name: one of `MODELS`.
    convolution: `"cpu"`, `"patches"`, `"xla"`, or None for the default of the backend.
  """
  if name == "sine":
    layers = [Layer(1, 1, 40), Layer(1, 40, 40), Layer(1, 40, 1)]
    return Network(metajax.models.sine((40, 40, 1)), (1,), layers)
  if name == "mini_imagenet":
    model = metajax.models.mini_imagenet(5, method=convolution)
    return Network(model, (84, 84, 3), _convolutional(84, 3, 32, pool=True))
  pool = name == "omniglot_pool"
  model = metajax.models.omniglot(5, downsample="pool" if pool else "stride", method=convolution)
  return Network(model, (28, 28, 1), _convolutional(28, 1, 64, pool))


def _convolutional(size: int, channels: int, filters: int, pool: bool) -> list[Layer]:
  """The layers of four 3x3 convolutions and a dense layer with 5 outputs.

  Each convolution halves the image: by max-pooling after it if `pool`, else by its stride.
  """
  layers = []
  for _ in range(4):
    halved = -(-size // 2)
    layers.append(Layer((size if pool else halved) ** 2, 9 * channels, filters))
    size, channels = halved, filters
  return [*layers, Layer(1, size**2 * filters, 5)]


def gradients(case: Case) -> list[tuple[int, int]]:
  """The gradients that a task computes, as pairs of the size of a minibatch and their number.

  A Hessian-vector product counts as two gradients. In an evaluation, all steps adapt.
  """
  through = 3 if case.algorithm.startswith("maml") else 1
  last = case.batch if case.algorithm == "evaluation" else case.tail
  return [(case.batch, through * (case.inner_steps - 1)), (last, 1)]


def step_flops(case: Case, forward: float) -> float:
  """The model FLOPs of a meta-step, counted as the docstring of this module says.

  Args:
    case: the settings of the meta-step.
    forward: the FLOPs of one example's forward pass.
  """
  examples = 3 * sum(batch * number for batch, number in gradients(case))
  predicted = case.tail if case.algorithm == "evaluation" else 0
  return case.meta_batch * forward * (examples + predicted)


def loss_of(case: Case, model: metajax.Model) -> Any:
  """The loss function: the mean over the minibatch, as in most implementations."""
  make = metajax.losses.squared_error if case.model == "sine" else metajax.losses.cross_entropy
  return make(model.apply, reduction="mean")


def meta_gradient(case: Case, model: metajax.Model) -> metajax.MetaGradient:
  estimator, _, cost = case.algorithm.partition("_")
  return getattr(metajax, estimator)(loss_of(case, model), _inner(case), **_COSTS[cost])


def inner_optimizer(case: Case) -> str:
  """The inner optimizer of a case: SGD for MAML, else the one that it names."""
  return "sgd" if case.algorithm.startswith("maml") else case.optimizer


def _inner(case: Case) -> optax.GradientTransformation:
  name = inner_optimizer(case)
  if name == "sgd":
    return optax.sgd(INNER_RATES[name])
  return metajax.carried(optax.adam(INNER_RATES[name], b1=0.0))


def random_episodes(case: Case, inputs: tuple[int, ...]) -> metajax.Episode:
  """Random episodes as NumPy arrays `[T, ...]`. The same sizes give the same data."""
  rng = np.random.default_rng(0)
  steps = case.inner_steps - 1

  def examples(n: int) -> metajax.Examples:
    shape = (case.meta_batch, n)
    regression = case.model == "sine"
    targets = rng.normal(size=(*shape, 1)) if regression else rng.integers(0, 5, shape)
    return metajax.Examples(
      rng.normal(size=(*shape, *inputs)).astype(np.float32),
      targets.astype(np.float32 if regression else np.int32),
    )

  pool = max(case.batch, 50)  # a fixed size, so that the data do not grow with k
  rows = np.arange(steps * case.batch, dtype=np.int32).reshape(steps, case.batch) % pool
  schedule: Any = np.broadcast_to(rows, (case.meta_batch, *rows.shape))
  return metajax.Episode(examples(pool), schedule, examples(case.tail))


def compile_case(case: Case, *, judge: bool = True) -> Program:
  """Compiles a meta-step or an evaluation ahead of time, on random data.

  Args:
    case: the settings of what to compile.
    judge: whether to run the meta-step once and compare its gradient with that of plain loops.
  """
  net = network(case.model, case.convolution)
  episodes = random_episodes(case, net.inputs)
  params = jax.jit(net.model.init)(jax.random.key(0))
  build = _evaluation if case.algorithm == "evaluation" else _meta_step
  function, arguments = build(case, net.model, params, episodes)
  start = time.perf_counter()
  lowered = jax.jit(function).lower(*arguments)
  lowering = time.perf_counter() - start
  start = time.perf_counter()
  compiled = lowered.compile()
  compiling = time.perf_counter() - start
  memory = compiled.memory_analysis()
  error = None
  if judge and _has_a_plain_twin(case):
    # Every task is a copy of the first, so the mean gradient is the gradient of that task.
    first = jax.tree.map(lambda leaf: np.repeat(leaf[:1], case.meta_batch, axis=0), episodes)
    state, _ = compiled(arguments[0], _placed(case, first))
    error = relative_error(state.outer[0].trace, plain_gradient(case, params, episodes))
  return Program(
    case,
    compiled,
    partial(compiled, *arguments),
    step_flops(case, net.flops),
    lowering,
    compiling,
    memory.temp_size_in_bytes if memory is not None else 0,
    error,
  )


def _has_a_plain_twin(case: Case) -> bool:
  """Whether `plain_gradient` computes the same gradient as the compiled case.

  `serial` hands Adam's state from task to task, so copies of one task have different gradients.
  """
  handed_along = case.execution == "serial" and inner_optimizer(case) == "adam"
  return case.algorithm != "evaluation" and not handed_along


def _meta_step(
  case: Case, model: metajax.Model, params: Any, episodes: metajax.Episode
) -> tuple[Any, tuple]:
  """A whole meta-step, every task's gradient and the outer update, and its arguments."""
  gradient = meta_gradient(case, model)
  chunk = min(case.chunk, case.meta_batch)
  if case.execution == "serial":
    execution = metajax.serial(case.meta_batch)
  elif case.execution == "sharded":
    execution = metajax.sharded(case.meta_batch, chunk=chunk)
  else:
    chunked = case.execution == "chunked"
    execution = metajax.vmapped(case.meta_batch, chunk=chunk if chunked else None)
  # With momentum, the outer optimizer's first trace is the gradient, which can then be compared.
  learner = metajax.meta_learner(gradient, optax.sgd(0.1, momentum=0.9), execution)
  if case.execution == "sharded":
    params = jax.device_put(params, jax.NamedSharding(metajax.task_mesh(), jax.P()))
  return learner.step, (learner.init(params), _placed(case, episodes))


def _evaluation(
  case: Case, model: metajax.Model, params: Any, episodes: metajax.Episode
) -> tuple[Any, tuple]:
  """An evaluation and its arguments.

  It takes k steps on the pool and then predicts the tail's inputs together.
  """
  schedule = metajax.cycling(case.inner_steps, case.batch)
  gradient = metajax.reptile(loss_of(case, model), _inner(case))
  learner = metajax.meta_learner(gradient, optax.sgd(0.1), metajax.vmapped(1))
  adapt = metajax.evaluate(learner, schedule, metajax.transductive(model.apply))

  def one(state: metajax.MetaState, episode: metajax.Episode) -> Any:
    return adapt(state, jax.random.key(0), metajax.Task(episode.pool, episode.tail))

  mesh = metajax.task_mesh(None if case.execution == "sharded" else jax.devices()[:1])
  chunk = case.meta_batch if case.execution == "vmap" else case.chunk
  return metajax.map_tasks(one, mesh, chunk=chunk), (learner.init(params), _placed(case, episodes))


def _placed(case: Case, episodes: metajax.Episode) -> metajax.Episode:
  """Copies the episodes to the device, or shards them if the devices divide the tasks evenly."""
  mesh = metajax.task_mesh()
  if case.execution == "sharded" and case.meta_batch % mesh.size == 0:
    return jax.device_put(episodes, jax.NamedSharding(mesh, jax.P(mesh.axis_names)))
  return jax.device_put(episodes)


def doubled(leaf: Any) -> np.ndarray:
  """A float32 array as float64; other arrays as they are."""
  return np.asarray(leaf, np.float64 if leaf.dtype == np.float32 else leaf.dtype)


def plain_gradient(case: Case, params: Any, episodes: metajax.Episode) -> Any:
  """The first task's meta-gradient, computed by plain loops in float64 with XLA's convolution.

  MAML's gradient is computed by Equation 24: the last gradient is multiplied by (I - alpha H_j),
  step by step backwards.
  """
  loss = loss_of(case, network(case.model, "xla").model)
  adam, rate = inner_optimizer(case) == "adam", INNER_RATES[inner_optimizer(case)]
  with jax.enable_x64(True):
    phi = start = jax.tree.map(doubled, params)
    task = jax.tree.map(lambda leaf: doubled(leaf[0]), episodes)
    gradient = jax.jit(jax.grad(loss))
    product = jax.jit(
      lambda phi, batch, v: jax.jvp(lambda p: jax.grad(loss)(p, batch), (phi,), (v,))[1]
    )
    batches = [
      jax.tree.map(lambda leaf, rows=rows: leaf[rows], task.pool) for rows in task.schedule
    ]
    batches.append(task.tail)
    path, second = [], jax.tree.map(np.zeros_like, phi)
    for count, batch in enumerate(batches if case.algorithm == "reptile" else batches[:-1], 1):
      path.append(phi)
      g = update = gradient(phi, batch)
      if adam:
        second = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, second, g)
        update = jax.tree.map(
          lambda s, g, n=count: g / (np.sqrt(s / (1 - 0.999**n)) + 1e-8), second, g
        )
      phi = jax.tree.map(lambda p, u: p - rate * u, phi, update)
    if case.algorithm == "reptile":
      return jax.tree.map(np.subtract, start, phi)
    result = gradient(phi, task.tail)
    if case.algorithm.startswith("maml"):
      for phi, batch in reversed(list(zip(path, batches, strict=False))):
        curved = product(phi, batch, result)
        result = jax.tree.map(lambda r, c: r - rate * c, result, curved)
    return jax.tree.map(np.asarray, result)


def gradient_in_float64(case: Case, params: Any, episodes: metajax.Episode) -> Any:
  """The first task's meta-gradient, computed by the library in float64."""
  estimator = meta_gradient(case, network(case.model, case.convolution).model)
  with jax.enable_x64(True):
    params = jax.tree.map(doubled, params)
    episode = jax.tree.map(lambda leaf: doubled(leaf[0]), episodes)
    estimate = jax.jit(estimator.estimate)
    return jax.device_get(estimate(params, estimator.init(params), episode)[0])


def relative_error(ours: Any, exact: Any) -> float:
  """The relative error of a gradient, without the biases of the convolutions."""
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
  ours, exact = _without_offsets(ours), _without_offsets(exact)
  difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, ours, exact)
  return float(norm(difference) / norm(exact))


def _without_offsets(params: Any) -> Any:
  """All parameters except the biases of the convolutions.

  Batch normalization subtracts these biases again, so their derivative is 0. What is computed for
  it is rounding error, which Adam turns into steps.
  """
  return {
    module: {name: leaf for name, leaf in leaves.items() if (module[:4], name) != ("Conv", "bias")}
    for module, leaves in params.items()
  }


def timed(call: Callable[[], Any]) -> float:
  """The seconds until the results of a call are ready."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def in_turns(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
  """Times all calls in turns, so that drift in machine speed affects them equally.

  Args:
    calls: the functions to time. Each is called once before the first round, to warm up.
    rounds: how many times each is timed.

  Returns:
    For each call, a list of seconds.
  """
  for call in calls:
    timed(call)
  seconds: list[list[float]] = [[] for _ in calls]
  for _ in range(rounds):
    for times, call in zip(seconds, calls, strict=True):
      times.append(timed(call))
  return seconds


class MatrixProducts(NamedTuple):
  """Float32 products of square matrices, computed on all devices at once."""

  calls: list[Callable[[], Any]]
  flops: list[float]

  def rate(self, seconds: list[list[float]]) -> float:
    """The FLOP/s of the fastest matrix size, from the median of its times."""
    medians = [float(np.median(times)) for times in seconds]
    return max(flops / median for flops, median in zip(self.flops, medians, strict=True))


def matrix_products() -> MatrixProducts:
  """The products that measure the machine's speed. Each device multiplies its own matrices."""
  mesh = metajax.task_mesh()
  calls: list[Callable[[], Any]] = []
  flops = []
  for n in (512, 1024, 2048):
    matrices = jax.device_put(
      np.ones((mesh.size, n, n), np.float32), jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    )
    calls.append(partial(jax.jit(jnp.matmul), matrices, matrices))
    flops.append(2.0 * n**3 * mesh.size)
  return MatrixProducts(calls, flops)


def check_flags(argv: Sequence[str], *unused: str) -> None:
  """Ends a program that is given what it does not use, or an --out that cannot be written.

  Args:
    argv: the name of the program, and what is left of its arguments.
    *unused: the flags that it does not use.
  """
  name, given = Path(argv[0]).stem, flags.FLAGS
  if len(argv) > 1:
    sys.exit(f"{name}: unexpected argument {argv[1]!r}: flags start with --")
  for flag in unused:
    if given[flag].present:
      sys.exit(f"{name}: --{flag} is of no use here: leave it out")
  if "out" in given and given.out:
    try:
      Path(given.out).parent.mkdir(parents=True, exist_ok=True)
      Path(given.out).open("a").close()
    except OSError as error:
      sys.exit(f"{name}: --out={given.out} cannot be written ({error.strerror}): change it")


def machine() -> dict[str, str]:
  """Versions, device and commit, to be stored with a result."""
  versions = {name: importlib.metadata.version(name) for name in ("metajax", "jax", "jaxlib")}
  device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
  return {**versions, "device": device, "commit": folders.commit()}
