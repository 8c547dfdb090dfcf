"""IFEval's prompts and checkers as a suite: its instructions stand in System Info, in User Info, or in the query alone.

The rows are Google's ("Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911), the checkers
those of `lm-eval`; to move the instruction to System Info is System-IFEval's idea. Nothing is downloaded: two kinds of
instruction need the sentence tokenizer of NLTK's data, and are left out where that is not installed.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from metaalign_edge_runtime.errors import UsageError

from .checkers import CHECKERS
from .dialogs import Check
from .statistics import rate
from .suite import Case, Judged, suite_lines

__all__ = ["MISSING", "TIERS", "WHERE", "is_ifeval", "judged_by_instruction", "missing", "read_ifeval", "summary"]

TIERS = ("system", "user", "query")
WHERE = (
    "IFEval's prompts are not part of this program, and nothing is downloaded unasked: get ifeval_input_data.jsonl "
    "(huggingface.co/datasets/google/IFEval, Apache-2.0) and name it: --suite ifeval_input_data.jsonl"
)
MISSING = 'IFEval needs the checkers of lm-eval: pip install "metaalign-edge[eval]"'
_PROBE = "Tea is a drink. It is hot."


def is_ifeval(path: Path) -> bool:
    """Tell whether a file's first line has IFEval's fields.

    Raises:
        NotFound: it cannot be read.
    """
    line = next((line for line in suite_lines(path) if line.strip()), b"")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "instruction_id_list" in row


def missing() -> bool:
    """Tell whether a package that the checkers need is not installed."""
    return not all(map(find_spec, ("lm_eval", "nltk", "langdetect", "immutabledict")))


def read_ifeval(path: Path, tier: str = "system") -> tuple[list[Case], list[str]]:
    """Read IFEval's rows; return the cases, and the kinds of instruction that cannot be checked here.

    Cases of the section `prompt` have only instructions that can be checked, those of `part` some. Others are left out.

    Raises:
        UsageError: a line is no row of IFEval's. NotFound: the file cannot be read.
    """
    cases: list[Case] = []
    unchecked: set[str] = set()
    for number, line in enumerate(suite_lines(path), 1):
        if line.strip():
            try:
                case, left = _case(json.loads(line.decode("utf-8")), tier)
            except RecursionError:
                raise UsageError(f"{path}, line {number}: not JSON (nested too deeply): one object a line") from None
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: no row of IFEval's: {error}") from None
            unchecked.update(left)
            cases += [case] if case.checks else []
    if not cases:
        raise UsageError(f"{path} holds no instruction that can be checked here")
    return cases, sorted(unchecked)


def _case(row: Any, tier: str) -> tuple[Case, list[str]]:
    """Return the case that a row describes, and its instructions that cannot be checked.

    Raises:
        ValueError: it is no such row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} where an object belongs")
    prompt, names, kwargs = (row.get(key) for key in ("prompt", "instruction_id_list", "kwargs"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("field 'prompt' must be a text")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("field 'instruction_id_list' must be a list of texts")
    if not isinstance(kwargs, list) or len(kwargs) != len(names) or not all(isinstance(one, dict) for one in kwargs):
        raise ValueError("field 'kwargs' must be a list with an object for each instruction")
    key = str(row.get("key", prompt))
    said = [_instruction(key, name, given) for name, given in zip(names, kwargs, strict=True)]
    checks = [
        Check(name, "ifeval", {"instruction": name, "arguments": arguments, "prompt": prompt})
        for name, (_, arguments) in zip(names, said, strict=True)
        if _can_check(name)
    ]
    text = "\n".join(description for description, _ in said)
    case = Case(
        id=f"ifeval/{key}",
        section="prompt" if len(checks) == len(names) else "part",
        queries=(prompt,),
        system_info=text if tier == "system" else "",
        user_info=text if tier == "user" else "",
        checks=tuple(checks),
    )
    return case, [name for name in names if not _can_check(name)]


def _instruction(key: str, name: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return an instruction in words, and its arguments. Those that the row leaves out are drawn, seeded by its key."""
    kind = _registry().get(name)
    if kind is None:
        raise ValueError(f"no instruction is called {name!r}")
    instruction = kind(name)
    before = random.getstate()  # lm-eval draws with Python's global generator
    random.seed(f"{key}/{name}")
    try:
        kept = {argument: value for argument, value in given.items() if value}  # as lm-eval reads a row
        description = str(instruction.build_description(**kept))
        return description, {**(instruction.get_instruction_args() or {}), **kept}
    except Exception as error:  # foreign arguments may raise anything
        raise ValueError(f"{name} does not take the arguments {given} ({error})") from None
    finally:
        random.setstate(before)


def follows(response: str, instruction: str, arguments: dict[str, Any], prompt: str) -> bool:
    """Tell whether a response follows an instruction, strictly: lm-eval's own verdict."""
    _registry()
    from lm_eval.tasks.ifeval import utils

    example = utils.InputExample(key=0, instruction_id_list=[instruction], prompt=prompt, kwargs=[arguments])
    return bool(utils.test_instruction_following_strict(example, response).follow_all_instructions)


@cache
def _can_check(name: str) -> bool:
    """Tell whether a kind of instruction can be checked here: some need NLTK's data."""
    instruction = _registry()[name](name)
    keys = instruction.get_instruction_args_keys()
    try:
        instruction.build_description(**({"prompt_to_repeat": _PROBE} if "prompt_to_repeat" in keys else {}))
        instruction.check_following(_PROBE)
    except LookupError:
        return False
    return True


@cache
def _registry() -> dict[str, Any]:
    """Import lm-eval's instructions without a download, and register them as the checker `ifeval`."""
    import langdetect
    import nltk

    with _no_download(nltk):
        from lm_eval.tasks.ifeval import instructions_registry
    langdetect.DetectorFactory.seed = 0  # it guesses with random numbers
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    CHECKERS["ifeval"] = follows
    return dict(instructions_registry.INSTRUCTION_DICT)


@contextmanager
def _no_download(nltk: Any) -> Iterator[None]:
    """Keep lm-eval from downloading NLTK's data while it is imported, and from printing that it did."""
    download, nltk.download = nltk.download, lambda *_, **__: False
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        nltk.download = download


def judged_by_instruction(judged: Iterable[Judged]) -> list[Judged]:
    """Return the judged prompts, each followed by its instructions one by one, in the section `instruction`."""
    found = []
    for one in judged:
        found.append(one)
        for check in one.case.checks:
            found.append(replace(one, case=replace(one.case, section="instruction", checks=(check,))))
    return found


def summary(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return IFEval's strict rates: by prompt, by instruction, and for each kind of instruction."""
    single = [one for one in judged if one.case.section == "instruction"]
    kinds = sorted({one.case.checks[0].key for one in single})
    return {
        "ifeval": {
            "prompt_strict": rate(one.obeyed for one in judged if one.case.section == "prompt"),
            "instruction_strict": rate(one.obeyed for one in single),
            "by_instruction": {
                kind: rate(one.obeyed for one in single if one.case.checks[0].key == kind) for kind in kinds
            },
        }
    }
