"""Two real processes on one host: the same tasks and the same gradients as one process has."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, sys
import jax, numpy as np, optax
address, number, this, devices = sys.argv[1], *map(int, sys.argv[2:])
jax.config.update("jax_num_cpu_devices", devices)
if number > 1:
  jax.distributed.initialize(address, number, this)
import metajax
from tests import problems, test_execution

mesh = metajax.task_mesh()
assert mesh.size == number * devices
gradient = metajax.reptile(problems.softmax_loss(), optax.sgd(0.02))
learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.sharded(5, mesh))
params, key = metajax.programs.on_mesh((np.asarray(problems.weights()), jax.random.key(0)), mesh)
state = metajax.programs.on_mesh(learner.init(params), mesh)
many_steps = metajax.run(learner, *test_execution.source(mesh), 10)
state, infos = jax.jit(many_steps)(state, key)
if this == 0:
  print(json.dumps([np.asarray(leaf).tolist() for leaf in (state.params, infos.losses)]))
"""


TRAINING = """
import json, sys, time
from pathlib import Path
import jax, numpy as np, optax
address, number, this, folder = sys.argv[1], *map(int, sys.argv[2:4]), Path(sys.argv[5])
jax.distributed.initialize(address, number, this)
import metajax

model = metajax.models.mlp(3, 2, hidden=(4,))
loss = metajax.losses.cross_entropy(model.apply, reduction="mean")
learner = metajax.meta_learner(
  metajax.reptile(loss, optax.sgd(0.1)), optax.sgd(1.0), metajax.vmapped(2)
)
sample_task = metajax.data.few_shot.sample_task(
  metajax.data.from_arrays(np.arange(60, dtype=np.float32).reshape(20, 3) / 60, np.arange(20) % 4),
  ways=2, train_shots=2, test_shots=1,
)
start, key = learner.init(model.init(jax.random.key(0))), jax.random.key(1)

def train(num_steps, **options):
  def report(record):
    if this == 0:
      time.sleep(1)  # as if it drew a picture
    return record.step

  return metajax.train(
    learner, sample_task, metajax.shared_tail(metajax.cycling(2, 2)), start, key,
    num_steps=num_steps, report=report, folder=folder / "checkpoints", **options,
  )

record = train(2)
with metajax.checkpoint.checkpoints(folder / "checkpoints") as saved:
  best = int(saved.best(record.state).state.step)
metajax.save(
  folder / "learner.safetensors", learner, record.state, model,
  example_inputs=np.zeros((1, 3), np.float32), steps=2, batch_size=2,
  inner_optimizer={"name": "sgd", "learning_rate": 0.1},
  loss={"name": "cross_entropy", "reduction": "mean"},
)
learned = metajax.load(folder / "learner.safetensors")
size = sum(leaf.size for leaf in jax.tree.leaves(learned.params))
try:
  train(8, steps_per_call=1, should_stop=lambda: this == 0)
except metajax.training.StoppedError as error:
  stopped = str(error).split(",")[0]
print(json.dumps([best, size, stopped]))
"""


def start(number, this, devices, address, program=PROGRAM, *arguments):
  return subprocess.Popen(
    [sys.executable, "-c", program, address, str(number), str(this), str(devices), *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def outcomes(number, devices, *program):
  """What each of several processes printed last."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
  processes = [start(number, this, devices, address, *program) for this in range(number)]
  ended = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0] * number, ended[0][1]
  return [out.splitlines()[-1] for out, _ in ended if out]


def outcome(number, devices):
  return json.loads(outcomes(number, devices)[0])


def test_the_run_is_the_same_on_one_and_eight_devices_of_one_and_two_processes():
  one, eight, in_two = outcome(1, 1), outcome(1, 8), outcome(2, 4)
  for other in (eight, in_two):
    for ours, expected in zip(other, one, strict=True):
      np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_two_processes_see_the_same_scores_and_files_and_stop_together(tmp_path):
  """What the first process does alone: it writes the files, reports slowly, and is told to stop."""
  first, second = outcomes(2, 1, TRAINING, str(tmp_path))
  assert first == second
  assert json.loads(first) == [2, 4 * 3 + 4 + 2 * 4 + 2, "stopped at meta-step 2"]
