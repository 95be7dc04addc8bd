"""Several processes, on one host or many, that share one run."""

import re
from dataclasses import dataclass

import jax

from experiments.settings import Settings, option


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Processes(Settings):
  """Several processes that share one run; see docs/devices.md."""

  distributed: bool = option(False,
    "This process is one of several that share the run. JAX finds the others by what Slurm or the "
    "cloud TPU says about them.")
  coordinator_address: str | None = option(None, "HOST:PORT of process 0.")
  num_processes: int | None = option(None, "How many processes share the run.", at_least=1)
  process_id: int | None = option(None, "Which of them this is, from 0.", at_least=0)

  def __post_init__(self) -> None:
    super().__post_init__()
    given = [self.coordinator_address, self.num_processes, self.process_id]
    if given == [None] * 3:
      return
    if self.distributed or None in given:
      raise ValueError(
        "--coordinator_address, --num_processes and --process_id go together, without --distributed"
      )
    if not re.fullmatch(r".+:\d+", self.coordinator_address or ""):
      raise ValueError(f"--coordinator_address={self.coordinator_address} must be HOST:PORT")
    if (self.process_id or 0) >= (self.num_processes or 0):
      raise ValueError(
        f"--process_id={self.process_id} must be from 0 to --num_processes={self.num_processes} "
        "less 1"
      )
# fmt: on


def join(processes: Processes) -> None:
  """Makes this process one of several that share a run, if the flags say so."""
  if not (processes.distributed or processes.coordinator_address):
    return
  try:
    jax.distributed.initialize(
      processes.coordinator_address, processes.num_processes, processes.process_id
    )
  except (RuntimeError, ValueError) as error:
    why = str(error).splitlines()[0]
    advice = "see that the coordinator's address is right and its port free"
    if processes.distributed:
      advice += (
        "; without Slurm or a TPU, give --coordinator_address, --num_processes and --process_id in "
        "place of --distributed"
      )
    raise ValueError(f"the processes do not find each other ({why}): {advice}") from error
