"""Shared by the tests: double precision where it is asked for, and the data that may be absent."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # devices to spread tasks over; one is used by default

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
