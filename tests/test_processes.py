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


def start(number, this, devices, address):
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, address, str(number), str(this), str(devices)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def outcome(number, devices):
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
  processes = [start(number, this, devices, address) for this in range(number)]
  ended = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0] * number, ended[0][1]
  return json.loads(ended[0][0].splitlines()[-1])


def test_the_run_is_the_same_on_one_and_eight_devices_of_one_and_two_processes():
  one, eight, in_two = outcome(1, 1), outcome(1, 8), outcome(2, 4)
  for other in (eight, in_two):
    for ours, expected in zip(other, one, strict=True):
      np.testing.assert_allclose(ours, expected, rtol=1e-5)
