"""What the experiment binaries share: flags, a run's folder, the loop that trains and judges."""

import importlib.metadata
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

PROTOCOLS = ("transductive", "inductive")
TASKS_PER_CALL = 25  # of a judge: one program, whatever the number of tasks

Record = dict[str, Any]
# (params, inner_state, key, first) -> {protocol: accuracies [TASKS_PER_CALL]}, from task `first` on
Judge = Callable[..., dict[str, jax.Array]]


# fmt: off
_SHARED_FLAGS = (
  flags.DEFINE_integer("meta_steps", None, "Outer iterations; each experiment has its default."),
  flags.DEFINE_integer("eval_tasks", None,
    "Test tasks of the final result; each experiment has its default."),
  flags.DEFINE_integer("seed", 0, "Of everything random."),
  flags.DEFINE_string("out", None, "Run folder; by default a new one under runs/."),
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
  prepare: Callable[[SimpleNamespace], tuple],
  run: Callable[..., Any],
) -> None:
  """A binary: `run(settings, *prepare(settings))`; what `prepare` complains of ends in one line."""
  if len(argv) > 1:
    sys.exit(f"{name}: unexpected argument {argv[1]!r}: flags start with --")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # every save would log some forty lines
  metajax.cores_as_devices()
  jax.config.update("jax_compilation_cache_dir", str(metajax.data.cache_directory() / "compiled"))
  given = {flag.name: flag.value for flag in (*_SHARED_FLAGS, *own_flags)}
  given |= {flag: value for flag, value in own_defaults.items() if given[flag] is None}
  settings = SimpleNamespace(**given)
  try:
    prepared = prepare(settings)
  except (ValueError, OSError) as error:
    sys.exit(f"{name}: {error}")
  run(settings, *prepared)


def on_all_devices(tree: Any) -> Any:
  """A copy on each device, where `metajax.sharded` looks for it; what is spread over them stays."""
  mesh = metajax.task_mesh()

  def place(leaf: jax.Array) -> jax.Array:
    spread = len(leaf.sharding.device_set) == mesh.size
    return leaf if spread else jax.device_put(leaf, jax.NamedSharding(mesh, jax.P()))

  return jax.tree.map(place, tree)


def check_numbers(settings: SimpleNamespace, *at_least_one: str) -> None:
  """Refuses shared flags, and others that count something, if they are out of range."""
  for name in ("meta_steps", *at_least_one):
    if getattr(settings, name) < 1:
      raise ValueError(f"--{name}={getattr(settings, name)} must be at least 1")
  if settings.eval_tasks < 2:
    raise ValueError(f"--eval_tasks={settings.eval_tasks} must be at least 2")
  if not 0 <= settings.seed < 2**32:
    raise ValueError(f"--seed={settings.seed} must be from 0 to 2^32 - 1")


def open_folder(name: str, settings: SimpleNamespace) -> "RunFolder":
  """The folder that --out names, or a new one; nothing is written yet."""
  given = {flag: value for flag, value in vars(settings).items() if value is not None}
  out = given.pop("out", None) or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")
  return RunFolder(out, given)


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
    """The lines of metrics.jsonl; one that was cut off by a kill is left out."""
    if not self.metrics.exists():
      return []
    text = self.metrics.read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

  def truncate(self, step: int) -> None:
    """Forgets the records after a step."""
    kept = [record for record in self.records() if record["step"] <= step]
    replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

  def append(self, record: Record) -> None:
    with self.metrics.open("a") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def finish(self, result: Record) -> None:
    """Writes result.json and draws the learning curve."""
    replace_file(self.path / "result.json", json.dumps(result, indent=2) + "\n")
    draw_learning_curve(self.records(), self.path / "learning_curve.png")


def replace_file(path: Path, text: str) -> None:
  """Writes a file whole, or leaves the one before as it was."""
  beside = path.with_name(path.name + ".partial")
  with beside.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


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
  folder: RunFolder,
  steps_per_call: int,
) -> tuple[metajax.MetaState, float]:
  """Trains to `meta_steps` from what the folder holds; judges and saves every `eval_every`.

  Returns:
    The last state, and the seconds spent in compiled training steps, earlier sittings included.
  """
  saved = checkpoints(folder.path / "checkpoints")
  restored = saved.restore(state)
  state, key = on_all_devices((state if restored is None else restored, key))
  step = int(state.step)
  folder.truncate(step)
  records = folder.records()
  seconds = records[-1]["seconds"] if records else 0.0
  if restored is not None:
    print(f"going on from meta-step {step} of {folder.path}", flush=True)

  programs: dict[int, Callable[..., Any]] = {}  # by number of steps
  if not records:
    record = {"step": step, "seconds": 0.0, **evaluate(state)}
    folder.append(record)
    print(_summary(record), flush=True)
  with tqdm(
    total=meta_steps, initial=step, unit="step", desc="meta-training", smoothing=0.1
  ) as bar:
    while step < meta_steps:
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
        bar.write(_summary(record), file=sys.stdout)
  saved.close()
  return state, seconds


def accuracies(
  judge: Judge,
  params: Any,
  inner_state: Any,
  key: jax.Array,
  num_tasks: int,
  label: str,
) -> dict[str, np.ndarray]:
  """Accuracy on each of `num_tasks` tasks, by protocol, a few tasks a call under a progress bar."""
  parts = []
  with tqdm(total=num_tasks, unit="task", desc=label, leave=False) as bar:
    for first in range(0, num_tasks, TASKS_PER_CALL):
      parts.append(jax.device_get(judge(params, inner_state, key, jax.numpy.int32(first))))
      bar.update(min(TASKS_PER_CALL, num_tasks - first))
  return {name: np.concatenate([part[name] for part in parts])[:num_tasks] for name in PROTOCOLS}


def with_interval(values: dict[str, np.ndarray]) -> Record:
  """`{protocol: {"accuracy", "interval95"}}`, as fractions."""
  summary = {}
  for name in PROTOCOLS:
    mean, interval = metajax.mean_and_interval(values[name])
    summary[name] = {"accuracy": round(mean, 6), "interval95": round(interval, 6)}
  return summary


def percent(cell: Record) -> str:
  return f"{100 * cell['accuracy']:.2f} +- {100 * cell['interval95']:.2f} %"


def _summary(record: Record) -> str:
  cells = [
    f"{split} {name} {percent(record[split][name])}"
    for split in ("train", "test")
    for name in PROTOCOLS
  ]
  return f"step {record['step']}: " + ", ".join(cells)


def draw_learning_curve(records: list[Record], path: Path) -> None:
  """Accuracy against meta-steps, both protocols, train and test tasks, with 95 % intervals."""
  figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
  steps = [record["step"] for record in records]
  for split, style in (("test", "-"), ("train", "--")):
    for name, color in zip(PROTOCOLS, ("tab:blue", "tab:orange"), strict=True):
      cells = [record[split][name] for record in records]
      mean = 100 * np.array([cell["accuracy"] for cell in cells])
      interval = 100 * np.array([cell["interval95"] for cell in cells])
      axes.plot(steps, mean, style, color=color, marker=".", label=f"{split} tasks, {name}")
      if split == "test":
        axes.fill_between(steps, mean - interval, mean + interval, color=color, alpha=0.2, lw=0)
  axes.set_xlabel("meta-steps")
  axes.set_ylabel("accuracy after adaptation (%)")
  axes.grid(alpha=0.3)
  axes.legend(
    loc="lower right", title="band: 95 % interval over tasks", fontsize=8, title_fontsize=8
  )
  figure.savefig(path, dpi=150)
  plt.close(figure)
