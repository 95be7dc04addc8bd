"""How long a meta-step takes: algorithms, networks, inner steps, tasks, execution, convolution.

  python -m benchmarks.wall_clock --algorithms=reptile,maml --inner_steps=5,10 --out=FILE.jsonl

Lowering, compiling and running are timed apart. Cases take turns, round after round, so that a
drift of the machine's speed meets all of them, and so does the float32 matrix multiplication whose
rate is the measure: model FLOP/s are printed as a fraction of it. Model FLOPs are counted from the
network: a multiply-add is 2, a gradient is 3 forward passes, and differentiating through one inner
gradient costs 2 gradients more. Only convolutions and dense layers count.
"""

import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

import metajax

_ALGORITHMS = ("reptile", "fomaml", "maml", "maml_remat", "maml_mixed_mode")
_MODELS = ("omniglot", "omniglot_pool", "mini_imagenet", "sine")

flags.DEFINE_list("algorithms", ["reptile"], f"Any of {', '.join(_ALGORITHMS)}.")
flags.DEFINE_list("model", ["omniglot"], f"Any of {', '.join(_MODELS)}.")
flags.DEFINE_list("inner_steps", ["5"], "k, the losses of an episode, the tail included.")
flags.DEFINE_list("meta_batch", ["5"], "Tasks of a meta-step.")
flags.DEFINE_list("execution", ["vmap"], "Any of vmap, chunked, serial.")
flags.DEFINE_list("convolution", ["patches"], "Any of patches, xla.")
flags.DEFINE_integer("batch", 10, "Examples of an inner minibatch.", lower_bound=1)
flags.DEFINE_integer(
  "tail", None, "Examples of the last minibatch; by default as --batch.", lower_bound=1
)
flags.DEFINE_enum("optimizer", "adam", ["adam", "sgd"], "Inner optimizer; MAML's is always SGD.")
flags.DEFINE_integer("chunk", 1, "Tasks at once with --execution=chunked.", lower_bound=1)
flags.DEFINE_integer("repeats", 10, "Rounds in which every case runs once.", lower_bound=1)
flags.DEFINE_string("out", None, "File to append JSON lines to.")
FLAGS = flags.FLAGS


def _one_of(name: str, choices: tuple[str, ...]) -> None:
  message = f"must be any of {', '.join(choices)}, separated by commas"
  flags.register_validator(name, lambda given: bool(given) and set(given) <= {*choices}, message)


_one_of("algorithms", _ALGORITHMS)
_one_of("model", _MODELS)
_one_of("execution", ("vmap", "chunked", "serial"))
_one_of("convolution", ("patches", "xla"))
for _name in ("inner_steps", "meta_batch"):
  flags.register_validator(
    _name,
    lambda given: bool(given) and all(n.isdigit() and int(n) > 0 for n in given),
    "must be whole numbers from 1, separated by commas",
  )


class Case(NamedTuple):
  """One row of the table."""

  algorithm: str
  model: str
  inner_steps: int
  meta_batch: int
  execution: str
  convolution: str


class Program(NamedTuple):
  """A case, compiled."""

  case: Case
  call: Callable[[], Any]
  flops: float
  lower_seconds: float
  compile_seconds: float
  temporary_bytes: int


class Network(NamedTuple):
  """A model with the shape of its inputs and the FLOPs of one example's forward pass."""

  model: metajax.Model
  inputs: tuple[int, ...]
  flops: float


def network(name: str, convolution: Any) -> Network:
  """The networks of the paper, for 5 ways."""
  if name == "sine":
    return Network(metajax.models.sine(), (1,), 2 * (64 + 64 * 64 + 64))
  if name == "mini_imagenet":
    model = metajax.models.mini_imagenet(5, method=convolution)
    return Network(model, (84, 84, 3), _convolution_flops(84, 3, 32, pool=True))
  pool = name == "omniglot_pool"
  model = metajax.models.omniglot(5, downsample="pool" if pool else "stride", method=convolution)
  return Network(model, (28, 28, 1), _convolution_flops(28, 1, 64, pool))


