"""Predicts how a meta-step scales to many devices, from its compiled program. Nothing is run.

  python -m benchmarks.scaling --link_gbps=50 --tflops=10 --devices=8,64,512

The program of `metajax.sharded`, compiled for a few CPU devices, contains one collective operation:
an all-reduce of B bytes, which are the gradient and the Info. For n devices and c = FLOPs of a task
/ FLOP/s of a device, with FLOPs counted as in `benchmarks.cases`, the model is

  all_reduce(n) = 2 (n - 1) / n * B / bandwidth + 2 ceil(log2(n)) * latency
  efficiency(n) = tasks * c / (n * (ceil(tasks / n) * c + all_reduce(n)))

The all-reduce is recursive halving followed by doubling (Thakur et al. 2005), which transfers as
few bytes as a ring does, in fewer messages. `weak` is the efficiency if each device has the T tasks
of the workload, so that tasks = n T. `strong` is the efficiency if all devices share T tasks; with
n > T some devices wait.

The model assumes that all devices are equally fast, that no link carries other traffic, and that
communication and computation do not overlap. Only matrix products, convolutions and messages take
time; data, launches, the additions in the all-reduce and the outer update take none.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

import metajax
from benchmarks import cases
from benchmarks.cases import Case

FLAGS = flags.FLAGS

_REPTILE = Case("reptile", "omniglot", 5, 5, "sharded", "cpu", 10, 10, "adam", 1)
_MAML = Case("maml", "omniglot", 6, 32, "sharded", "cpu", 5, 75, "sgd", 1)
WORKLOADS = {  # as in the tables of `benchmarks/README.md`
  "omniglot_reptile": _REPTILE,
  "omniglot_fomaml": _MAML._replace(algorithm="fomaml"),
  "omniglot_maml": _MAML,
  "mini_imagenet_reptile": _REPTILE._replace(model="mini_imagenet", inner_steps=8),
  "sine_maml": Case("maml", "sine", 2, 25, "sharded", "cpu", 10, 10, "sgd", 1),
}
# The compiled program has more than one task on each device, and so a loop over them, which must
# not contain the all-reduce.
_TASKS_EACH = 2
_COLLECTIVE = re.compile(
  r" = (.*?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|"
  r"collective-permute|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Link(NamedTuple):
  """The link from a device to the others, in one direction."""

  bytes_per_second: float
  latency: float  # seconds for each message


def collectives(program_text: str) -> list[tuple[str, int]]:
  """The collective operations of a compiled program.

  Args:
    program_text: the text of the compiled program (HLO).

  Returns:
    For each operation, its kind and the size of its result in bytes.
  """
  return [
    (kind, sum(_bytes(*array.groups()) for array in _ARRAY.finditer(result)))
    for result, kind in _COLLECTIVE.findall(program_text)
  ]


def _bytes(bits: str | None, dimensions: str) -> int:
  return int(bits or 8) * math.prod(map(int, filter(None, dimensions.split(",")))) // 8


def all_reduce_bytes(program_text: str) -> int:
  """The size in bytes of the program's only all-reduce.

  Raises:
    ValueError: if the program has other collective operations, or if it does not run exactly one
      all-reduce in each meta-step.
  """
  found = collectives(program_text)
  once = collectives(program_text[program_text.index("ENTRY ") :])  # without the bodies of loops
  if [kind for kind, _ in found] != ["all-reduce"] or once != found:
    raise ValueError(f"the model is of one all-reduce a meta-step, the program has {found}")
  return found[0][1]


def all_reduce_seconds(devices: int, size: float, link: Link) -> float:
  """The time for an all-reduce, after which every device has the sum over all devices.

  Args:
    devices: the number of devices.
    size: the bytes that each device contributes.
    link: the link of each device.
  """
  messages = 2 * (devices - 1).bit_length()
  return 2 * (devices - 1) / devices * size / link.bytes_per_second + messages * link.latency


def efficiency(tasks: int, devices: int, task_seconds: float, reduce_seconds: float) -> float:
  """The time that one device needs for all tasks, divided by the summed time of all devices.

  Args:
    tasks: the number of tasks in a meta-step.
    devices: the number of devices.
    task_seconds: the time that a device needs for one task.
    reduce_seconds: the time of the all-reduce.
  """
  alone = tasks * task_seconds
  return alone / (devices * (-(-tasks // devices) * task_seconds + reduce_seconds))


def records(name: str, case: Case, links: list[float], devices: list[int]) -> list[dict[str, Any]]:
  """The results of a workload, one row for each link."""
  compiled_for = case._replace(meta_batch=_TASKS_EACH * len(jax.devices()))
  program = cases.compile_case(compiled_for, judge=False)
  text = program.compiled.as_text() or ""
  size, task_flops = all_reduce_bytes(text), program.flops / compiled_for.meta_batch
  params = jax.eval_shape(cases.network(case.model, "xla").model.init, jax.random.key(0))
  shared = {
    "workload": name,
    **case._asdict(),
    "parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
    "collectives": collectives(text),
    "flops_per_task": task_flops,
    "latency_us": FLAGS.latency_us,
    "tflops": FLAGS.tflops,
  }
  seconds, tasks, rows = task_flops / (1e12 * FLAGS.tflops), case.meta_batch, []
  for gigabytes in links:
    link = Link(1e9 * gigabytes, 1e-6 * FLAGS.latency_us)
    reduce = {n: all_reduce_seconds(n, size, link) for n in devices}
    weak = {n: efficiency(n * tasks, n, seconds, time) for n, time in reduce.items()}
    strong = {n: efficiency(tasks, n, seconds, time) for n, time in reduce.items()}
    rows.append(shared | {"link_gigabytes_per_second": gigabytes, "weak": weak, "strong": strong})
  return rows


def markdown(rows: list[dict[str, Any]]) -> str:
  devices = list(rows[0]["weak"])
  head = ["workload", "T", "GFLOP", "parameters (kB)", "all-reduce (kB)", "FLOP/byte", "GB/s"]
  head += [f"{kind}, {n}" for kind in ("weak", "strong") for n in devices]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for row in rows:
    flops, size = row["flops_per_task"] * row["meta_batch"], row["collectives"][0][1]
    cells = [row["workload"], str(row["meta_batch"]), f"{flops / 1e9:.3g}"]
    cells += [f"{row['parameter_bytes'] / 1e3:.2f}", f"{size / 1e3:.2f}", f"{flops / size:.0f}"]
    cells += [f"{row['link_gigabytes_per_second']:g}"]
    cells += [f"{row[kind][n]:.3f}" for kind in ("weak", "strong") for n in devices]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  cases.check_flags(argv)
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_platforms", "cpu")
  metajax.cores_as_devices(FLAGS.cpu_devices)
  links, devices = list(map(float, FLAGS.link_gbps)), list(map(int, FLAGS.devices))
  rows = [row for name in FLAGS.workloads for row in records(name, WORKLOADS[name], links, devices)]
  machine = cases.machine()
  versions = ", ".join(f"{name} {value}" for name, value in machine.items())
  print(f"{versions}; {FLAGS.tflops:g} TFLOP/s a device, {FLAGS.latency_us:g} us a message\n")
  print(markdown(rows))
  if FLAGS.out:
    with Path(FLAGS.out).open("a") as file:
      file.writelines(json.dumps(row | machine) + "\n" for row in rows)


def define_flags() -> None:
  """Defines the flags of the program.

  Importing this module defines none, since the importing program may have flags of the same names.
  """
  flags.DEFINE_list("workloads", list(WORKLOADS), f"Workloads: any of {', '.join(WORKLOADS)}.")
  flags.DEFINE_list(
    "link_gbps",
    ["450", "50", "1.25"],
    "Bandwidths of a device's link in one direction, in gigabytes (not gigabits) per second.",
  )
  flags.DEFINE_float("latency_us", 5.0, "Latency of a message in microseconds.", lower_bound=0.0)
  flags.DEFINE_float("tflops", 10.0, "TFLOP/s that a device sustains.", lower_bound=1e-9)
  flags.DEFINE_list("devices", ["8", "64", "512"], "Numbers of devices to predict for.")
  flags.DEFINE_integer("cpu_devices", 4, "CPU devices to compile the program for.", lower_bound=2)
  flags.DEFINE_string("out", None, "File to which the results are appended as JSON lines.")
  of_lists: dict[str, tuple[Callable[[str], bool], str]] = {
    "workloads": (WORKLOADS.__contains__, f"any of {', '.join(WORKLOADS)}"),
    "link_gbps": (lambda n: bool(re.fullmatch(r"\d*\.?\d+", n)) and float(n) > 0, "above 0"),
    "devices": (lambda n: n.isdigit() and int(n) > 0, "whole numbers from 1"),
  }
  for name, (fits, words) in of_lists.items():
    flags.register_validator(
      name,
      lambda given, fits=fits: bool(given) and all(map(fits, given)),
      f"must be {words}, separated by commas",
    )


if __name__ == "__main__":
  define_flags()
  app.run(main)
