import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import cases, scaling

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--inner_steps=2", "--meta_batch=3", "--batch=2", "--cpu_devices=2"]


def run(module, *arguments):
  """In a process of its own: flag names of different binaries collide."""
  command = [sys.executable, "-m", f"benchmarks.{module}", *SMALL, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


FOMAML_SGD = ["--algorithms=fomaml", "--optimizer=sgd"]
CASES = [
  ["--model=sine", f"--execution={','.join(cases.EXECUTIONS)}", *FOMAML_SGD, "--inner_steps=1,2"],
  ["--model=sine", f"--algorithms={','.join(cases.ALGORITHMS)}", "--execution=sharded"],
  ["--model=omniglot,omniglot_pool,mini_imagenet", *FOMAML_SGD, "--inner_steps=1"],
  ["--model=omniglot", "--algorithms=reptile", "--convolution=patches,xla", "--tail=3"],
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:2]))
def test_wall_clock(case, tmp_path):
  out = tmp_path / "new" / "rows.jsonl"
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
  against_steps = ["memory_against_inner_steps", "time_against_inner_steps"]
  plots = against_steps if "--inner_steps=1,2" in case else []  # of what varies
  assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == plots

  if case is CASES[0]:
    again = run("wall_clock", *case, "--execution=vmap", "--repeats=1", f"--baseline={out}")
    assert again.returncode == 0, again.stderr
    table = again.stdout.splitlines()
    assert table[2].endswith("speed-up |") and float(table[4].split("|")[-2]) > 0


def test_the_loader_is_compared_with_data_on_the_device():
  pytest.importorskip("grain", reason="the grain extra is not installed")
  small = ["--images=400", "--steps=2", "--repeats=1", "--filters=2"]
  command = [sys.executable, "-m", "benchmarks.loader", *small]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
  assert [row[0].strip() for row in rows] == ["data", "device", "host_tasks", "host_episodes"]
  assert all(float(rate) > 0 for row in rows[1:] for rate in row[1:])


def test_memory_of_first_order_is_flat_in_the_number_of_steps():
  done = run("memory", "--model=sine", "--inner_steps=3,30")
  assert done.returncode == 0, done.stderr
  cells = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
  megabytes = {row[0].strip(): [float(cell) for cell in row[-2:]] for row in cells[1:]}
  assert set(megabytes) == {"reptile", "fomaml", "maml", "maml_reverse", "maml_remat"}
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


def test_scaling_prints_a_row_for_each_link(tmp_path):
  out = tmp_path / "rows.jsonl"
  command = [sys.executable, "-m", "benchmarks.scaling", "--workloads=sine_maml"]
  flags = ["--link_gbps=50,.5", "--devices=1,8", f"--out={out}", "--cpu_devices=2"]
  done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(rows) == done.stdout.count("\n| ") - 1 == 2
  for row in rows:
    assert row["parameter_bytes"] == 4 * (80 + 41 * 40 + 41)
    assert row["collectives"] == [["all-reduce", row["parameter_bytes"] + 4 * 2]]  # and 2 losses
    assert row["weak"]["1"] == row["strong"]["1"] == 1
    assert 1 > row["weak"]["8"] > row["strong"]["8"] > 0
  assert rows[0]["weak"]["8"] > rows[1]["weak"]["8"]
  for wrong in ("--workloads=cosine", "--link_gbps=-1", "--out=/dev/null/rows", "--out=tests"):
    done = subprocess.run([*command, wrong], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and wrong[2:9] in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("program", "wrong", "message"),
  [
    ("layers", "--out=rows", "layers: --out is of no use here: leave it out"),
    ("memory", "--repeats=3", "memory: --repeats is of no use here: leave it out"),
    ("peers", "--optimizer=sgd", "peers: --optimizer is of no use here: leave it out"),
    ("loader", "10", "loader: unexpected argument '10': flags start with --"),
  ],
)
def test_a_flag_that_a_program_does_not_use_is_refused(program, wrong, message):
  command = [sys.executable, "-m", f"benchmarks.{program}", wrong]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)


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
  ("flags", "said"),
  [
    (["--algorithms=maml,evaluation"], "--algorithms=evaluation has no gradient to compare"),
    (["--algorithms=reptile", "--execution=serial"], "--execution=serial hands Adam's state from"),
  ],
)
def test_peers_refuse_what_cannot_be_compared(flags, said):
  done = run("peers", *flags)
  assert done.returncode == 1
  assert done.stderr.startswith(f"peers: {said}")


WRONG_FLAGS = """
import contextlib, io, json, sys
from absl import app, flags
from benchmarks import wall_clock

said = []
for wrong in sys.argv[1:]:
  flags.FLAGS.unparse_flags()
  with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.redirect_stdout(text):
    try:
      app.run(wall_clock.main, ["wall_clock", wrong])
    except SystemExit as stopped:
      assert stopped.code not in (0, None), wrong
      said.append(f"{text.getvalue()} {stopped}")
print(json.dumps(said))
"""


def test_bad_flags_end_in_one_line():
  words = {
    "--algorithms=mamml": "must be any of reptile",
    "--inner_steps=0": "whole numbers from 1",
    "--baseline=/nowhere.jsonl": "No such file",
    "reptile": "flags start with --",
  }
  command = [sys.executable, "-c", WRONG_FLAGS, *words]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  for said, expected in zip(json.loads(done.stdout), words.values(), strict=True):
    assert expected in said and "Traceback" not in said


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


SHARDED = cases.Case("reptile", "sine", 3, 8, "sharded", "cpu", 4, 6, "sgd", 1)