def _convolution_flops(size: int, channels: int, filters: int, pool: bool) -> float:
  """Of four 3x3 convolutions, each followed or preceded by halving, and a dense layer to 5."""
  total = 0
  for _ in range(4):
    halved = -(-size // 2)
    positions = (size if pool else halved) ** 2
    total += 2 * positions * 9 * channels * filters
    size, channels = halved, filters
  return total + 2 * size**2 * filters * 5


def step_flops(case: Case, forward: float, batch: int, tail: int) -> float:
  """Of a meta-step, by the convention in this module's docstring."""
  inner = 3 * forward * batch * (case.inner_steps - 1)
  through = 3 if case.algorithm.startswith("maml") else 1
  return case.meta_batch * (through * inner + 3 * forward * tail)


def compile_case(case: Case) -> Program:
  """Builds a meta-step on random data and compiles it ahead of time."""
  batch, tail = FLAGS.batch, FLAGS.tail or FLAGS.batch
  net = network(case.model, case.convolution)
  regression = case.model == "sine"
  make_loss = metajax.losses.squared_error if regression else metajax.losses.cross_entropy
  loss = make_loss(net.model.apply, reduction="mean")
  estimator, _, cost = case.algorithm.partition("_")
  adam = FLAGS.optimizer == "adam" and estimator != "maml"
  inner = optax.adam(1e-3, b1=0.0) if adam else optax.sgd(0.01)
  gradient = getattr(metajax, estimator)(loss, inner, **({cost: True} if cost else {}))
  if case.execution == "serial":
    gradient = metajax.serial(gradient)
  else:
    chunk = FLAGS.chunk if case.execution == "chunked" else None
    gradient = metajax.batched(gradient, case.meta_batch, chunk=chunk)
  learner = metajax.meta_learner(gradient, optax.sgd(0.1))

  rng = np.random.default_rng(0)

  def examples(n: int) -> metajax.Examples:
    inputs = rng.normal(size=(case.meta_batch, n, *net.inputs)).astype(np.float32)
    shape = (case.meta_batch, n)
    targets = rng.normal(size=(*shape, 1)) if regression else rng.integers(0, 5, shape)
    return metajax.Examples(
      jnp.asarray(inputs), jnp.asarray(targets, jnp.float32 if regression else jnp.int32)
    )

  steps = case.inner_steps - 1
  rows = np.arange(steps * batch, dtype=np.int32).reshape(steps, batch)
  schedule = jnp.asarray(np.broadcast_to(rows, (case.meta_batch, steps, batch)))
  episodes = metajax.Episode(examples(max(1, steps * batch)), schedule, examples(tail))
  state = learner.init(jax.jit(net.model.init)(jax.random.key(0)))

  start = time.perf_counter()
  lowered = jax.jit(learner.step).lower(state, episodes)
  lowering = time.perf_counter() - start
  start = time.perf_counter()
  compiled = lowered.compile()
  compiling = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return Program(
    case,
    lambda: compiled(state, episodes),
    step_flops(case, net.flops, batch, tail),
    lowering,
    compiling,
    memory.temp_size_in_bytes if memory is not None else 0,
  )


def timed(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def matrix_multiplications() -> dict[int, Callable[[], jax.Array]]:
  """Float32 products of square matrices, by size."""
  multiply = jax.jit(jnp.matmul)
  matrices = {n: jnp.ones((n, n), jnp.float32) for n in (512, 1024, 2048)}
  return {n: partial(multiply, matrix, matrix) for n, matrix in matrices.items()}


def main(argv: list[str]) -> None:
  del argv
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  cases = [
    Case(algorithm, model, int(k), int(tasks), execution, convolution)
    for algorithm, model, k, tasks, execution, convolution in itertools.product(
      FLAGS.algorithms,
      FLAGS.model,
      FLAGS.inner_steps,
      FLAGS.meta_batch,
      FLAGS.execution,
      FLAGS.convolution,
    )
  ]
  programs = [compile_case(case) for case in cases]
  products = matrix_multiplications()
  for call in (*(program.call for program in programs), *products.values()):
    timed(call)  # warm-up
  seconds: list[list[float]] = [[] for _ in programs]
  product_seconds: dict[int, list[float]] = {n: [] for n in products}
  for _ in range(FLAGS.repeats):
    for times, program in zip(seconds, programs, strict=True):
      times.append(timed(program.call))
    for n, call in products.items():
      product_seconds[n].append(timed(call))
  rate = max(2 * n**3 / float(np.median(times)) for n, times in product_seconds.items())

  records = [record(*pair, rate) for pair in zip(programs, seconds, strict=True)]
  versions = " ".join(f"{p} {importlib.metadata.version(p)}" for p in ("metajax", "jax", "jaxlib"))
  device = jax.devices()[0].device_kind
  print(f"{versions}, {device}; matrix multiplication {rate / 1e9:.0f} GFLOP/s (float32)\n")
  print(markdown(records))
  if FLAGS.out:  # last, so that a file that cannot be written loses nothing
    with Path(FLAGS.out).open("a") as file:
      file.writelines(json.dumps(line) + "\n" for line in records)


def record(program: Program, seconds: list[float], matmul_rate: float) -> dict[str, Any]:
  """A row: times in seconds."""
  low, median, high = np.percentile(seconds, (10, 50, 90))
  return {
    **program.case._asdict(),
    "lower": program.lower_seconds,
    "compile": program.compile_seconds,
    "run": float(median),
    "run_p10": float(low),
    "run_p90": float(high),
    "tasks_per_second": program.case.meta_batch / float(median),
    "flops_per_second": program.flops / float(median),
    "fraction_of_matmul": program.flops / float(median) / matmul_rate,
    "temporary_bytes": program.temporary_bytes,
  }


def markdown(records: list[dict[str, Any]]) -> str:
  """The table."""
  head = [*Case._fields, "compile (s)", "run (ms)", "10-90 %", "tasks/s", "of matmul", "temp (MB)"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for row in records:
    cells = [str(row[field]) for field in Case._fields]
    cells += [
      f"{row['lower'] + row['compile']:.1f}",
      f"{1e3 * row['run']:.1f}",
      f"{1e3 * row['run_p10']:.1f}-{1e3 * row['run_p90']:.1f}",
      f"{row['tasks_per_second']:.1f}",
      f"{row['fraction_of_matmul']:.2f}",
      f"{row['temporary_bytes'] / 1e6:.0f}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  app.run(main)
