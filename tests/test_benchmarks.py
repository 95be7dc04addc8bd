import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import cases

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--inner_steps=2", "--meta_batch=3", "--batch=2", "--cpu_devices=2"]


def run(module, *arguments):
  """In a process of its own: flag names of different binaries collide."""
  command = [sys.executable, "-m", f"benchmarks.{module}", *SMALL, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


CASES = [
  ["--model=sine", f"--execution={','.join(cases.EXECUTIONS)}", "--optimizer=sgd"],
  ["--model=sine", f"--algorithms={','.join(cases.ALGORITHMS)}", "--execution=sharded"],
  ["--model=omniglot,omniglot_pool,mini_imagenet", "--algorithms=fomaml", "--inner_steps=1"],
  ["--model=omniglot", "--algorithms=reptile", "--convolution=patches,xla", "--tail=3"],
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:2]))
def test_wall_clock(case, tmp_path):
  out = tmp_path / "rows.jsonl"
  done = run("wall_clock", *case, "--repeats=2", f"--out={out}", f"--plots={tmp_path}/plots")
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(rows) == done.stdout.count("\n| ") - 1 >= 2
  for row in rows:
    assert 0 < row["run_p10"] <= row["run"] <= row["run_p90"]
    assert row["compile"] > 0 and 0 < row["fraction_of_matmul"] < 1
    assert row["device"].startswith("2 x") and row["commit"]
    judged = row["algorithm"] != "evaluation"
    assert row["gradient_error"] < 1e-3 if judged else row["gradient_error"] is None
  plots = ["memory_against_inner_steps", "time_against_inner_steps", "time_against_tasks"]
  assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == plots

  if case is CASES[0]:
    again = run("wall_clock", *case[:1], "--optimizer=sgd", "--repeats=1", f"--baseline={out}")
    assert again.returncode == 0, again.stderr
    table = again.stdout.splitlines()
    assert table[2].endswith("speed-up |") and float(table[4].split("|")[-2]) > 0


def test_memory_of_first_order_is_flat_in_the_number_of_steps():
  done = run("memory", "--model=sine", "--inner_steps=3,30")
  assert done.returncode == 0, done.stderr
  cells = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
  megabytes = {row[0].strip(): [float(cell) for cell in row[-2:]] for row in cells[1:]}
  assert set(megabytes) == {"reptile", "fomaml", "maml", "maml_remat", "maml_mixed_mode"}
  for algorithm in ("reptile", "fomaml"):
    assert megabytes[algorithm][1] <= megabytes[algorithm][0] + 0.1
  assert megabytes["maml"][1] > 2 * megabytes["maml"][0]


def test_layers_add_up_the_products_of_a_gradient():
  done = run("layers", "--model=sine", "--algorithms=maml", "--repeats=1", "--tail=4")
  assert done.returncode == 0, done.stderr
  rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
  work = 0  # a task's, from the table; the first layer has no gradient by its inputs
  for row in rows:
    work += 2 * math.prod(map(int, row[1].split("x"))) * int(row[2])
    assert float(row[3]) > 0
  forward = cases.network("sine", None).flops
  saved = 2 * 40 * (2 * 3 + 4)
  assert work == 3 * forward * (2 * 3 + 4) - saved
  assert "its products alone" in done.stdout


def test_peers_compute_the_same_gradient():
  pytest.importorskip("torch", reason="the bench extra is not installed")
  for model in ("sine", "omniglot"):
    algorithms = f"--algorithms={'reptile,fomaml,maml' if model == 'sine' else 'maml'}"
    peers = "--peers=torch.func loop,torch.func vmap"
    done = run("peers", f"--model={model}", algorithms, "--repeats=1", peers)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| torch")]
    assert len(rows) == (6 if model == "sine" else 2)
    assert all(float(row[-2]) < 1e-3 for row in rows)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--algorithms=mamml"], "must be any of reptile"),
    (["--inner_steps=0"], "whole numbers from 1"),
    (["--baseline=/nowhere.jsonl"], "No such file"),
    (["reptile"], "flags start with --"),
  ],
)
def test_bad_flags_end_in_one_line(arguments, words):
  done = run("wall_clock", *arguments)
  assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def case(**changes):
  plain = cases.Case("maml", "omniglot", 6, 32, "vmap", "patches", 5, 75, "sgd", 1)
  return plain._replace(**changes)


def test_the_count_of_work():
  """5.31 MFLOP forward an Omniglot image; 76 GFLOP a MAML step of 32 tasks: 5 x 5, then 75."""
  forward = cases.network("omniglot", "patches").flops
  by_hand = 2 * (196 * 9 * 64 + 49 * 576 * 64 + 16 * 576 * 64 + 4 * 576 * 64 + 256 * 5)
  assert forward == by_hand == 5_315_584
  assert cases.step_flops(case(), forward) == pytest.approx(76.5e9, rel=0.01)
  assert cases.step_flops(case(algorithm="fomaml"), forward) == pytest.approx(51e9, rel=0.01)
  reptile = case(algorithm="reptile", inner_steps=5, meta_batch=5, batch=10, tail=10)
  assert cases.step_flops(reptile, forward) == pytest.approx(3.99e9, rel=0.01)
  evaluation = case(algorithm="evaluation", inner_steps=50, meta_batch=1, tail=5)
  assert cases.step_flops(evaluation, forward) == pytest.approx(50 * 5 * 3 * forward, rel=0.01)


def test_the_plain_loop_notices_a_wrong_gradient():
  small = case(model="sine", inner_steps=3, meta_batch=2, batch=4, tail=6)
  params = jax.jit(cases.network("sine", None).model.init)(jax.random.key(0))
  exact = cases.plain_gradient(small, params, cases.random_episodes(small, (1,)))
  first_order = cases.plain_gradient(
    small._replace(algorithm="fomaml"), params, cases.random_episodes(small, (1,))
  )
  assert cases.compile_case(small).gradient_error < 1e-5
  assert cases.relative_error(first_order, exact) > 1e-3