@pytest.mark.parametrize(
  ("algorithm", "chunk"),
  [("reptile", 1), ("reptile", 2), ("fomaml", 1), ("maml", 1), ("maml_reverse", 1)],
)
def test_scaling_sends_the_gradient_and_the_losses_once_and_no_task_data(algorithm, chunk):
  program = cases.compile_case(SHARDED._replace(algorithm=algorithm, chunk=chunk), judge=False)
  params = jax.eval_shape(cases.network("sine", None).model.init, jax.random.key(0))
  numbers = sum(leaf.size for leaf in jax.tree.leaves(params)) + SHARDED.inner_steps
  text = program.compiled.as_text()
  assert scaling.collectives(text) == [("all-reduce", 4 * numbers)]
  assert scaling.all_reduce_bytes(text) == 4 * numbers


def test_scaling_would_see_a_gather_and_a_sum_in_a_loop():
  mesh = jax.make_mesh((4,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(np.ones((8, 3), np.float32), jax.NamedSharding(mesh, jax.P("tasks")))

  def text(function, out_specs):
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=jax.P("tasks"), out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped).lower(spread).compile().as_text()

  gather = text(lambda rows: jax.lax.all_gather(rows, "tasks", tiled=True), jax.P())
  assert scaling.collectives(gather) == [("all-gather", 4 * 8 * 3)]
  add = lambda total, row: (jax.lax.psum(total + row, "tasks"), None)
  loop = text(lambda rows: jax.lax.scan(add, rows[0], rows)[0], jax.P())
  assert scaling.collectives(loop) == [("all-reduce", 4 * 3)]
  for program in (gather, loop, text(lambda rows: rows, jax.P("tasks"))):
    with pytest.raises(ValueError, match="one all-reduce a meta-step"):
      scaling.all_reduce_bytes(program)


def test_scaling_reads_tuples_and_narrow_numbers():
  text = """
    %a.1 = (f32[3,4]{1,0}, /*index=1*/bf16[5]{0}, pred[], s4[6]) all-reduce(%x, %y), channel_id=1
    %b = f32[7]{0} get-tuple-element(%all-reduce.1), index=0, metadata={op_name="psum"}
    ROOT %c = u8[2,0]{1,0:T(8,128)} all-gather-start(%z), dimensions={0}
    %d = u8[9]{0} all-gather-done(%c)"""
  assert scaling.collectives(text) == [("all-reduce", 48 + 10 + 1 + 3), ("all-gather", 0)]


@pytest.mark.parametrize(
  ("algorithm", "model", "low", "high"),
  [("maml_reverse", "omniglot", 1.0, 1.1), ("reptile", "sine", 1.0, 1.4)],
)
def test_scaling_counts_the_work_as_xla_does_where_it_can(algorithm, model, low, high):
  """XLA counts a loop's body once, so up to k = 2; the rest is linear in k. It counts elementwise
  operations, too, and what `maml` computes a second time."""
  small = SHARDED._replace(algorithm=algorithm, model=model, meta_batch=4, batch=10, tail=10)
  counts = []
  for k in (1, 2):
    program = cases.compile_case(small._replace(inner_steps=k), judge=False)
    counts.append((program.compiled.cost_analysis()["flops"], program.flops / 4))
  (xla_one, one), (xla_two, two) = counts
  assert low < xla_one / one < high
  assert low < (xla_two - xla_one) / (two - one) < high
  forward = cases.network(model, None).flops
  for k in (1, 2, 7):
    linear = one + (k - 1) * (two - one)
    assert cases.step_flops(small._replace(inner_steps=k, meta_batch=1), forward) == linear


def test_scaling_follows_the_closed_forms_of_its_model():
  link, size, task = scaling.Link(1e9, 1e-6), 1e6, 1e-3
  assert scaling.all_reduce_seconds(1, size, link) == 0
  assert scaling.all_reduce_seconds(2, size, link) == pytest.approx(1e-3 + 2e-6)
  assert scaling.all_reduce_seconds(8, size, link) == pytest.approx(2 * 7 / 8 * 1e-3 + 6e-6)
  assert scaling.all_reduce_seconds(2**40, size, link) == pytest.approx(2e-3 + 80e-6)
  assert scaling.all_reduce_seconds(512, size, scaling.Link(math.inf, 0)) == 0

  def weak(n, link=link, tasks=4, task=task):
    return scaling.efficiency(n * tasks, n, task, scaling.all_reduce_seconds(n, size, link))

  assert weak(1) == scaling.efficiency(5, 1, task, 0) == 1
  assert weak(512, scaling.Link(math.inf, 0)) == 1
  assert weak(8) == pytest.approx(4e-3 / (4e-3 + 1.75e-3 + 6e-6))
  over_n = [weak(n) for n in range(1, 600)]
  assert all(b < a for a, b in itertools.pairwise(over_n))
  assert weak(64, tasks=8) > weak(64) < weak(64, task=2 * task)
  assert weak(64, scaling.Link(2e9, 1e-6)) > weak(64) < weak(64, scaling.Link(1e9, 5e-7))
  # Strong scaling without communication: only the tasks of the last round count.
  strong = [scaling.efficiency(5, n, task, 0) for n in (1, 2, 4, 5, 8, 512)]
  assert strong == pytest.approx([1, 5 / 6, 5 / 8, 1, 5 / 8, 5 / 512])
  assert scaling.efficiency(64, 64, task, 0.5 * task) == weak(
    64, scaling.Link(math.inf, 0.5 * task / 12), tasks=1
  )
