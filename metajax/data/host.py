"""Episodes of data that does not fit into a device's memory: fetched in background threads."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from metajax.types import Episode, Examples, PRNGKey, SampleEpisodes


def host_episodes(
  sample_episodes: SampleEpisodes,
  fetch: Callable[[np.ndarray], Any],
  key: PRNGKey,
  *,
  first: int = 0,
  threads: int = 4,
  ahead: int = 4,
) -> Iterator[Episode]:
  """Yields the episodes of each meta-step, whose inputs are fetched on the host while others run.

  The tasks are drawn as usual, but of row numbers: `few_shot.sample_task` of classes that
  `from_arrays(np.arange(m), labels)` makes. So the same key gives the same tasks as in
  `metajax.run`. The library `grain`, an extra of metajax, does the fetching.

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
