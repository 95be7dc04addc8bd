"""Tasks of data that does not fit into a device's memory: their inputs are fetched on the host."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.data.few_shot import as_stored
from metajax.types import Episode, Examples, PRNGKey, SampleEpisodes, SampleTask, Task

Fetch = Callable[[np.ndarray], Any]  # int32 rows of any shape [...] -> inputs [..., *rest]


def host_tasks(sample_task: SampleTask, fetch: Fetch) -> SampleTask:
  """Draws the same tasks, but with inputs that are fetched on the host when a task is drawn.

  The compiled program calls `fetch` and waits for it, so that the tasks serve wherever others do,
  as in `metajax.train` and `judge`. If fetching takes long, see `host_episodes`.

  Args:
    sample_task: `key -> Task`, whose inputs are row numbers: `few_shot.sample_task` of classes
      that `from_arrays(np.arange(m), labels)` makes.
    fetch: `rows -> inputs`, a NumPy function from row numbers of any shape to the inputs, such as
      `images.__getitem__` of a memory-mapped array. The same rows must always give the same
      inputs, and it must not call JAX. If tasks are spread over devices, several threads call it,
      and if they are spread over processes, each fetches its own.

  Returns:
    `key -> Task`, with inputs in JAX's dtypes (float32 for float64).

  Raises:
    ValueError: if what is fetched does not have the shape of the rows first, or is refused as
      `from_arrays` would refuse it; if JAX's CPU backend is switched off; or, when a task is drawn,
      if its inputs are not row numbers. An error in a later call, on the device, becomes a
      JaxRuntimeError that shows it.
  """
  stored = lambda leaf: as_stored(np.asarray(leaf))
  fetched = lambda rows: jax.tree.map(stored, fetch(np.asarray(rows)))
  first = fetched(np.zeros((1, 2), np.int32))
  if any(leaf.shape[:2] != (1, 2) for leaf in jax.tree.leaves(first)):
    raise ValueError(
      "fetch(rows) must return inputs [..., *rest] for rows [...], and for rows [1, 2] it returns "
      f"{', '.join(str(leaf.shape) for leaf in jax.tree.leaves(first))}"
    )
  try:
    jax.local_devices(backend="cpu")
  except RuntimeError as error:
    raise ValueError(
      "host_tasks needs JAX's CPU backend too, as in JAX_PLATFORMS=cuda,cpu"
    ) from error

  def with_inputs(examples: Examples) -> Examples:
    rows = examples.inputs
    if not (hasattr(rows, "dtype") and rows.dtype in (jnp.int32, jnp.int64) and rows.ndim == 1):
      raise ValueError(
        "the tasks of host_tasks must have row numbers as inputs, integers [n]: draw them from "
        "from_arrays(np.arange(m), labels)"
      )
    like = lambda leaf: jax.ShapeDtypeStruct((*rows.shape, *leaf.shape[2:]), leaf.dtype)
    shapes = jax.tree.map(like, first)
    if rows.size == 0:  # a task without test examples
      nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      return examples._replace(inputs=nothing)
    inputs = jax.pure_callback(fetched, shapes, rows, vmap_method="expand_dims")
    return examples._replace(inputs=inputs)

  def sample(key: PRNGKey) -> Task:
    task = sample_task(key)
    return task._replace(train=with_inputs(task.train), test=with_inputs(task.test))

  return sample


def host_episodes(
  sample_episodes: SampleEpisodes,
  fetch: Fetch,
  key: PRNGKey,
  *,
  first: int = 0,
  threads: int = 4,
  ahead: int = 4,
) -> Iterator[Episode]:
  """Yields the episodes of each meta-step, whose inputs are fetched while earlier ones run.

  The tasks are drawn as usual, but of row numbers: `few_shot.sample_task` of classes that
  `from_arrays(np.arange(m), labels)` makes. So the same key gives the same tasks as in
  `metajax.run`. The library `grain`, an extra of metajax, does the fetching. Several processes
  cannot share such a run.

  >>> sample = learner.execution.sample(sample_task, make_episode)
  >>> for episodes in itertools.islice(host_episodes(sample, images.__getitem__, key), 1000):
  ...   state, info = step(state, episodes)  # step = jax.jit(learner.step)

  Args:
    sample_episodes: `key -> episodes [T, ...]`, whose inputs are row numbers.
    fetch: `rows -> inputs`, a NumPy function from row numbers of any shape to the inputs, such as
      `images.__getitem__` of a memory-mapped array. It is called by several threads.
    key: the key of the run. The key of meta-step i is `fold_in(key, i)`.
    first: the meta-step to begin with, which is `state.step` where a run is resumed.
    threads: how many threads fetch.
    ahead: how many meta-steps are fetched ahead.
  """
  import grain

  sample = jax.jit(lambda step: sample_episodes(jax.random.fold_in(key, step)))

  def fetched(step: int) -> Episode:
    episodes = sample(np.int32(step))
    inputs = lambda examples: Examples(fetch(np.asarray(examples.inputs)), examples.targets)
    return episodes._replace(pool=inputs(episodes.pool), tail=inputs(episodes.tail))

  steps = grain.MapDataset.range(int(first), np.iinfo(np.int32).max).map(fetched)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  return iter(steps.to_iter_dataset(options))
