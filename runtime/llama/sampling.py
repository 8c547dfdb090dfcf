"""By what tokens are drawn: the parameters, their built-in values and bounds, and where a value comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict


class Parameter(NamedTuple):
    """A number by which tokens are drawn."""

    option: str  # the name of its option, without dashes
    key: str  # under which a model recommends a value: general.sampling.<key>
    built_in: float  # where nobody says anything else
    least: float
    most: float


SAMPLING_PARAMETERS: Mapping[str, Parameter] = {  # by the name that Python and --json know them by
    "temperature": Parameter("temp", "temp", 0.7, 0, math.inf),
    "top_k": Parameter("top_k", "top_k", 40, 0, math.inf),
    "top_p": Parameter("top_p", "top_p", 0.95, 0, 1),
    "min_p": Parameter("min_p", "min_p", 0.05, 0, 1),
    "repeat_penalty": Parameter("repeat_penalty", "penalty_repeat", 1.0, 0.1, math.inf),
}

SamplingValue = TypedDict(
    "SamplingValue", {"value": float, "from": str}
)  # a value, and what gave it: see `choose_sampling`


def recommended(metadata: Mapping[str, Any], one: Parameter) -> float | None:
    """Return the value that a model's file recommends; None if it has none, or one that makes no sense."""
    value = metadata.get(f"general.sampling.{one.key}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not (math.isfinite(value) and one.least <= value <= one.most):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")  # of 32 bits: 0.7, not 0.699999988


def choose_sampling(
    given: Mapping[str, float | None], sources: Mapping[str, str], metadata: Mapping[str, Any]
) -> dict[str, SamplingValue]:
    """Return the value of every parameter, and what gave it: the caller, the model or the built-in table.

    Args:
        given: the caller's values; None leaves the choice to the model.
        sources: what gave the caller's values (`flag`, `config file`, …), by option; `call` where nothing is said.
        metadata: of the model's file.
    """
    chosen: dict[str, SamplingValue] = {}
    for name, one in SAMPLING_PARAMETERS.items():
        if (value := given[name]) is not None:
            chosen[name] = {"value": value, "from": sources.get(one.option, "call")}
        elif (value := recommended(metadata, one)) is not None:
            chosen[name] = {"value": value, "from": "model"}
        else:
            chosen[name] = {"value": one.built_in, "from": "built-in"}
    if given["temperature"] and chosen["top_k"] == {"value": 1, "from": "model"}:
        # a model that recommends greedy decoding must not undo a temperature that was asked for
        chosen["top_k"] = {"value": SAMPLING_PARAMETERS["top_k"].built_in, "from": "built-in"}
    return chosen
