"""config.json: absent keys are filled in as transformers does it, and every number is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metaalign_edge_runtime.errors import LoadError, some

# The parameters of each kind of RoPE scaling: `?` marks those that may be absent, `*` lists of numbers.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "extrapolation_factor?",
        "attention_factor?",
        "beta_fast?",
        "beta_slow?",
    ),
    "longrope": ("long_factor*", "short_factor*", "original_max_position_embeddings?", "factor?"),
    "dynamic": ("factor",),
}
ROPE_ALIASES = {"su": "longrope"}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a model: its base frequency, and the parameters of its scaling."""

    kind: str  # a key of ROPE_KINDS
    theta: float
    parameters: Mapping[str, float]
    lists: Mapping[str, list[float]]
    share: float  # of each head that is rotated, up to 1


class Config:
    """The values of config.json, or the defaults of the model's class. A value is checked when it is read."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Lay `values` over `defaults`; a null counts as absent, as it does in transformers."""
        self._values = {**defaults, **{key: value for key, value in values.items() if value is not None}}
        # Only here does null differ from the default of the class: it means that there is no window.
        if "sliding_window" in values:
            self._values["sliding_window"] = values["sliding_window"]

    def changed(self, **values: Any) -> Config:
        """Return a copy of the configuration with some values replaced."""
        return Config({**self._values, **values}, {})

    def get(self, name: str) -> Any:
        """Return the unchecked value of `name`, None if it is absent."""
        return self._values.get(name)

    def flag(self, name: str) -> bool:
        """Return a boolean; an absent one is False."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise LoadError(f"config.json: {name} is {value!r}, not true or false")
        return bool(value)

    def integer(self, *names: str, high: int = 2**31 - 1) -> int:
        """Return the value of the first of `names` that is there, a whole number from 1 to `high`."""
        name, value = self._first(names)
        if type(value) is not int or not 1 <= value <= high:
            raise LoadError(f"config.json: {name} is {value!r}, not a whole number from 1 to {high:,}")
        return value

    def number(self, *names: str) -> float:
        """Return the value of the first of `names` that is there, a number above 0."""
        return positive(*self._first(names))

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if self.get(name) is not None:
                return name, self._values[name]
        raise LoadError(f"config.json: {' or '.join(names)} is missing")

    @property
    def head_dim(self) -> int:
        """Return the size of an attention head."""
        if self.get("head_dim") is not None:
            size = self.integer("head_dim")
        else:
            hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
            if hidden % heads:
                raise LoadError(f"config.json: hidden_size {hidden} cannot be shared among {heads} heads")
            size = hidden // heads
        if size % 2:
            raise LoadError(f"config.json: heads of size {size}, but RoPE turns pairs; head_dim must be even")
        return size

    @property
    def rope(self) -> Rope:
        """Return the RoPE of the layers, from `rope_parameters` (transformers 5) or `rope_scaling` (4).

        Where layers with a sliding window differ, this is the RoPE of the layers with full attention.
        """
        given = self._rope_given
        return self._rope(given.get("full_attention", given))

    @property
    def local_rope(self) -> Rope | None:
        """Return the RoPE of the layers with a sliding window, None if it is that of all layers."""
        given = self._rope_given
        if "sliding_attention" in given:
            return self._rope(given["sliding_attention"])
        theta = self.get("rope_local_base_freq")
        return None if theta is None else Rope("default", positive("rope_local_base_freq", theta), {}, {}, 1)

    @property
    def _rope_given(self) -> dict[str, Any]:
        given = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise LoadError(f"config.json: {given!r} is no set of RoPE parameters")
        nested = {key for key, value in given.items() if isinstance(value, dict)}
        if nested and not nested == given.keys() == {"full_attention", "sliding_attention"}:
            raise LoadError(f"config.json: RoPE for {some(sorted(given))}; known are full and sliding attention")
        return given

    def _rope(self, given: dict[str, Any]) -> Rope:
        values = {"original_max_position_embeddings": self.get("original_max_position_embeddings"), **given}
        kind = values.get("rope_type") or values.get("type") or "default"
        kind = ROPE_ALIASES.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in ROPE_KINDS:
            raise LoadError(
                f"config.json: RoPE of type {kind!r} is not known; llama.cpp would ignore it and answer wrongly "
                f"(known: {', '.join(ROPE_KINDS)})"
            )
        wanted = {key.rstrip("?*"): key[-1] for key in ROPE_KINDS[kind]}
        unknown = sorted(key for key in given if key not in wanted and key not in ROPE_COMMON)
        if unknown:
            raise LoadError(f"config.json: RoPE of type {kind!r} with {some(unknown)} cannot be written as GGUF")
        parameters, lists = {}, {}
        for key, mark in wanted.items():
            name = f"{key} (RoPE {kind!r})"
            if mark == "*":
                lists[key] = positives(name, values.get(key))
            elif values.get(key) is not None or mark != "?":
                parameters[key] = positive(name, values.get(key))
        theta = given.get("rope_theta") or self.number("rope_theta")
        shares = (values.get("partial_rotary_factor"), self.get("partial_rotary_factor"), 1)
        share = positive("partial_rotary_factor", next(value for value in shares if value is not None))
        return Rope(kind, positive("rope_theta", theta), parameters, lists, share)


def positives(name: str, values: Any) -> list[float]:
    """Return `values`, checked to be a list of finite numbers above 0. Raises LoadError."""
    if not isinstance(values, list):
        raise LoadError(f"config.json: {name} is {values!r}, not a list of numbers")
    return [positive(name, value) for value in values]


def positive(name: str, value: Any) -> float:
    """Return `value`, checked to be a finite number above 0; an integer stays one. Raises LoadError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
        raise LoadError(f"config.json: {name} is {value!r}, not a number above 0")
    return value
