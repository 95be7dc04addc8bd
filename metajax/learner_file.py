"""The file of a learner: its numbers in the safetensors format, and its recipe as JSON."""

import json
import os
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from metajax.devices import in_any_process
from metajax.types import leaf_name

_FORMAT = 1  # the version of the file format


class Recipe(NamedTuple):
  """How a learner adapts, and what is known about it; a learner file holds it as JSON.

  Attributes:
    inner_optimizer: a function of optax and its arguments, as `{"name": "sgd", "learning_rate":
      0.1}`.
    steps: the number of inner steps of an adaptation.
    batch_size: the examples in the minibatch of a step.
    loss: a function of `metajax.losses` and its reduction, as `{"name": "cross_entropy",
      "reduction": "mean"}`.
    frozen: inner steps do not move parameters whose names contain one of these strings.
    network: the `Model.spec` of the network, or None for a network of the user's own.
    carried: whether every task starts from the optimizer's trained state, as with
      `metajax.carried`.
    inputs: for each leaf of the inputs, by its name, the shape of an example and the dtype.
    about: anything else that JSON can hold, such as class names, accuracy or data.
    version: the version of metajax that wrote the file.
  """

  inner_optimizer: dict[str, Any]
  steps: int
  batch_size: int
  loss: dict[str, Any]
  frozen: Sequence[str]
  network: dict[str, Any] | None
  carried: bool
  inputs: dict[str, Any]
  about: dict[str, Any]
  version: str


def write(path: Path, recipe: Recipe, arrays: dict[str, Any]) -> None:
  """Writes the file, with a checksum of the numbers and one of the recipe.

  If several processes share the run, the first one writes, and the others wait for it.

  Raises:
    ValueError: if the recipe holds something else than numbers, strings, lists and dicts of them.
    OSError: if the file cannot be written. An older one is kept then.
  """
  try:
    content = json.loads(json.dumps(recipe._asdict(), default=_number))
  except TypeError as error:
    raise ValueError(
      f"inner_optimizer, loss and about must be numbers, strings, lists and dicts of them ({error})"
    ) from error
  checksums = {"crc32": _checksum(arrays), "recipe_crc32": _recipe_checksum(content)}
  header = json.dumps({"format": _FORMAT, "recipe": content, **checksums})
  failure = None
  if jax.process_index() == 0:
    try:
      _replace(path, safetensors.numpy.save(arrays, metadata={"metajax": header}))
    except Exception as error:  # the others must not wait for ever
      failure = error
  if in_any_process(failure is not None):  # all wait for the first one
    raise failure or OSError(f"{path} cannot be written by the first process, which says why")


def _replace(path: Path, content: bytes) -> None:
  """Writes a file that is there whole or not at all."""
  beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    beside.write_bytes(content)
    beside.replace(path)
  except OSError as error:
    raise OSError(f"{path} cannot be written ({error.strerror})") from error
  finally:
    with suppress(OSError):  # of a folder that is not there, say; the first error says more
      beside.unlink()


def read(path: str | os.PathLike) -> tuple[Path, Recipe, dict[str, np.ndarray]]:
  """Reads a file, or the learner of this name that comes with metajax.

  Returns:
    The path of the file, and its recipe and arrays.

  Raises:
    ValueError: if there is no such file, or it is damaged.
  """
  path = _found(path)
  try:
    with safetensors.safe_open(path, framework="flax") as file:
      header = json.loads((file.metadata() or {}).get("metajax", "{}"))
      kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
      if kinds & {"F64", "I64", "U64"} and jax.dtypes.canonicalize_dtype(float) != np.float64:
        raise ValueError(f"{path} has numbers of 64 bits: set jax_enable_x64 before reading it")
      arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
    raise ValueError(f"{path} is no learner file, or it is damaged ({error})") from error
  content: Any = header.get("recipe") if isinstance(header, dict) else None
  fields = set(content) if isinstance(content, dict) else None
  sums = {"crc32", "recipe_crc32"}
  if fields != set(Recipe._fields) or header.get("format") != _FORMAT or not sums <= set(header):
    raise ValueError(
      f"{path} is no learner file of format {_FORMAT}: write it with metajax.save, or read it with "
      "the version of metajax that wrote it"
    )
  if header["crc32"] != _checksum(arrays):
    raise ValueError(f"{path} is damaged: its numbers are not those that were saved")
  if header["recipe_crc32"] != _recipe_checksum(content):
    raise ValueError(f"{path} is damaged: its recipe is not the one that was saved")
  return path, Recipe(**content), arrays


def named(tree: Any, prefix: str = "") -> dict[str, Any]:
  """The leaves of a tree by name, such as `params/Conv_0/kernel`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(filter(None, (prefix, leaf_name(path)))): leaf for path, leaf in leaves}


def filled(path: Path, prefix: str, like: Any, arrays: dict[str, np.ndarray]) -> Any:
  """The tree `like` with the numbers of a file, in the dtypes that they have there."""
  expected = named(like, prefix)
  found = {name: array for name, array in arrays.items() if name.split("/")[0] == prefix}
  for name in {**expected, **found}:
    shapes = [
      str(np.shape(leaves[name])) if name in leaves else "missing" for leaves in (found, expected)
    ]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f"{path} does not fit the network: {name} is {shapes[0]} in the file and {shapes[1]} in "
        "the network: load it with the network that it was saved with"
      )
  leaves = [jnp.asarray(found[name]) for name in expected]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _found(path: str | os.PathLike) -> Path:
  """The file at this path, or the one that comes with metajax under this name."""
  home = resources.files("metajax") / "learners"
  shipped = sorted(Path(str(home)).glob("*.safetensors"))
  given = Path(path).expanduser()
  for file in shipped:
    if str(path) == file.stem and not given.is_file():
      return file
  if not given.is_file():
    names = ", ".join(file.stem for file in shipped)
    raise ValueError(f"{path} is neither a file nor the name of a learner of metajax ({names})")
  return given


def _checksum(arrays: dict[str, np.ndarray]) -> int:
  checksum = 0
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    checksum = zlib.crc32(array.view(np.uint8).data, zlib.crc32(name.encode(), checksum))
  return checksum


def _recipe_checksum(content: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _number(value: Any) -> Any:
  """NumPy's numbers as Python's, for JSON."""
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} is none of them")
