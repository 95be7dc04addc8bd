"""Times whole meta-steps and evaluations for all combinations of the settings in the flags.

  python -m benchmarks.wall_clock --algorithms=reptile,maml --inner_steps=5,10 --out=FILE.jsonl

Lowering, compiling and running are timed separately. All cases take turns in every round, so drift
in machine speed affects them equally. A float32 matrix multiplication takes turns with them:
`of matmul` is the model FLOP/s of a case, counted as in `benchmarks.cases`, as a fraction of the
FLOP/s of that multiplication. `error` is the relative error of the gradient of one task, compared
with plain loops in float64.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported, as no screen is needed

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging
from matplotlib.ticker import LogFormatter

import metajax
from benchmarks import cases
from benchmarks.cases import Case, Program

flags.DEFINE_list("algorithms", ["reptile"], f"Algorithms: any of {', '.join(cases.ALGORITHMS)}.")
flags.DEFINE_list("model", ["omniglot"], f"Networks: any of {', '.join(cases.MODELS)}.")
flags.DEFINE_list("inner_steps", ["5"], "Numbers k of losses in an episode, counting the tail's.")
flags.DEFINE_list("meta_batch", ["5"], "Numbers of tasks in a meta-step.")
flags.DEFINE_list(
  "execution", ["vmap"], f"How the tasks are run: any of {', '.join(cases.EXECUTIONS)}."
)
flags.DEFINE_list(
  "convolution", ["cpu"], "Implementations of convolution: any of cpu, patches, xla."
)
flags.DEFINE_integer("batch", 10, "Examples in an inner minibatch.", lower_bound=1)
flags.DEFINE_integer(
  "tail", None, "Examples in the last minibatch; by default the same as --batch.", lower_bound=1
)
flags.DEFINE_enum("optimizer", "adam", ["adam", "sgd"], "Inner optimizer; MAML always uses SGD.")
flags.DEFINE_integer(
  "chunk",
  1,
  "Tasks that run together with --execution=chunked, and on each device with sharded.",
  lower_bound=1,
)
flags.DEFINE_integer("repeats", 10, "Rounds in which every case runs once.", lower_bound=1)
flags.DEFINE_integer(
  "cpu_devices", None, "Number of CPU devices; by default one for each core.", lower_bound=1
)
flags.DEFINE_bool("errors", True, "Compare the gradients with those of plain loops in float64.")
flags.DEFINE_string("out", None, "File to which the results are appended as JSON lines.")
flags.DEFINE_string(
  "baseline", None, "File that an earlier run wrote with --out, to print the speed-up over it."
)
flags.DEFINE_string("plots", None, "Folder for plots of time and memory.")
FLAGS = flags.FLAGS


def _one_of(name: str, choices: tuple[str, ...]) -> None:
  message = f"must be any of {', '.join(choices)}, separated by commas"
  flags.register_validator(name, lambda given: bool(given) and set(given) <= {*choices}, message)


_one_of("algorithms", cases.ALGORITHMS)
_one_of("model", cases.MODELS)
_one_of("execution", cases.EXECUTIONS)
_one_of("convolution", ("cpu", "patches", "xla"))
for _name in ("inner_steps", "meta_batch"):
  flags.register_validator(
    _name,
    lambda given: bool(given) and all(n.isdigit() and int(n) > 0 for n in given),
    "must be whole numbers from 1, separated by commas",
  )


def set_up() -> None:
  """Sets the log level, and makes each CPU core a device that runs its own tasks.

  Call this before anything is computed.
  """
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  metajax.cores_as_devices(FLAGS.cpu_devices)


def cases_from_flags() -> list[Case]:
  """All combinations of the values in the list flags."""
  lists = itertools.product(
    FLAGS.algorithms,
    FLAGS.model,
    map(int, FLAGS.inner_steps),
    map(int, FLAGS.meta_batch),
    FLAGS.execution,
    FLAGS.convolution,
  )
  rest = FLAGS.batch, FLAGS.tail or FLAGS.batch, FLAGS.optimizer, FLAGS.chunk
  chosen = [Case(*varied, *rest) for varied in lists]
  return [case._replace(optimizer=cases.inner_optimizer(case)) for case in chosen]


def main(argv: list[str]) -> None:
  cases.check_flags(argv)
  try:
    baseline = read(FLAGS.baseline) if FLAGS.baseline else []
  except (OSError, ValueError, KeyError) as error:
    sys.exit(
      f"wall_clock: --baseline={FLAGS.baseline} holds no JSON lines of this program: {error}"
    )
  set_up()
  programs = [cases.compile_case(case, judge=FLAGS.errors) for case in cases_from_flags()]
  products = cases.matrix_products()
  calls = [*(program.call for program in programs), *products.calls]
  seconds = cases.in_turns(calls, FLAGS.repeats)
  rate = products.rate(seconds[len(programs) :])
  machine = cases.machine()
  records = [
    record(program, times, rate) | machine
    for program, times in zip(programs, seconds[: len(programs)], strict=True)
  ]
  on_cpu = "cpu" in machine["device"]
  rounded = "" if on_cpu else ", rounded as by default on this backend"
  print(
    f"{', '.join(f'{name} {value}' for name, value in machine.items())}; "
    f"matrix multiplication {rate / 1e9:.0f} GFLOP/s (float32{rounded})\n"
  )
  print(markdown(records, baseline))
  if FLAGS.out:  # after printing, so that a failure to write loses no results
    with Path(FLAGS.out).open("a") as file:
      file.writelines(json.dumps(line) + "\n" for line in records)
  if FLAGS.plots:
    draw(records, Path(FLAGS.plots))


def record(program: Program, seconds: list[float], matmul_rate: float) -> dict[str, Any]:
  """The results of one case, with times in seconds."""
  low, median, high = np.percentile(seconds, (10, 50, 90))
  return {
    **program.case._asdict(),
    "lower": program.lower_seconds,
    "compile": program.compile_seconds,
    "run": float(median),
    "run_p10": float(low),
    "run_p90": float(high),
    "tasks_per_second": program.case.meta_batch / float(median),
    "meta_steps_per_second": 1 / float(median),
    "flops_per_second": program.flops / float(median),
    "matmul_flops_per_second": matmul_rate,
    "fraction_of_matmul": program.flops / float(median) / matmul_rate,
    "temporary_bytes": program.temporary_bytes,
    "gradient_error": program.gradient_error,
  }


def read(path: str) -> list[dict[str, Any]]:
  """Reads the records from a file that --out wrote."""
  records = [json.loads(line) for line in Path(path).read_text().splitlines()]
  for row in records:
    case_of(row)
  return records


def case_of(row: dict[str, Any]) -> Case:
  return Case(*(row[field] for field in Case._fields))


def markdown(records: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
  """The results as a Markdown table, with the speed-up over `baseline` unless that is empty."""
  before = {case_of(row): row["run"] for row in baseline}
  fields = Case._fields[:6]
  head = [
    *fields,
    "compile (s)",
    "run (ms)",
    "10-90 %",
    "tasks/s",
    "of matmul",
    "temp (MB)",
    "error",
  ]
  head += ["speed-up"] if baseline else []
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for row in records:
    error = row["gradient_error"]
    cells = [str(row[field]) for field in fields]
    cells += [
      f"{row['lower'] + row['compile']:.1f}",
      f"{1e3 * row['run']:.1f}",
      f"{1e3 * row['run_p10']:.1f}-{1e3 * row['run_p90']:.1f}",
      f"{row['tasks_per_second']:.1f}",
      f"{row['fraction_of_matmul']:.2f}",
      f"{row['temporary_bytes'] / 1e6:.0f}",
      "" if error is None else f"{error:.0e}",
    ]
    if baseline:
      earlier = before.get(case_of(row))
      cells.append("" if earlier is None else f"{earlier / row['run']:.2f}")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def draw(records: list[dict[str, Any]], folder: Path) -> None:
  """Plots time against k, time against the number of tasks, and memory against k.

  What does not vary is not drawn against. Each plot has one line for each combination of the other
  settings that vary.
  """
  folder.mkdir(parents=True, exist_ok=True)
  varied = [field for field in Case._fields if len({row[field] for row in records}) > 1]
  for name, x, y, label, unit in (
    ("time_against_inner_steps", "inner_steps", "run", "time of a meta-step (ms)", 1e3),
    ("time_against_tasks", "meta_batch", "run", "time of a meta-step (ms)", 1e3),
    ("memory_against_inner_steps", "inner_steps", "temporary_bytes", "temporary memory (MB)", 1e-6),
  ):
    if x not in varied:
      continue
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in records:
      named = [
        f"{row[field]}" if isinstance(row[field], str) else f"{field} {row[field]}"
        for field in varied
        if field != x
      ]
      lines.setdefault(", ".join(named), []).append((row[x], unit * row[y]))
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for line, points in lines.items():
      axes.plot(*zip(*sorted(points), strict=True), marker=".", label=line or None)
    axes.set(
      xscale="log",
      yscale="log",
      ylabel=label,
      xlabel={"inner_steps": "minibatches of a task, k", "meta_batch": "tasks of a meta-step"}[x],
    )
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(LogFormatter())
      axis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3, which="both")
    if any(lines):
      axes.legend(fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
  app.run(main)
