"""What the experiment binaries share: flags, a run's folder, the loop that trains and judges."""

import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import jax
import matplotlib

matplotlib.use("Agg")  # before pyplot: a binary has no screen

import matplotlib.pyplot as plt
import numpy as np
from absl import flags, logging
from tqdm import tqdm

import metajax
from metajax.checkpoint import checkpoints

# A data set that a program closes over becomes an argument of it, not a constant copied into it.
jax.config.update("jax_use_simplified_jaxpr_constants", True)

T = TypeVar("T")
Record = dict[str, Any]
_STOPPING = threading.Event()  # set when one of several runs fails
_DRAWING = threading.Lock()  # pyplot is one for all threads


# fmt: off
_SHARED_FLAGS = (
  flags.DEFINE_integer("meta_steps", None, "Outer iterations; each experiment has its default."),
  flags.DEFINE_integer("eval_tasks", None,
    "Test tasks of the final result; each experiment has its default."),
  flags.DEFINE_integer("seed", 0, "Of everything random."),
  flags.DEFINE_integer("seeds", 1,
    "Runs, from --seed on; the result is their mean, with the deviation between them."),
  flags.DEFINE_string("out", None, "Run folder; by default a new one under runs/."),
  flags.DEFINE_bool("plot_only", False, "Train nothing: draw anew what --out holds."),
)
# fmt: on


def defaults(own_flags: Iterable[flags.FlagHolder], **changes: Any) -> SimpleNamespace:
  """The flags' default values, but for `changes`.

  Raises:
    ValueError: if a change names no flag.
  """
  values = {flag.name: flag.default for flag in (*_SHARED_FLAGS, *own_flags)}
  unknown = sorted(set(changes) - set(values))
  if unknown:
    raise ValueError(f"there is no flag --{unknown[0]}")
  return SimpleNamespace(**{**values, **changes})


def main(
  name: str,
  argv: list[str],
  own_flags: Iterable[flags.FlagHolder],
  own_defaults: dict[str, Any],
  prepare: Callable[[SimpleNamespace], Callable[[], Any]],
) -> None:
  """A binary: `prepare` checks everything and returns what to run; its complaints are one line."""
  if len(argv) > 1:
    sys.exit(f"{name}: unexpected argument {argv[1]!r}: flags start with --")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # every save would log some forty lines
  metajax.cores_as_devices()
  jax.config.update("jax_compilation_cache_dir", str(metajax.data.cache_directory() / "compiled"))
  present = lambda flag: flags.FLAGS[flag.name].present
  given = {
    flag.name: flag.value if present(flag) else own_defaults.get(flag.name, flag.default)
    for flag in (*_SHARED_FLAGS, *own_flags)
  }
  try:
    run = prepare(SimpleNamespace(**given))
  except (ValueError, OSError) as error:
    sys.exit(f"{name}: {error}")
  run()


def changed(settings: SimpleNamespace, **changes: Any) -> SimpleNamespace:
  return SimpleNamespace(**{**vars(settings), **changes})


