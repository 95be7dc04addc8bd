"""Compares metajax with PyTorch on the same networks, tasks and minibatches.

  pip install -e '.[bench]' && python -m benchmarks.peers --algorithms=maml --execution=sharded

All programs run in turns in one process. A peer that is not installed, or does not support a
workload, is named and left out. `ratio` is a peer's median time divided by the fastest median of
metajax in the same table, and `apart` is the relative distance of its gradient from metajax's.
`float64` is the relative distance of the first task's gradient from that of plain loops, all of
them in float64: where it is tiny, `apart` is rounding, which ReLU and pooling magnify. The inner
optimizer is Adam for Reptile and SGD for the others. The other flags are those of
`benchmarks.wall_clock`.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import cases, wall_clock

FLAGS = flags.FLAGS
FLAGS.set_default("execution", ["sharded"])
flags.DEFINE_list("peers", [], "Peers to run; by default all that support the workload.")


def main(argv: Sequence[str]) -> None:
  cases.check_flags(argv, "out", "baseline", "plots", "errors", "optimizer")
  if "evaluation" in FLAGS.algorithms:
    sys.exit("peers: --algorithms=evaluation has no gradient to compare: use wall_clock")
  if "serial" in FLAGS.execution and any(name.startswith("reptile") for name in FLAGS.algorithms):
    sys.exit(
      "peers: --execution=serial hands Adam's state from task to task in Reptile, which the peers "
      "do not: use another execution"
    )
  os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # so that compiling is measured
  try:
    from benchmarks import torch_peers
  except ImportError as error:
    sys.exit(f"peers: {error}: pip install -e '.[bench]'")
  unknown = sorted(set(FLAGS.peers) - set(torch_peers.PEERS))
  if unknown:
    sys.exit(f"peers: --peers={unknown[0]} is none of {', '.join(torch_peers.PEERS)}")
  wall_clock.set_up()
  products = cases.matrix_products()
  groups: dict[tuple, list[cases.Case]] = {}
  for case in wall_clock.cases_from_flags():
    case = case._replace(optimizer="adam" if case.algorithm == "reptile" else "sgd")
    algorithm = case.algorithm.partition("_")[0]
    workload = (algorithm, case.model, case.inner_steps, case.meta_batch, case.batch, case.tail)
    groups.setdefault(workload, []).append(case)
  print(", ".join(f"{name} {value}" for name, value in cases.machine().items()))
  for group, ours in groups.items():
    compare(torch_peers, torch_peers.Workload(*group), ours, products)


def compare(
  torch_peers: Any,
  workload: Any,
  ours: list[cases.Case],
  products: cases.MatrixProducts,
) -> None:
  """Prints the table of one workload."""
  net = cases.network(workload.model, ours[0].convolution)
  episodes = cases.random_episodes(ours[0], net.inputs)
  params = jax.device_get(jax.jit(net.model.init)(jax.random.key(0)))
  data = torch_peers.Data(*episodes.pool, np.asarray(episodes.schedule), *episodes.tail)
  exact = cases.plain_gradient(ours[0], params, episodes)
  one_task = torch_peers.Data(*(cases.doubled(leaf[:1]) for leaf in data))

  names: list[str] = []
  calls: list[Callable[[], Any]] = []
  compiling: list[float] = []
  for case in ours:
    program = cases.compile_case(case, judge=False)
    names.append(f"metajax {case.algorithm}, {case.execution}, {case.convolution}")
    calls.append(program.call)
    compiling.append(program.lower_seconds + program.compile_seconds)
  gradient = calls[0]()[0].outer[0].trace
  apart: list[float | None] = [None] * len(ours)
  in_float64 = [
    cases.relative_error(cases.gradient_in_float64(case, params, episodes), exact) for case in ours
  ]
  for name, build in torch_peers.PEERS.items():
    if FLAGS.peers and name not in FLAGS.peers:
      continue
    try:
      start = time.perf_counter()
      call = build(workload, params, data)
      found = call()  # the first call includes compiling
      first = time.perf_counter() - start
      doubled_params = jax.tree.map(cases.doubled, params)
      of_one_task = build(workload._replace(meta_batch=1), doubled_params, one_task)()
    except (ImportError, NotImplementedError) as error:
      print(f"{name}: {error}")
      continue
    names.append(name)
    calls.append(call)
    compiling.append(first - cases.timed(call))
    apart.append(cases.relative_error(gradient, found))
    in_float64.append(cases.relative_error(of_one_task, exact))
  seconds = cases.in_turns([*calls, *products.calls], FLAGS.repeats)
  rate = products.rate(seconds[len(calls) :])
  medians = [float(np.median(times)) for times in seconds[: len(calls)]]
  best = min(medians[: len(ours)])
  print(f"\n{workload}, matrix multiplication {rate / 1e9:.0f} GFLOP/s (float32)\n")
  print("| | compile (s) | run (ms) | 10-90 % | ratio | apart | float64 |")
  print("|---|---|---|---|---|---|---|")
  # Not strict: seconds also holds the times of the matrix products.
  rows = zip(names, compiling, seconds, medians, apart, in_float64, strict=False)
  for name, compile_time, times, median, distance, exactly in rows:
    low, high = 1e3 * np.percentile(times, (10, 90))
    print(
      f"| {name} | {max(0.0, compile_time):.1f} | {1e3 * median:.1f} | {low:.1f}-{high:.1f} "
      f"| {median / best:.2f} | {'' if distance is None else f'{distance:.0e}'} "
      f"| {exactly:.0e} |"
    )


if __name__ == "__main__":
  app.run(main)
