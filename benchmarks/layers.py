"""The lower bound that a network's matrix products set on the time of a meta-step.

  python -m benchmarks.layers --model=omniglot,omniglot_pool

A gradient needs three matrix products for each layer: the forward pass, the derivative by the
inputs (not for the first layer) and the derivative by the kernel. This program times each product
alone, on all devices at once, with operands that are already patches, in turns with the whole
meta-step of `--execution=sharded`. The sum of the products' times is what a program without any
elementwise pass, reduction or copy would take. All times are the fastest of the rounds. The flags
are those of `benchmarks.wall_clock`.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import metajax
from benchmarks import cases, wall_clock

FLAGS = flags.FLAGS
FLAGS.set_default("execution", ["sharded"])

_TIMES = 20  # repetitions of a product in one call, so that the cost of the call does not count
_PRODUCTS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
  "forward": lambda patches, kernel, g: patches @ kernel,
  "by inputs": lambda patches, kernel, g: g @ kernel.T,
  "by kernel": lambda patches, kernel, g: g.T @ patches,
}

_FACTORS = {
  "forward": ("patches", "kernel"),
  "by inputs": ("g", "kernel"),
  "by kernel": ("g", "patches"),
}


def main(argv: Sequence[str]) -> None:
  cases.check_flags(argv, "out", "baseline", "plots", "errors")
  if set(FLAGS.execution) != {"sharded"}:
    sys.exit("layers: --execution must be sharded: a device works on a task alone")
  wall_clock.set_up()
  square = cases.matrix_products()
  print(", ".join(f"{name} {value}" for name, value in cases.machine().items()))
  for case in wall_clock.cases_from_flags():
    compare(case, square)


def compare(case: cases.Case, square: cases.MatrixProducts) -> None:
  """Prints the products of one case, the sum of their times, and the time of the meta-step."""
  program = cases.compile_case(case, judge=False)
  counts = _products(case)
  calls = [product(name, *shape) for name, shape in counts]
  seconds = cases.in_turns([program.call, *calls, *square.calls], FLAGS.repeats)
  fastest = [min(times) for times in seconds]
  run, alone = fastest[0], [time / _TIMES for time in fastest[1 : 1 + len(calls)]]
  rate = square.rate([[time] for time in fastest[1 + len(calls) :]]) / len(jax.devices())

  described = f"{case.algorithm}, {case.model}, k = {case.inner_steps}, {case.meta_batch} tasks"
  print(f"\n{described}; square matrices on one device: {rate / 1e9:.0f} GFLOP/s (float32)\n")
  print("| product | rows x depth x columns | times a task | us | GFLOP/s | of matmul |")
  print("|---|---|---|---|---|---|")
  for ((name, shape), count), time in zip(counts.items(), alone, strict=True):
    speed = 2 * np.prod(shape) / time
    print(
      f"| {name} | {' x '.join(map(str, shape))} | {count} | {1e6 * time:.0f} "
      f"| {speed / 1e9:.0f} | {speed / rate:.2f} |"
    )
  rounds = -(-case.meta_batch // len(jax.devices()))  # some devices may idle in the last
  bound = rounds * sum(count * time for count, time in zip(counts.values(), alone, strict=True))
  whole = program.flops / rate / len(jax.devices())
  print(
    f"\nmeta-step {1e3 * run:.1f} ms, {whole / run:.2f} of matmul; its products alone "
    f"{1e3 * bound:.1f} ms, which would be {whole / bound:.2f}"
  )


def _products(case: cases.Case) -> dict[tuple[str, tuple[int, int, int]], int]:
  """Counts how often a task computes each product.

  The predictions of an evaluation are left out.

  Returns:
    The count of each `(name, (rows, depth, columns))`.
  """
  counts: dict[tuple[str, tuple[int, int, int]], int] = {}
  for batch, gradients in cases.gradients(case):
    for index, layer in enumerate(cases.network(case.model, case.convolution).layers):
      for name in _PRODUCTS:
        if gradients and (index or name != "by inputs"):
          key = name, (layer.positions * batch, layer.depth, layer.features)
          counts[key] = counts.get(key, 0) + gradients
  return counts


def product(name: str, rows: int, depth: int, columns: int) -> Callable[[], Any]:
  """A function that computes one product many times on every device.

  The smaller factor differs in every repetition, so that XLA cannot move the product out of the
  loop. The larger factor is the same and stays in the cache, where a gradient has just put it.
  """
  mesh = metajax.task_mesh()
  rng = np.random.default_rng(0)
  shapes = {"patches": (rows, depth), "kernel": (depth, columns), "g": (rows, columns)}
  varied = min(_FACTORS[name], key=lambda which: np.prod(shapes[which]))
  operands = {
    which: rng.normal(size=(_TIMES, *shape) if which == varied else shape).astype(np.float32)
    for which, shape in shapes.items()
  }

  def many(operands: dict[str, jax.Array]) -> jax.Array:
    def body(total: jax.Array, factor: jax.Array) -> tuple[jax.Array, None]:
      now = operands | {varied: factor}
      result = _PRODUCTS[name](now["patches"], now["kernel"], now["g"])
      return total + jax.lax.optimization_barrier(result)[0, 0], None

    return jax.lax.scan(body, jnp.float32(0), operands[varied])[0][None]

  everywhere, by_device = jax.P(), jax.P(mesh.axis_names)
  placed = jax.device_put(operands, jax.NamedSharding(mesh, everywhere))
  spread = jax.shard_map(many, mesh=mesh, in_specs=everywhere, out_specs=by_device, check_vma=False)
  compiled = jax.jit(spread).lower(placed).compile()
  return lambda: compiled(placed)


if __name__ == "__main__":
  app.run(main)
