"""Real processes that are killed, stopped, lost or out of space: nothing that was saved is lost.

These take minutes: `pytest -m faults`.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import folders

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
  "--ways=3", "--eval_shots=1,2", "--train_shots=3", "--filters=2", "--inner_batch=3",
  "--inner_steps=2", "--meta_batch=2", "--meta_steps=200", "--eval_batch=3", "--eval_steps=2",
  "--eval_tasks=1000", "--eval_every=20", "--curve_tasks=25", "--steps_per_call=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """Programs compiled once for all runs."""
  return tmp_path_factory.mktemp("cache")


def start(cache, out, *flags):
  command = [sys.executable, "-m", "experiments.few_shot", f"--out={out}", *FLAGS, *flags]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {"METAJAX_CACHE": str(cache)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, timeout=600):
  """Exit code, standard output, and the lines of standard error that are no progress bars."""
  out, err = process.communicate(timeout=timeout)
  lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
  said = [line for line in lines if not re.search(r"\d+%", line)]
  out = re.sub(r"\[Gloo\].*\n", "", out)  # its greetings
  return process.returncode, out, said


def content(out):
  """All that a run leaves, without times and memory: parameters, metrics, results, tasks."""
  costs = re.compile("second|memory")
  timeless = lambda record: {name: v for name, v in record.items() if not costs.search(name)}
  step = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
  path = out / "checkpoints" / str(step) / "state"
  with ocp.PyTreeCheckpointer() as reader:  # as arrays of NumPy, wherever they were spread
    tree = reader.metadata(path).item_metadata.tree
    numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = reader.restore(path, ocp.args.PyTreeRestore(restore_args=numpy))
  leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
  metrics = [timeless(record) for record in folders.read_lines(out)]
  result = timeless(json.loads((out / "result.json").read_text()))
  return step, leaves, metrics, result, (out / "test_tasks.jsonl").read_text()


def check_lines(out):
  """Whatever happened, every line is whole and none is there twice."""
  for name, key in (("metrics.jsonl", "step"), ("test_tasks.jsonl", ("shots", "first"))):
    if not (out / name).exists():
      continue
    text = (out / name).read_text()
    assert not text or text.endswith("\n")
    records = [json.loads(line) for line in text.splitlines()]
    keys = [
      record[key] if isinstance(key, str) else tuple(map(record.get, key)) for record in records
    ]
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
  """An uninterrupted run, and how long it took once its programs were compiled."""
  first = tmp_path_factory.mktemp("runs") / "first"
  assert finish(start(cache, first))[0] == 0
  began, second = time.monotonic(), first.with_name("second")
  assert finish(start(cache, second))[0] == 0
  seconds = time.monotonic() - began
  assert content(first) == content(second)
  return content(second), seconds


def lines(name):
  return lambda out: (out / name).stat().st_size if (out / name).exists() else 0


def unfinished(out):
  return {path.name for path in (out / "checkpoints").glob("*tmp*")}


# What must have changed since the start, and by which part of the run's time to kill after that.
MOMENTS = {
  "compiling": (
    lambda out: (out / "flags.txt").exists() and (out / "flags.txt").stat().st_mtime,
    0.2,
  ),
  "training": (lines("metrics.jsonl"), 0.1),
  "judging": (lines("test_tasks.jsonl"), 0.002),
  "saving": (unfinished, 0.002),
}


def wait_for(moment, process, out, before, seconds=300):
  """Until what the moment is told by is another than before, and is there."""
  began = time.monotonic()
  while (now := moment(out)) == before or not now:
    assert process.poll() is None and time.monotonic() - began < seconds
    time.sleep(0.0005)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_five_times_ends_as_if_it_had_not_been(moment, cache, whole, tmp_path):
  expected, seconds = whole
  tell, part = MOMENTS[moment]
  chance, out = random.Random(moment), tmp_path / "run"
  for kills in range(5):
    before = tell(out)
    process = start(cache, out)
    while ((now := tell(out)) == before or not now) and process.poll() is None:
      time.sleep(0.0005)
    time.sleep(chance.uniform(0, part * seconds))
    process.kill()
    code, _, _ = finish(process)
    check_lines(out)
    if code == 0:  # on a slow machine, what is left may be little
      assert kills > 1
      break
    assert code == -signal.SIGKILL
  assert finish(start(cache, out))[0] == 0
  check_lines(out)
  assert content(out) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["training", "judging"])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
  number, moment, cache, whole, tmp_path
):
  out = tmp_path / "run"
  process = start(cache, out)
  wait_for(MOMENTS[moment][0], process, out, None)
  process.send_signal(number)
  code, _, said = finish(process)
  assert code == 128 + number
  assert said[-1].startswith("few_shot: stopped at ") and "the same command goes on" in said[-1]
  assert len(said) == 2 and said[0].startswith("stopping as soon as possible; press Ctrl-C")
  stopped_at = re.search(r"meta-step (\d+)", said[-1])
  code, text, _ = finish(start(cache, out))
  assert code == 0
  if stopped_at and int(stopped_at[1]) > 0:
    assert f"going on from meta-step {stopped_at[1]} of {out}" in text
  assert content(out) == whole[0]


@pytest.mark.parametrize("damage", ["truncated", "bit flipped"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(damage, cache, whole, tmp_path):
  out = tmp_path / "run"
  process = start(cache, out)
  wait_for(lambda out: len(folders.read_lines(out)) >= 6, process, out, False)
  process.kill()
  finish(process)
  saved = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
  newest = out / "checkpoints" / str(saved[-1])
  data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda f: f.stat().st_size)
  raw = bytearray(data.read_bytes())
  if damage == "truncated":
    raw = raw[: len(raw) // 2]
  else:
    raw[len(raw) // 2] ^= 4
  data.write_bytes(raw)
  code, text, said = finish(start(cache, out))
  assert code == 0
  assert any(f"checkpoint {saved[-1]} of" in line and "damaged" in line for line in said)
  assert f"going on from meta-step {saved[-2]} of" in text
  assert content(out) == whole[0]


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_space(
  cache, whole, tmp_path
):
  small = tmp_path / "small"
  small.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("a small file system cannot be mounted here")
  out = small / "run"
  process = start(cache, out)
  try:
    wait_for(lambda out: (out / "checkpoints" / "40").exists(), process, out, False)
    with (
      pytest.raises(OSError, match="No space"),
      (small / "filler").open("wb", buffering=0) as filler,
    ):
      while True:
        filler.write(bytes(4096))
    code, _, said = finish(process)
    assert code == 1
    assert said[-1].startswith("few_shot: ") and len(said) == 1
    assert "No space left" in said[-1] or "could not be written" in said[-1]
    check_lines(out)
    assert any(path.name.isdigit() for path in (out / "checkpoints").iterdir())
    (small / "filler").unlink()
    code, text, _ = finish(start(cache, out))
    assert code == 0 and "going on from meta-step" in text
    assert content(out) == whole[0]
  finally:
    process.kill()
    subprocess.run(["umount", str(small)], check=True)


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start_all(cache, out, number, *flags):
  address = f"127.0.0.1:{free_port()}"
  together = (f"--coordinator_address={address}", f"--num_processes={number}", "--meta_batch=4")
  few = ("--meta_steps=40", "--eval_tasks=100")
  return [
    start(cache, out, *together, *few, f"--process_id={this}", *flags) for this in range(number)
  ]


def test_ctrl_c_saves_though_the_pipe_is_gone(cache, whole, tmp_path):
  """As in `few_shot 2>&1 | tee log`, where the same Ctrl-C ends tee."""
  out = tmp_path / "run"
  process = start(cache, out)
  wait_for(lambda out: (out / "checkpoints" / "20").exists(), process, out, False)
  process.stdout.close()
  process.stderr.close()
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=300) == 128 + signal.SIGINT
  code, text, _ = finish(start(cache, out))
  assert code == 0 and "going on from meta-step" in text
  assert content(out) == whole[0]


def test_what_is_wrong_with_one_process_ends_all(cache, tmp_path):
  """Another run holds the folder's lock, which the first process alone asks for."""
  out = tmp_path / "run"
  out.mkdir()
  with folders.alone(out):
    ended = [finish(one, timeout=300) for one in start_all(cache, out, 2)]
  assert all(code != 0 for code, _, _ in ended)
  assert any("another process is writing in" in line for line in ended[0][2])


