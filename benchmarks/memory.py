"""Temporary memory of the compiled programs against the number of inner steps; nothing is run.

  python -m benchmarks.memory --inner_steps=1,10,100

First-order meta-gradients need the same memory for any number of steps k; MAML stores data from
every step. The flags are those of `benchmarks.wall_clock`, with different defaults.
"""

from collections.abc import Sequence

from absl import app, flags

from benchmarks import cases, wall_clock

FLAGS = flags.FLAGS
FLAGS.set_default("algorithms", ["reptile", "fomaml", "maml", "maml_reverse", "maml_remat"])
FLAGS.set_default("inner_steps", ["1", "2", "5", "10", "20", "50", "100"])
FLAGS.set_default("meta_batch", ["1"])
FLAGS.set_default("optimizer", "sgd")


def main(argv: Sequence[str]) -> None:
  cases.check_flags(argv, "out", "baseline", "plots", "errors", "repeats")
  wall_clock.set_up()
  programs = [cases.compile_case(case, judge=False) for case in wall_clock.cases_from_flags()]
  rows: dict[tuple, dict[int, int]] = {}
  for program in programs:
    case = program.case
    name = (case.algorithm, case.model, case.meta_batch, case.execution, case.convolution)
    rows.setdefault(name, {})[case.inner_steps] = program.temporary_bytes
  steps = sorted({k for row in rows.values() for k in row})
  machine = ", ".join(f"{name} {value}" for name, value in cases.machine().items())
  print(f"{machine}; temporary megabytes\n")
  head = ["algorithm", "model", "meta_batch", "execution", "convolution"]
  print("| " + " | ".join(head + [f"k = {k}" for k in steps]) + " |")
  print("|" + "---|" * (len(head) + len(steps)))
  for name, row in rows.items():
    cells = [*map(str, name), *(f"{row[k] / 1e6:.1f}" for k in steps)]
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
  app.run(main)