def of_each_seed(settings: SimpleNamespace) -> list[SimpleNamespace]:
  """The settings of `--seeds` runs, each in a folder of its own inside `--out`."""
  seeds = range(settings.seed, settings.seed + settings.seeds)
  return [
    changed(settings, seed=seed, seeds=1, out=os.path.join(settings.out, f"seed{seed}"))
    for seed in seeds
  ]


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A copy on each device of the mesh; what is spread over them stays."""

  def place(leaf: jax.Array) -> jax.Array:
    there = leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if there else jax.device_put(leaf, jax.NamedSharding(mesh, jax.P()))

  return jax.tree.map(place, tree)


def side_by_side(jobs: Sequence[Callable[[jax.sharding.Mesh], T]]) -> list[T]:
  """The results of jobs that do not need each other, each on a device of its own.

  A job is given a mesh of one device. After an exception in one, the others end at their next call
  of `train`'s compiled loop.
  """
  free: SimpleQueue[jax.sharding.Mesh] = SimpleQueue()
  for device in jax.devices():
    free.put(metajax.task_mesh([device]))

  def work(job: Callable[[jax.sharding.Mesh], T]) -> T:
    mesh = free.get()
    try:
      if _STOPPING.is_set():
        raise RuntimeError("another run failed")
      with jax.default_device(mesh.devices.flat[0]):
        return job(mesh)
    except BaseException:
      _STOPPING.set()
      raise
    finally:
      free.put(mesh)

  with ThreadPoolExecutor(len(jax.devices())) as pool:
    futures = [pool.submit(work, job) for job in jobs]
    try:
      return [future.result() for future in futures]
    except BaseException:
      _STOPPING.set()
      pool.shutdown(cancel_futures=True)
      raise
    finally:
      _STOPPING.clear()


def check_numbers(settings: SimpleNamespace, *at_least_one: str) -> None:
  """Refuses shared flags, and others that count something, if they are out of range."""
  for name in ("meta_steps", "seeds", *at_least_one):
    if getattr(settings, name) < 1:
      raise ValueError(f"--{name}={getattr(settings, name)} must be at least 1")
  if settings.eval_tasks < 2:
    raise ValueError(f"--eval_tasks={settings.eval_tasks} must be at least 2")
  if not 0 <= settings.seed < 2**32 - settings.seeds:
    raise ValueError(f"--seed={settings.seed} must be from 0 to 2^32 - 1")
  if settings.plot_only and settings.out is None:
    raise ValueError("--plot_only draws what --out holds: give an --out")


def folder_name(name: str, settings: SimpleNamespace) -> str:
  """What --out names, or a new folder."""
  return settings.out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")


def open_folder(settings: SimpleNamespace) -> "RunFolder":
  """The folder that --out names; nothing is written yet."""
  elsewhere = ("out", "plot_only", "seeds", "data_dir", "cache_dir")  # where, but not what
  given = {
    flag: ",".join(map(str, value)) if isinstance(value, list) else value
    for flag, value in vars(settings).items()
    if value is not None and flag not in elsewhere
  }
  return RunFolder(settings.out, given)


def versions() -> dict[str, str]:
  """What a result depends on besides its flags."""
  packages = ("metajax", "jax", "jaxlib", "flax", "optax", "numpy")
  found = {package: importlib.metadata.version(package) for package in packages}
  return {"python": platform.python_version(), **found, "device": jax.devices()[0].device_kind}


class RunFolder:
  """What a run leaves: flags.txt, metrics.jsonl, result.json, learning_curve.png, checkpoints."""

  def __init__(self, out: str | os.PathLike, flags: dict[str, Any]) -> None:
    """Names the folder, which may hold a run that the same flags began.

    Raises:
      ValueError: if it holds a run with other flags.
    """
    self.path = Path(out).expanduser().absolute()
    self.metrics = self.path / "metrics.jsonl"
    self._flags = self.path / "flags.txt"
    self._lines = [f"--{name}={value}" for name, value in sorted(flags.items())]
    if self._flags.is_file():
      self._compare([line for line in self._before() if line.startswith("--")])

  def _before(self) -> list[str]:
    return self._flags.read_text().splitlines()

  def _compare(self, before: list[str]) -> None:
    then = " ".join(line for line in before if line not in self._lines)
    now = " ".join(line for line in self._lines if line not in before)
    if then or now:
      raise ValueError(
        f"{self.path} holds another run (then {then or 'no such flag'}; now {now or 'none'}): "
        "go on with the same flags and data, or choose another --out"
      )

  def begin(self, data: str) -> None:
    """Makes the folder and writes flags.txt, with a comment that says which data these are.

    Raises:
      ValueError: if that cannot be done, or the run was begun on other data.
    """
    self._lines.append(f"# {data}")
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      if self._flags.is_file():
        self._compare(self._before())
      replace_file(self._flags, "\n".join(self._lines) + "\n")
    except OSError as error:
      raise ValueError(
        f"--out={self.path} cannot be written ({error.strerror}): choose another folder"
      ) from error

  def records(self) -> list[Record]:
    return read_records(self.path)

  def truncate(self, step: int) -> None:
    """Forgets the records after a step."""
    kept = [record for record in self.records() if record["step"] <= step]
    replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

  def append(self, record: Record) -> None:
    with self.metrics.open("a") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def result(self) -> Record | None:
    """What `finish` wrote, if it has."""
    return finished(self.path) if (self.path / "result.json").exists() else None

  def finish(self, result: Record) -> None:
    """Writes result.json: the run is complete."""
    write_json(self.path / "result.json", result)


def read_records(folder: Path) -> list[Record]:
  """The lines of a run's metrics.jsonl; one that was cut off by a kill is left out."""
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def finished(out: str | os.PathLike) -> Record:
  """The result.json of a complete run.

  Raises:
    ValueError: if there is none.
  """
  path = Path(out, "result.json")
  if not path.exists():
    raise ValueError(f"{out} holds no complete run to draw: train it first, without --plot_only")
  return json.loads(path.read_text())


