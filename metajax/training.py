"""The training loop of a whole program: compiled once, with progress, reports and checkpoints."""

import errno
import os
import re
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from tqdm import tqdm

from metajax import checks
from metajax.devices import in_any_process, task_mesh
from metajax.inner import Info, all_finite
from metajax.meta import MetaLearner, MetaState, check_state, run
from metajax.programs import compiled, copied, debugging, on_mesh, without_sharding
from metajax.types import Episode, MakeEpisode, Params, PRNGKey, SampleTask


class StoppedError(RuntimeError):
  """Training was asked to stop. If it has a folder, its state is saved there."""


class DivergedError(RuntimeError):
  """The parameters are no longer finite. States that were saved before are kept."""


class Sums(NamedTuple):
  """Losses and metrics of the inner steps, added over meta-steps in float64."""

  meta_steps: int = 0
  totals: dict[str, Any] = {}  # noqa: RUF012, never changed; by name, each like the array of a step
  skipped: float = 0.0  # fractions of tasks that were skipped; they add zeros to the totals

  def add(self, infos: Info) -> "Sums":
    """Adds those of n more meta-steps, NumPy arrays `[n, k, ...]`."""
    values = {"losses": infos.losses, **(infos.metrics or {})}
    more = {name: array.astype(np.float64).sum(axis=0) for name, array in values.items()}
    totals = {
      name: (np.asarray(self.totals.get(name, 0.0)) + total).tolist()
      for name, total in more.items()
    }
    skipped = 0.0 if infos.skipped is None else float(np.sum(infos.skipped, dtype=np.float64))
    return Sums(self.meta_steps + len(values["losses"]), totals, self.skipped + skipped)

  def means(self) -> dict[str, Any]:
    """Over the tasks that were not skipped; NaN if all were. Empty if nothing was added."""
    counted = self.meta_steps - self.skipped or np.nan
    return {name: (np.asarray(total) / counted).tolist() for name, total in self.totals.items()}


class Record(NamedTuple):
  """What `train` reports from time to time, and returns at the end.

  Attributes:
    step: the meta-steps done so far.
    state: the state after them.
    losses: L_1 ... L_k, averaged over all tasks and meta-steps since the last report; empty if
      there were none. Tasks that `skip_nonfinite` skipped do not count.
    metrics: the same of what the losses returned beside their values, by name.
    seconds: the time spent in compiled meta-steps, that of earlier, interrupted programs included.
    restored: whether this is the state that was restored from a checkpoint.
    skipped: the fraction of the tasks since the last report that `skip_nonfinite` skipped.
  """

  step: int
  state: MetaState
  losses: list[float]
  metrics: dict[str, Any]
  seconds: float
  restored: bool
  skipped: float = 0.0


def _no_report(record: Record) -> None:
  return None


