"""Meta-steps per second with data on the device, and with data that stays on the host.

  python -m benchmarks.loader --images=20000 --steps=20

Reptile on the paper's Omniglot network, 5 tasks of 5 classes, k = 5 minibatches of 10. The images
are random, in a memory-mapped file. `device` has them on the device; `host_tasks` fetches those of
a task when it is drawn, and `host_episodes` in background threads, some meta-steps ahead. The three
run in turns, and the table shows the median.
"""

import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import optax
from absl import app, flags

import metajax
from benchmarks import cases

flags.DEFINE_integer("images", 20_000, "Images of 28x28 in the data set.", lower_bound=100)
flags.DEFINE_integer("steps", 20, "Meta-steps of a measurement.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Rounds in which every way runs once.", lower_bound=1)
flags.DEFINE_integer("filters", 64, "Filters of every convolution.", lower_bound=1)
flags.register_validator("images", lambda images: images % 20 == 0, "must be a multiple of 20")
FLAGS = flags.FLAGS


def ways_to_load(file: Path, steps: int, filters: int) -> dict[str, Callable[[], None]]:
  """A function for each way, which does this number of meta-steps and waits for the last."""
  images = np.load(file, mmap_mode="r")
  labels = np.arange(len(images)) // 20
  model = metajax.models.omniglot(5, filters=filters)
  loss = metajax.losses.cross_entropy(model.apply, reduction="sum")
  gradient = metajax.reptile(loss, optax.sgd(1e-3))
  learner = metajax.meta_learner(gradient, optax.sgd(1.0), metajax.sharded(5))
  make_episode = metajax.shared_tail(metajax.cycling(5, 10))
  start = learner.init(jax.jit(model.init)(jax.random.key(0)))
  key, step = jax.random.key(1), jax.jit(learner.step)
  start, key = metajax.programs.on_mesh((start, key), metajax.task_mesh())

  def sampler(inputs: np.ndarray) -> metajax.types.SampleTask:
    classes = metajax.data.from_arrays(inputs, labels)
    classes = metajax.programs.on_mesh(classes, metajax.task_mesh())
    return metajax.data.few_shot.sample_task(classes, ways=5, train_shots=10, test_shots=0)

  def whole(sample_task: metajax.types.SampleTask) -> Callable[[], None]:
    one_step = metajax.run(learner, sample_task, make_episode, 1)
    program = metajax.programs.compiled(one_step, metajax.task_mesh(), start, key)

    def steps_with_sampling() -> None:
      state = start
      for _ in range(steps):
        state, _ = jax.block_until_ready(program(state, key))

    return steps_with_sampling

  sample_rows = sampler(np.arange(len(images)))
  sample = learner.execution.sample(sample_rows, make_episode)
  episodes = metajax.data.host_episodes(sample, images.__getitem__, key)

  def steps_on_episodes() -> None:
    state = start
    for batch in islice(episodes, steps):
      state, _ = jax.block_until_ready(step(state, batch))

  return {
    "device": whole(sampler(np.asarray(images))),
    "host_tasks": whole(metajax.data.host_tasks(sample_rows, images.__getitem__)),
    "host_episodes": steps_on_episodes,
  }


def main(argv: Sequence[str]) -> None:
  cases.check_flags(argv)
  metajax.cores_as_devices()
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "images.npy"
    pixels = np.random.default_rng(0).integers(0, 256, (FLAGS.images, 28, 28, 1), np.uint8)
    np.save(file, pixels)
    ways = ways_to_load(file, FLAGS.steps, FLAGS.filters)
    for way in ways.values():
      way()  # compiles
    seconds = cases.in_turns(list(ways.values()), FLAGS.repeats)
  print(", ".join(f"{name} {value}" for name, value in cases.machine().items()) + "\n")
  print("| data | meta-steps per second | relative |\n|---|---|---|")
  rates = [FLAGS.steps / float(np.median(times)) for times in seconds]
  for name, rate in zip(ways, rates, strict=True):
    print(f"| {name} | {rate:.2f} | {rate / rates[0]:.2f} |")


if __name__ == "__main__":
  app.run(main)