def test_two_and_four_processes_end_as_one_does(cache, tmp_path):
  """SGD inside, so that rounding stays rounding: the devices add in another order."""
  sgd = ("--inner_optimizer=sgd", "--inner_rate=0.01")
  few = ("--meta_batch=4", "--meta_steps=40", "--eval_tasks=100")
  assert finish(start(cache, tmp_path / "1", *sgd, *few))[0] == 0
  found = {1: content(tmp_path / "1")}
  for number in (2, 4):
    ended = [finish(one) for one in start_all(cache, tmp_path / str(number), number, *sgd)]
    assert [code for code, _, _ in ended] == [0] * number
    assert "accuracy over" in ended[0][1]
    assert all(out == "" for _, out, _ in ended[1:])  # one process speaks
    found[number] = content(tmp_path / str(number))
  for number in (2, 4):
    for ours, one in zip(found[number][1], found[1][1], strict=True):
      np.testing.assert_allclose(
        np.frombuffer(ours, np.float32), np.frombuffer(one, np.float32), rtol=1e-3, atol=1e-5
      )


@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_of_two_processes_is_killed_the_other_ends_and_both_resume(victim, cache, tmp_path):
  expected = tmp_path / "expected"
  assert [finish(one)[0] for one in start_all(cache, expected, 2)] == [0, 0]
  out = tmp_path / "run"
  both = start_all(cache, out, 2)
  wait_for(lambda out: (out / "checkpoints" / "20").exists(), both[0], out, False)
  both[victim].kill()
  began = time.monotonic()
  code, _, said = finish(both[1 - victim], timeout=200)
  print(f"the other one ended after {time.monotonic() - began:.1f} s, code {code}: {said}")
  finish(both[victim])
  assert code != 0 and said
  check_lines(out)
  assert [finish(one)[0] for one in start_all(cache, out, 2)] == [0, 0]
  assert content(out) == content(expected)