def train(
  learner: MetaLearner,
  sample_task: SampleTask,
  make_episode: MakeEpisode,
  state: MetaState,
  key: PRNGKey,
  *,
  num_steps: int,
  report: Callable[[Record], float | None] = _no_report,
  report_every: int = 100,
  folder: str | os.PathLike | None = None,
  steps_per_call: int = 25,
  mesh: Mesh | None = None,
  should_stop: Callable[[], bool] = lambda: False,
  progress: Callable[..., tqdm] = tqdm,
) -> Record:
  """Trains up to meta-step `num_steps`, with a progress bar.

  With a folder, the state is saved before every report but the one at the start. Ctrl-C saves it
  too, and ends training when the compiled call under way is done, unless the program handles
  SIGINT itself, `train` is called in another thread than the main one, or several processes share
  the run. The same call then resumes an interrupted run, repeats a report that was interrupted, and
  ends with bit-identical parameters. A warning is given if a meta-step computes something else
  than when the folder was trained, for example because the algorithm, a rate or the data has
  changed. (With another version of JAX or of metajax, on another platform or with another number of
  devices, this is not checked.) Data that the samplers close over becomes an argument of the
  compiled programs.

  A warning is also given if the sampler does not use its key, if no parameter has changed up to the
  first report, or if all tasks between two reports were skipped.

  If parameters have fewer than 32 bits, as bfloat16 has, the first meta-step is also taken in
  float32. A warning is given if rounding changes its direction (a cosine below 0.9).

  Args:
    learner: from `meta_learner`.
    sample_task: `key -> Task`, traceable by JAX.
    make_episode: `(key, Task) -> Episode`.
    state: from `learner.init`. If the folder holds a checkpoint, training goes on from that.
    key: the key of the run. The key of meta-step i is `fold_in(key, i)`.
    num_steps: the meta-step at which training ends.
    report: is given a `Record` at the start, after every `report_every` meta-steps and at the end.
      It may return a score: the state with the highest score is kept, besides the newest ones.
      (The score of the report at the start is not used, nor one that is not finite.) It may raise
      `StoppedError` to end the run, and is given the record again on resuming. If several processes
      share the run, it must return the same score, or raise, in all of them.
    report_every: meta-steps between two reports.
    folder: of the checkpoints, or None to save nothing.
    steps_per_call: meta-steps in one compiled call, between two updates of the progress bar.
    mesh: where to train; by default the mesh of the execution, or JAX's default device. (If several
      processes share the run, it is all devices in place of the default one.)
    should_stop: is asked before every compiled call whether to save and stop. Of several processes
      that share the run, all stop if one of them is told to.
    progress: makes the progress bar, with the arguments `total`, `initial` and `unit` of `tqdm`.

  Returns:
    The last record. If the run was complete before, this is the restored one.

  Raises:
    ValueError: if a number is below 1, the state has more meta-steps than `num_steps` or than the
      newest checkpoint, no checkpoint of the folder can be restored, they are of a run with another
      key or more meta-steps, or `report` returns what is no number and not None.
    StoppedError: if `should_stop` says so, or `report`. With a folder, the state is saved first.
    KeyboardInterrupt: after Ctrl-C, as described above.
    DivergedError: if the parameters are no longer finite; the message names the meta-step.
    OSError: if the folder or a checkpoint cannot be written, or the newest one cannot be read for a
      reason that may pass; earlier ones are kept.
  """
  checks.at_least_one(num_steps=num_steps, report_every=report_every, steps_per_call=steps_per_call)
  check_state(state)
  checks.is_key(key)
  mesh = mesh or learner.execution.mesh or _default_mesh()
  state, key = on_mesh((state, key), mesh)
  state = copied(state)  # the caller's own stays as it is
  programs: dict[int, Callable[..., Any]] = {}  # by number of meta-steps
  seconds, sums = 0.0, Sums()
  with ExitStack() as stack:
    saved = found = None
    if folder is not None:
      from metajax.checkpoint import checkpoints  # Orbax takes seconds to import

      saved = checkpoints(folder)
      stack.push(_closing(saved))
      found = saved.restore(state)
    one_step = run(learner, sample_task, make_episode, 1)
    extra: dict[str, Any] = {"key": np.asarray(jax.random.key_data(key)).tolist()}
    if saved:
      extra["meta_step"], extra["constants"] = _fingerprint(one_step, mesh, state, key)
    if found is not None:
      _check_goes_on(found, extra, num_steps, int(state.step), folder)
      state, seconds = found.state, found.extra.get("seconds", 0.0)
      sums = Sums(*found.extra.get("sums", ()))
    elif any(jnp.finfo(leaf.dtype).bits < 32 for leaf in jax.tree.leaves(state.params)):
      _warn_if_steps_are_lost(learner, one_step, mesh, state, key)
    step = int(state.step)
    if step > num_steps:
      raise ValueError(
        f"the state has {step} meta-steps already, and num_steps={num_steps} is where training ends"
      )
    last_saved = step if found is not None else 0
    if folder is not None and step < num_steps:
      _make_folder(folder)

    def keep() -> None:
      nonlocal last_saved
      if saved and step > last_saved:
        last_saved = step  # also if this is interrupted
        saved.save(state, {"seconds": seconds, "sums": sums, **extra})

    def keep_if_interrupted(kind: type[BaseException] | None, *_: Any) -> None:
      # Processes that share a run could save only together. An interrupt by a program's own handler
      # may come while a compiled call uses the memory of the state.
      interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
      lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
      if interrupted and not lost and jax.process_count() == 1:
        keep()

    def stopped() -> StoppedError:
      keep()
      kept = f", which is saved in {folder}" if saved and step else ""
      return StoppedError(f"stopped at meta-step {step}{kept}")

    def reported(record: Record) -> float | None:
      try:
        score = report(record)
      except StoppedError:  # it is made again when the run goes on
        raise stopped() from None
      try:
        return None if score is None else float(score)
      except (TypeError, ValueError):
        raise ValueError(
          f"report must return a number or None, and not {type(score).__name__}"
        ) from None

    def recorded(restored: bool = False) -> Record:
      means, skipped = sums.means(), sums.skipped / max(sums.meta_steps, 1)
      # It has a copy of the state, since the next meta-step uses the memory of this one.
      return Record(step, copied(state), means.pop("losses", []), means, seconds, restored, skipped)

    record = recorded(restored=found is not None)
    reported(record)
    if found is not None and found.rated:  # its report was made
      sums = Sums()

    begun, before = step, jax.device_get(state.params)
    bar = stack.enter_context(progress(total=num_steps, initial=step, unit="step"))
    stack.push(keep_if_interrupted)
    if found is not None and not bar.disable:
      rest = ", the last one: nothing is left to train" if step == num_steps else ""
      bar.write(f"going on from meta-step {step} of {folder}{rest}")
    while True:
      if sums.meta_steps and (step == num_steps or step % report_every == 0):
        record = recorded()
        if record.skipped == 1:
          _warn_of_skipped_tasks(step - sums.meta_steps + 1, step)
        elif before is not None and step > begun + 1:  # a rate may begin at 0
          _warn_if_equal(before, record, begun)
          before = None
        with _paused(bar):
          keep()
          score = reported(record)
          sums = Sums()
          if saved:
            saved.rate(step, score)
      if step == num_steps:
        return record
      if in_any_process(should_stop(), mesh):
        raise stopped()
      until_report = min(num_steps, (step // report_every + 1) * report_every) - step
      steps = min(steps_per_call, until_report)
      if steps not in programs:
        bar.set_postfix_str("compiling")
        many_steps = run(_checking_parameters(learner), sample_task, make_episode, steps)
        with _paused(bar):
          programs[steps] = compiled(many_steps, mesh, state, key, donate=True)
      with _interrupts() as interrupts:
        start = time.perf_counter()
        # Everything stays on the device, sampling included.
        with jax.transfer_guard("allow" if debugging() else "disallow"):
          state, found_out = jax.block_until_ready(programs[steps](state, key))
        seconds += time.perf_counter() - start
        infos, finite = jax.device_get(found_out)
        if not finite.all():
          kept = f"meta-step {last_saved} is saved" if saved and last_saved else "nothing is saved"
          raise _diverged(infos, int(np.argmin(finite)), step, kept)
        step += steps
        sums = sums.add(infos)
      if interrupts:
        raise KeyboardInterrupt
      bar.update(steps)
      new = Sums().add(infos)
      bar.set_postfix_str(_in_words(new.means()["losses"], new.skipped / steps))


def _default_mesh() -> Mesh:
  """JAX's default device; if several processes share the run, all devices, in each the same."""
  return task_mesh(None if jax.process_count() > 1 else list(jnp.zeros(()).devices()))


def _warn_of_skipped_tasks(first: int, last: int) -> None:
  warnings.warn(
    f"all tasks of meta-steps {first} to {last} were skipped, because their gradients are not "
    "finite: nothing was learned. Lower the inner rate",
    stacklevel=3,
  )


def _warn_if_equal(before: Params, record: Record, begun: int) -> None:
  """Says so if no parameter has changed since meta-step `begun`, when they were as `before`."""
  same = jax.tree.leaves(jax.tree.map(np.array_equal, before, record.state.params))
  if same and all(same):
    warnings.warn(
      f"no parameter has changed from meta-step {begun} to {record.step}: see that the loss uses "
      "its first argument, the parameters, and that the outer optimizer has taken a step, with a "
      "rate that is not 0",
      stacklevel=3,
    )


def _make_folder(folder: str | os.PathLike) -> None:
  """Makes the folder before training begins, since training would be lost without it."""
  path = Path(folder).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise OSError(
      f"checkpoints cannot be written to {path} ({error.strerror}): choose another folder"
    ) from error


def _fingerprint(
  one_step: Callable[..., Any], mesh: Mesh, state: MetaState, key: PRNGKey
) -> tuple[list[Any], list[int]]:
  """A checksum of a meta-step's operations, and the versions and devices for which they hold.

  Beside them, the checksums of the arrays that it closes over, such as the data.
  """
  program = jax.make_jaxpr(one_step)(*jax.tree.map(without_sharding, (state, key)))
  text = re.sub("0x[0-9a-f]+", "", str(program))  # without addresses in memory
  platform = mesh.devices.flat[0].platform
  identity = [zlib.crc32(text.encode()), metadata.version("metajax"), jax.__version__, platform]
  readable = [leaf for leaf in program.consts if _is_readable(leaf)]
  return [*identity, mesh.size], [_checksum(leaf) for leaf in readable]


def _is_readable(leaf: Any) -> bool:
  """Whether this process holds all numbers of an array."""
  if not isinstance(leaf, jax.Array):
    return True
  return leaf.is_fully_addressable or leaf.is_fully_replicated


def _checksum(leaf: Any) -> int:
  """A checksum of the numbers of an array, computed on the host."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data)


def _check_goes_on(
  found: Any, extra: dict[str, Any], num_steps: int, given: int, folder: Any
) -> None:
  """Checks that a restored state is of this run, not beyond its end, and not behind the given one.

  Args:
    found: the restored state.
    extra: what the run saves with a state.
    num_steps: where the run ends.
    given: the meta-steps of the state that `train` was given.
    folder: of the checkpoints.
  """
  other = found.extra.get("key", extra["key"]) != extra["key"]
  step = int(found.state.step)
  if other or step > num_steps:
    was = "another key" if other else f"{step} meta-steps, more than num_steps={num_steps}"
    raise ValueError(f"{folder} holds a run with {was}: go on as it began, or give another folder")
  if given > step:
    raise ValueError(
      f"the state has {given} meta-steps, and training would go on from the {step} of the newest "
      f"checkpoint in {folder}: give another folder, or a state from learner.init"
    )
  before, now = found.extra.get("meta_step", extra["meta_step"]), extra["meta_step"]
  if before[1:] != now[1:]:  # other versions or devices, for which the same is computed otherwise
    return
  if before[0] != now[0]:
    warnings.warn(
      f"a meta-step computes something else than when {folder} was trained: the algorithm, an "
      "optimizer, the loss, a sampler, the data, or only how they are computed has changed. Unless "
      "you mean it, give another folder",
      stacklevel=3,
    )
  elif found.extra.get("constants", extra["constants"]) != extra["constants"]:
    warnings.warn(
      f"the data is not what {folder} was trained on, or another array that a meta-step uses has "
      "changed, such as a rate or weights. Unless you mean it, give another folder",
      stacklevel=3,
    )


@contextmanager
def _interrupts() -> Iterator[list[int]]:
  """Yields a list of the interrupts (Ctrl-C) within; a second one is raised at once.

  Raised in a compiled call, an interrupt would lose the state, whose memory the call uses. A
  program's own handler stays as it is, and processes that share a run end at once: only together
  could they save.
  """
  caught: list[int] = []

  def handle(number: int, frame: Any) -> None:
    if caught:
      signal.default_int_handler(number, frame)
    caught.append(number)

  if (
    threading.current_thread() is not threading.main_thread()
    or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    or jax.process_count() > 1
  ):
    yield caught
    return
  signal.signal(signal.SIGINT, handle)
  try:
    yield caught
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _paused(bar: tqdm) -> Iterator[None]:
  """Leaves this time out of the bar's, so that pace and time left are those of training."""
  start = time.time()
  yield
  if not bar.disable:
    bar.start_t += time.time() - start
    bar.last_print_t += time.time() - start


def _in_words(losses: list[float], skipped: float) -> str:
  """The losses L_1 ... L_k of an episode as a few words: L_1 is before any inner step."""
  adapted = f", adapted {losses[-1]:.3f}" if len(losses) > 1 else ""
  left_out = f", {100 * skipped:.0f} % skipped" if skipped else ""
  return f"loss {losses[0]:.3f}{adapted}{left_out}"


def _closing(saved: Any) -> Callable[..., None]:
  """An exit function that closes the checkpoints, but not if that would wait for a lost process."""

  def close(kind: type[BaseException] | None, *_: Any) -> None:
    of_jax = kind is not None and issubclass(kind, jax.errors.JaxRuntimeError)
    if not (of_jax and jax.process_count() > 1):
      saved.close()

  return close


def _warn_if_steps_are_lost(
  learner: MetaLearner,
  one_step: Callable[..., Any],
  mesh: Mesh,
  state: MetaState,
  key: PRNGKey,
) -> None:
  """Compares the direction of the first meta-step with that of the same step in float32."""
  wide = lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

  def moved(state: MetaState, key: PRNGKey) -> jax.Array:
    after = one_step(state, key)[0].params
    return ravel_pytree(jax.tree.map(jnp.subtract, wide(after), wide(state.params)))[0]

  as_wide = jax.eval_shape(learner.init, wide(state.params))
  in_dtype = lambda leaf, like: leaf if is_key(leaf) else leaf.astype(like.dtype)
  exact = jax.tree.map(in_dtype, state, as_wide)
  exact = on_mesh(exact, mesh)
  a, b = (np.asarray(compiled(moved, mesh, start, key)(start, key)) for start in (state, exact))
  cosine = a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), np.finfo(np.float32).tiny)
  if cosine < 0.9 and b.any():  # a rate may begin at 0
    warnings.warn(
      "rounding changes the direction of a meta-step, since the parameters have fewer than 32 "
      "bits: the cosine between the first meta-step and the same step in float32 is "
      f"{cosine:.2f}. Keep the parameters in float32, and let the network compute in fewer bits",
      stacklevel=3,
    )


def _checking_parameters(learner: MetaLearner) -> MetaLearner:
  """The same learner, whose meta-steps also return whether all parameters are finite."""

  def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
    state, info = learner.step(state, episodes)
    return state, (info, all_finite(state.params))

  return learner._replace(step=step)


def _diverged(infos: Info, number: int, step: int, kept: str) -> DivergedError:
  """The error that parameters are no longer finite.

  Args:
    infos: of the meta-steps that follow `step`.
    number: that of the first of these meta-steps, from 0, that left parameters that are not finite.
    step: the meta-steps before.
    kept: what is saved.
  """
  advice = "lower the inner or the outer rate"
  if not np.isfinite(infos.losses[number, 0]):  # of parameters that were finite
    rates = f", or {advice}" if step + number else ""
    advice = (
      "its first loss is not finite, so see that the inputs are finite, and that labels are from 0 "
      f"to the number of the network's outputs - 1{rates}"
    )
  return DivergedError(
    f"training diverged at meta-step {step + number + 1}, its parameters are not finite: {advice} "
    f"({kept})"
  )