def logged(out: str | os.PathLike) -> list[Record]:
  """What a run has left to draw.

  Raises:
    ValueError: if there is nothing.
  """
  found = read_records(Path(out))
  if not found:
    raise ValueError(f"{out} holds no run to draw: train first, without --plot_only")
  return found


def replace_file(path: Path, text: str) -> None:
  """Writes a file whole, or leaves the one before as it was."""
  beside = path.with_name(path.name + ".partial")
  with beside.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


def write_json(path: Path, content: Record) -> None:
  replace_file(path, json.dumps(content, indent=2) + "\n")


def describe(splits: metajax.data.Splits) -> str:
  """One line that tells data sets apart: classes, examples and a checksum of each split."""
  parts = []
  for name, classes in splits._asdict().items():
    if classes is not None:
      inputs, sizes = np.asarray(classes.inputs), np.asarray(classes.sizes)
      checksum = zlib.crc32(inputs.data, zlib.crc32(sizes.data))
      parts.append(f"{name}: {len(sizes)} classes, {len(inputs)} examples, crc32 {checksum:08x}")
  return "; ".join(parts)


def train(
  learner: metajax.MetaLearner,
  sample_episodes: Callable[[jax.Array], metajax.Episode],
  state: metajax.MetaState,
  key: jax.Array,
  *,
  meta_steps: int,
  eval_every: int,
  evaluate: Callable[[metajax.MetaState], Record],
  summary: Callable[[Record], str],
  folder: RunFolder,
  steps_per_call: int,
  mesh: jax.sharding.Mesh,
  label: str = "meta-training",
) -> tuple[metajax.MetaState, float]:
  """Trains to `meta_steps` from what the folder holds; judges and saves every `eval_every`.

  Args:
    learner: what to train.
    sample_episodes: of a meta-step.
    state: where to start if the folder holds no checkpoint.
    key: of all sampling.
    meta_steps: where to stop.
    eval_every: meta-steps between two records.
    evaluate: the record of a state.
    summary: the record as a line.
    folder: gets records and checkpoints.
    steps_per_call: meta-steps in one call of the compiled loop.
    mesh: where the state lives.
    label: of the progress bar.

  Returns:
    The last state, and the seconds spent in compiled training steps, earlier sittings included.
  """
  saved = checkpoints(folder.path / "checkpoints")
  restored = saved.restore(state)
  state, key = on_mesh((state if restored is None else restored, key), mesh)
  step = int(state.step)
  folder.truncate(step)
  records = folder.records()
  seconds = records[-1]["seconds"] if records else 0.0
  if restored is not None:
    tqdm.write(f"going on from meta-step {step} of {folder.path}")

  programs: dict[int, Callable[..., Any]] = {}  # by number of steps
  if not records:
    record = {"step": step, "seconds": 0.0, **evaluate(state)}
    folder.append(record)
    tqdm.write(f"{label}: {summary(record)}")
  with progress(total=meta_steps, initial=step, unit="step", desc=label, mesh=mesh) as bar:
    while step < meta_steps:
      if _STOPPING.is_set():
        raise RuntimeError(f"{folder.path} stopped at meta-step {step}, since another run failed")
      until_evaluation = min(meta_steps, (step // eval_every + 1) * eval_every) - step
      steps = min(steps_per_call, until_evaluation)
      if steps not in programs:
        many_steps = metajax.run(learner, sample_episodes, steps)
        programs[steps] = jax.jit(many_steps, donate_argnums=0).lower(state, key).compile()
      start = time.perf_counter()
      with jax.transfer_guard("disallow"):  # all of it on the device, sampling included
        state, infos = jax.block_until_ready(programs[steps](state, key))
      seconds += time.perf_counter() - start
      step += steps
      losses = np.asarray(infos.losses).mean(axis=0)
      bar.update(steps)
      bar.set_postfix_str(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
      if steps == until_evaluation:
        record = {"step": step, "seconds": round(seconds, 3), "losses": losses.tolist()}
        record |= evaluate(state)
        folder.append(record)
        saved.save(state)
        tqdm.write(f"{label}: {summary(record)}")
  saved.close()
  return state, seconds


def progress(*, mesh: jax.sharding.Mesh, **options: Any) -> tqdm:
  """A progress bar; runs side by side have a line each."""
  line = mesh.devices.flat[0].id if mesh.size == 1 else 0
  return tqdm(**options, position=line, leave=False, smoothing=0.1)


def with_intervals(values: dict[str, np.ndarray]) -> Record:
  """`{cell: {"accuracy", "interval95"}}`, as fractions."""
  cells = {}
  for name, column in values.items():
    mean, interval = metajax.mean_and_interval(column)
    cells[name] = {"accuracy": round(mean, 6), "interval95": round(interval, 6)}
  return cells


def cells_over_seeds(results: Sequence[Record]) -> Record:
  """The cells of one run; of several their mean, the deviation between the runs, and the mean of
  the intervals within them."""
  if len(results) == 1:
    return results[0]["cells"]
  cells = {}
  for name in results[0]["cells"]:
    column = lambda key, name=name: np.array([result["cells"][name][key] for result in results])
    cells[name] = {
      "accuracy": round(float(column("accuracy").mean()), 6),
      "deviation_between_seeds": round(float(column("accuracy").std(ddof=1)), 6),
      "interval95_within_a_run": round(float(column("interval95").mean()), 6),
      "seeds": len(results),
      "tasks": results[0]["cells"][name]["tasks"],
    }
  return cells


def percent(cell: Record) -> str:
  """The two kinds of uncertainty are named."""
  mean = f"{100 * cell['accuracy']:.2f}"
  if "seeds" in cell:
    between, within = cell["deviation_between_seeds"], cell["interval95_within_a_run"]
    return (
      f"{mean} % (deviation between {cell['seeds']} seeds {100 * between:.2f}, "
      f"95 % interval over tasks +- {100 * within:.2f})"
    )
  return f"{mean} +- {100 * cell['interval95']:.2f} %"


def learning_curve_summary(record: Record) -> str:
  cells = [
    f"{split} {name} {percent(cell)}"
    for split in ("train", "test")
    for name, cell in record.get(split, {}).items()
  ]
  return f"step {record['step']}: " + ", ".join(cells)


class Curve(NamedTuple):
  """Accuracy in percent against meta-steps, with half the height of a band."""

  steps: np.ndarray
  mean: np.ndarray
  band: np.ndarray


def curve(runs: Sequence[list[Record]], split: str, name: str) -> Curve:
  """One cell over time; the band is the 95 % interval over tasks of one run, or the standard
  deviation between several."""
  length = min(map(len, runs))
  steps = np.array([record["step"] for record in runs[0][:length]])
  values = lambda key: (
    100 * np.array([[record[split][name][key] for record in run[:length]] for run in runs])
  )
  accuracy = values("accuracy")
  band = values("interval95")[0] if len(runs) == 1 else accuracy.std(axis=0, ddof=1)
  return Curve(steps, accuracy.mean(axis=0), band)


def band_title(num_runs: int) -> str:
  if num_runs == 1:
    return "band: 95 % interval over tasks"
  return f"band: standard deviation between {num_runs} seeds"


def draw_learning_curve(runs: Sequence[list[Record]], path: Path) -> None:
  """Accuracy against meta-steps of one run, or of one a seed: every cell, train and test tasks."""
  with drawing(path, figsize=(6.4, 4.0)) as figure:
    axes = figure.subplots()
    for split, style in (("test", "-"), ("train", "--")):
      for number, name in enumerate(runs[0][0].get(split, {})):
        steps, mean, band = curve(runs, split, name)
        color = f"C{number}"
        axes.plot(steps, mean, style, color=color, marker=".", label=f"{split} tasks, {name}")
        if split == "test":
          axes.fill_between(steps, mean - band, mean + band, color=color, alpha=0.2, lw=0)
    axes.set_xlabel("meta-steps")
    axes.set_ylabel("accuracy after adaptation (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title=band_title(len(runs)), fontsize=8, title_fontsize=8)


@contextmanager
def drawing(path: Path, **options: Any) -> Iterator[plt.Figure]:
  """A figure, saved as PNG beside `path`'s stem, and as SVG if `path` has no suffix."""
  with _DRAWING:
    figure = plt.figure(layout="constrained", **options)
    try:
      yield figure
      for suffix in [path.suffix] if path.suffix else [".png", ".svg"]:
        figure.savefig(path.with_suffix(suffix), dpi=150)
    finally:
      plt.close(figure)
