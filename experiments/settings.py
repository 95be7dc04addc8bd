"""Groups of settings: frozen dataclasses that are checked when they are made."""

import math
import types
import typing
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

import numpy as np


def option(default: Any, help: str, **limits: Any) -> Any:
  """A setting with its default value and the text that `--help` shows.

  Args:
    default: its value if it is not given.
    help: one or two sentences.
    **limits: `at_least=n` for a whole number; `above=0` or `not_below=0` for a float; `among=names`
      for a tuple of some of these names.
  """
  return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class Settings:
  """A group of settings. Making one with a value of the wrong type or range is a ValueError."""

  def __post_init__(self) -> None:
    hints = typing.get_type_hints(type(self))
    for one in fields(self):
      _check(one, hints[one.name], getattr(self, one.name))


def as_text(value: Any) -> str:
  """The value as it is written after `--name=`."""
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def kind_of(hint: Any) -> tuple[Any, bool]:
  """Splits a type such as `int | None` into `int` and whether None is allowed."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    (kind,) = (part for part in typing.get_args(hint) if part is not type(None))
    return kind, True
  return hint, False


def _check(setting: Field, hint: Any, value: Any) -> None:
  kind, optional = kind_of(hint)
  if value is None and optional:
    return
  given, limits = f"--{setting.name}={as_text(value)}", setting.metadata
  if typing.get_origin(kind) is Literal:
    if value not in typing.get_args(kind):
      raise ValueError(f"{given} must be one of {', '.join(typing.get_args(kind))}")
    return
  if typing.get_origin(kind) is tuple:
    entry = typing.get_args(kind)[0]
    if not isinstance(value, tuple) or not value or not all(_is(entry, one) for one in value):
      what = "names" if entry is str else "whole numbers" if entry is int else "numbers"
      raise ValueError(f"{given} must be {what} separated by commas")
    if "among" in limits and (set(value) - set(limits["among"]) or len(set(value)) < len(value)):
      among = ", ".join(limits["among"])
      raise ValueError(f"{given} must be any of {among}, separated by commas, each once")
    numbers = value
  else:
    if not _is(kind, value):
      names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
      raise ValueError(f"{given} must be {names[kind]}")
    numbers = (value,)
  for number in numbers:
    if "at_least" in limits and number < limits["at_least"]:
      raise ValueError(f"--{setting.name}={number} must be at least {limits['at_least']}")
    if kind is int and number >= 2**32:
      raise ValueError(f"{given} must be below 2^32")
    if "above" in limits and not limits["above"] < in_float32(number) < math.inf:
      raise ValueError(f"{given} must be positive and finite")
    if "not_below" in limits and not limits["not_below"] <= in_float32(number) < math.inf:
      raise ValueError(f"{given} must be finite and not negative")


def _is(kind: type, value: Any) -> bool:
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def in_float32(value: float) -> float:
  """The value that JAX computes with: what float32 cannot hold becomes infinite or 0."""
  with np.errstate(over="ignore", under="ignore"):
    return float(np.float32(value))


def values_of(settings: Settings, *groups: type[Settings]) -> dict[str, Any]:
  """The names and values of the settings of these groups, without those that are None."""
  names = [one.name for group in groups for one in fields(group)]
  return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
