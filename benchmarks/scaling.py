"""How a meta-step would scale to many devices, predicted from its compiled program: it never runs.

  python -m benchmarks.scaling --link_gbps=50 --tflops=10 --devices=8,64,512

The program of `metajax.sharded`, compiled for a few CPU devices, holds one collective operation, an
all-reduce of B bytes: the gradient and Info. The model, for n devices and c = FLOPs of a task /
rate of a device, FLOPs as `benchmarks.cases` counts them:

  all_reduce(n) = 2 (n - 1) / n * B / bandwidth + 2 ceil(log2(n)) * latency
  efficiency(n) = tasks * c / (n * (ceil(tasks / n) * c + all_reduce(n)))

The all-reduce is recursive halving, then doubling (Thakur et al. 2005), which passes on as few
bytes as a ring, in fewer messages. `weak`: each device has the T tasks of the workload, so tasks is
n T. `strong`: they share T tasks, and with n > T some wait. All devices are as fast, all links as
free, and nothing overlaps. What is no matrix product or convolution takes no time, nor do data,
launches, the additions themselves and the outer update.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

import metajax
from benchmarks import cases
from benchmarks.cases import Case

FLAGS = flags.FLAGS

_REPTILE = Case("reptile", "omniglot", 5, 5, "sharded", "patches", 10, 10, "adam", 1)
_MAML = Case("maml_mixed_mode", "omniglot", 6, 32, "sharded", "patches", 5, 75, "sgd", 1)
WORKLOADS = {  # as in the tables of `benchmarks/README.md`
  "omniglot_reptile": _REPTILE,
  "omniglot_fomaml": _MAML._replace(algorithm="fomaml"),
  "omniglot_maml": _MAML,
  "mini_imagenet_reptile": _REPTILE._replace(model="mini_imagenet", inner_steps=8),
  "sine_maml": Case("maml", "sine", 2, 25, "sharded", "patches", 10, 10, "sgd", 1),
}
_TASKS_EACH = 2  # in the compiled program: more than one, so that a loop could hold the all-reduce
_COLLECTIVE = re.compile(
  r" = (.*?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|"
  r"collective-permute|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Link(NamedTuple):
  """Of a device to the others, in one direction."""

  bytes_per_second: float
  latency: float  # seconds a message


def collectives(program_text: str) -> list[tuple[str, int]]:
  """The kind of each collective operation of a compiled program, and the bytes of its result."""
  return [
    (kind, sum(_bytes(*array.groups()) for array in _ARRAY.finditer(result)))
    for result, kind in _COLLECTIVE.findall(program_text)
  ]


def _bytes(bits: str | None, dimensions: str) -> int:
  return int(bits or 8) * math.prod(map(int, filter(None, dimensions.split(",")))) // 8


def all_reduce_bytes(program_text: str) -> int:
  """The size of the one all-reduce.

  Raises:
    ValueError: if there are other collective operations, or it is not once a meta-step.
  """
  found = collectives(program_text)
  once = collectives(program_text[program_text.index("ENTRY ") :])  # not in the body of a loop
  if [kind for kind, _ in found] != ["all-reduce"] or once != found:
    raise ValueError(f"the model is of one all-reduce a meta-step, the program has {found}")
  return found[0][1]


def all_reduce_seconds(devices: int, size: float, link: Link) -> float:
  """The time in which `devices` add `size` bytes each, and all have the sum."""
  messages = 2 * (devices - 1).bit_length()
  return 2 * (devices - 1) / devices * size / link.bytes_per_second + messages * link.latency


def efficiency(tasks: int, devices: int, task_seconds: float, reduce_seconds: float) -> float:
  """The time of one device for all tasks over that of all devices together."""
  alone = tasks * task_seconds
  return alone / (devices * (-(-tasks // devices) * task_seconds + reduce_seconds))


def records(name: str, case: Case, links: list[float], devices: list[int]) -> list[dict[str, Any]]:
  """A workload's rows, one a link."""
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
  if len(argv) > 1:
    sys.exit(f"scaling: unexpected argument {argv[1]!r}: flags start with --")
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
  """Only for the program itself: who imports the model may have flags of the same names."""
  flags.DEFINE_list("workloads", list(WORKLOADS), f"Any of {', '.join(WORKLOADS)}.")
  flags.DEFINE_list("link_gbps", ["450", "50", "1.25"], "Gigabytes (not bits) per second.")
  flags.DEFINE_float("latency_us", 5.0, "Of a message, in microseconds.", lower_bound=0.0)
  flags.DEFINE_float("tflops", 10.0, "What a device sustains.", lower_bound=1e-9)
  flags.DEFINE_list("devices", ["8", "64", "512"], "Numbers of devices to predict for.")
  flags.DEFINE_integer("cpu_devices", 4, "Devices to compile for.", lower_bound=2)
  flags.DEFINE_string("out", None, "File to append JSON lines to.")
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
