"""Values for variables that a template takes besides the dialog: `reasoning_effort`, `thinking_budget` and their like.

A text in a value is followed into the prompt as a tier's text is, under the name `template_arg`: on benign text the
tokens are those of the reference, and a marker in it is spelled out. It is no text of System Info, although the same
hand wrote it: a template that drops System Info and writes an argument would otherwise pass for one that writes it.
Numbers and truth values hold no marker, and are scaffold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from metaalign_edge_runtime.errors import UsageError

from .tier_text import TierText

OPTION_OF = {"enable_thinking": "--think", "thinking": "--think"}  # variables that an option of their own sets
OURS = (
    "messages turns system_info user_info bos_token eos_token add_generation_prompt tools documents functions "
    "raise_exception strftime_now"
).split()
JINJA = "self loop caller varargs kwargs range dict lipsum cycler joiner namespace".split()


def parse_argument(text: str) -> tuple[str, Any]:
    """Split `NAME=VALUE`; the value is JSON if it reads as JSON, else a text.

    Raises:
        UsageError: there is no name or no equals sign, or `checked_arguments` refuses them.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--template-arg takes NAME=VALUE, as reasoning_effort=low, not {text!r}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found: Any = value
    try:
        found = json.loads(value, parse_constant=refuse)
    except ValueError:  # no JSON, or a number of thousands of digits
        pass
    except RecursionError:
        raise UsageError(f"the template argument {name} nests too deep") from None
    return name, checked_arguments({name: found})[name]


def checked_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, by name, if a template can be given them.

    Raises:
        UsageError: a name is none, or is set by this program or by Jinja; or a value is not made of JSON's types, or
            holds a lone surrogate.
    """
    for name, value in values.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"{name!r} is no name of a template's variable: write NAME=VALUE, as reasoning_effort=low")
        if name in OPTION_OF:
            raise UsageError(f"the template's variable {name} is set by {OPTION_OF[name]}: say that instead")
        if name in OURS or name in JINJA:
            whose = "this program" if name in OURS else "Jinja"
            raise UsageError(f"the template's variable {name} is set by {whose}: an argument has another name")
        try:
            json.dumps(followed(value), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(f"the template argument {name} holds a lone surrogate: re-encode the text") from None
        except RecursionError:
            raise UsageError(f"the template argument {name} nests too deep") from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"the template argument {name} cannot be used: {error}") from None
    return dict(values)


def followed(value: Any) -> Any:
    """Return a value whose texts are marked, so that they can be told from the scaffold that they are written into.

    Raises:
        TypeError: it is not made of JSON's types.
    """
    if isinstance(value, str):
        return TierText.of(str.__str__(value), "template_arg")
    if isinstance(value, Mapping):
        return {followed(key): followed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [followed(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} is none of JSON's types")
