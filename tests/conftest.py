"""Shared by the tests: one compilation cache, double precision, and data that may be absent."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Nearly all of the tests' time is compiling. Workers and child processes inherit the cache, so that
# a program is compiled once in a session, whoever needs it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="metajax-tests-")
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Programs of the tests are small: it pays to compile them fast rather than well.
_flags = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later ones do not know this flag
  _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}"

import jax
import pytest
from archives import CHARACTERS, members, write_tar

import metajax
from experiments import build
from metajax.data import glyphs as drawn_glyphs
from metajax.data import omniglot

jax.config.update("jax_num_cpu_devices", 4)  # devices to spread tasks over; one is used by default

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Otherwise a process holds the programs of all its tests in the end, gigabytes of them."""
  yield
  jax.clear_caches()


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def shared():
  """A function from a name in ../shared to its path; the test is skipped where it is absent."""

  def path(name):
    if not (SHARED / name).exists():
      pytest.skip(f"../shared/{name} is not here: it is data that the project may not hold")
    return SHARED / name

  return path


@pytest.fixture(scope="session")
def splits():
  """Few glyphs, enough for tiny runs."""
  return drawn_glyphs.load(train_classes=20, test_classes=5)


@pytest.fixture
def small_omniglot(monkeypatch):
  monkeypatch.setattr(omniglot, "ARCHIVES", CHARACTERS)
  monkeypatch.setattr(omniglot, "_TRAIN_CHARACTERS", 5)


@pytest.fixture
def mini(tmp_path):
  folder = tmp_path / "mini"
  folder.mkdir()
  write_tar(folder / "train.tar.gz", members("train", {"n01": 3, "n02": 2}))
  write_tar(folder / "train_rest.tar.gz", members("train", {"n02": 2}, seed=1, first=50))
  write_tar(folder / "test.tar.gz", members("test", {"n09": 2}))
  return folder


@pytest.fixture
def linear_network(monkeypatch):
  """Experiments have a linear network, which compiles in no time."""

  def linear(recipe):
    pixels = 84 * 84 * 3 if recipe.dataset == "mini_imagenet" else 28 * 28
    init = lambda key: {"kernel": jax.random.normal(key, (pixels, recipe.ways))}
    apply = lambda params, images: (images - 0.5).reshape(-1, pixels) @ params["kernel"] / 28
    return metajax.Model(init, apply)

  monkeypatch.setattr(build, "_model", linear)


@pytest.fixture
def glyphs(monkeypatch, splits, linear_network):
  """Experiments run on a few glyphs, with a linear network."""
  monkeypatch.setattr(build, "load", lambda recipe: splits)


@pytest.fixture
def one_device(monkeypatch):
  """For what does not depend on how many there are: a program is compiled for each device."""
  devices = jax.devices()
  monkeypatch.setattr(jax, "devices", lambda: devices[:1])
