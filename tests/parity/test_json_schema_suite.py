"""The official JSON Schema test suite, draft 2020-12, out of the source package of the installed jsonschema.

Whatever a schema allows passes its mask, and what it forbids is refused, unless a keyword is named as left to the final
check; and that one agrees. As a program it prints the counts.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # as a program
import metaalign_edge as edge
from metaalign_edge_runtime.structured import Schema, fault, make_schema
from metaalign_edge_runtime.structured.mask import Constraint, Vocabulary

PACKAGE = "jsonschema"
CACHE = Path(__file__).parent.parent.parent / ".cache"
END = 256
TEXTS = [*(bytes([byte]) for byte in range(END)), b""]
LETTERS = Vocabulary(TEXTS.__getitem__, END.__eq__, lambda _: False, lambda: TEXTS)
ORDERS = 1000  # of properties that are tried
FREE_FORMATS = (
    "idn-hostname json-pointer relative-json-pointer iri iri-reference uri-reference uri-template regex".split()
)
UNJUDGED = {"$schema", "dependencies", *(f"format '{name}'" for name in FREE_FORMATS)}  # by jsonschema, as it is


def suite() -> Path:
    """Return the folder of the suite's tests; download it if it is not there."""
    version = importlib.metadata.version(PACKAGE)
    root = CACHE / f"{PACKAGE}-{version}"
    if not root.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as own:  # another worker may be at the same
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", own]
            subprocess.run([*command, f"{PACKAGE}=={version}"], check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(Path(own, root.name + ".tar.gz")) as archive:
                archive.extractall(own, filter="data")
            with contextlib.suppress(OSError):
                Path(own, root.name).rename(root)  # only when it is whole, and the first
    return root / "json" / "tests" / "draft2020-12"


class Case(NamedTuple):
    """A schema of the suite, and values that fit it or do not."""

    file: str
    about: str
    document: Any
    values: list[tuple[str, Any, bool]]  # about, value, whether it fits


def cases() -> Iterator[Case]:
    """Yield the suite."""
    root = suite()
    for path in sorted(root.rglob("*.json")):
        for group in json.loads(path.read_text()):
            values = [(test["description"], test["data"], test["valid"]) for test in group["tests"]]
            yield Case(path.relative_to(root).as_posix(), group["description"], group["schema"], values)


def spellings(value: Any) -> Iterator[str]:
    """Write a value as JSON, its properties in any order; numbers without an exponent, whole ones without a point."""
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            for parts in itertools.product(*(list(spellings(value[name])) for name in names)):
                pairs = (f"{quoted(name)}: {part}" for name, part in zip(names, parts, strict=True))
                yield f"{{{', '.join(pairs)}}}"
    elif isinstance(value, list):
        for parts in itertools.product(*map(list, map(spellings, value))):
            yield f"[{', '.join(parts)}]"
    elif isinstance(value, float):
        yield str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")
    else:
        yield quoted(value)


def quoted(value: Any) -> str:
    """Write a value that has no parts."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def passes(schema: Schema, value: Any) -> bool:
    """Tell whether a mask lets a value through, token by token, in some order of its properties."""
    for text in itertools.islice(spellings(value), ORDERS):
        constraint = Constraint(schema.mask, LETTERS)
        for token in text.encode():
            if not constraint.fits(token):
                break
            constraint.accept(token)
        else:
            if constraint.fits(END):
                return True
    return False


def outcome(case: Case) -> Iterator[tuple[str, str]]:
    """Yield, for each value of a case, what became of it, and of which value that is said."""
    try:
        schema = make_schema(case.document)
    except edge.UsageError as error:
        reason = next((words for words in ("nothing is fetched", "not an object") if words in str(error)), "")
        for about, _, fits in case.values:
            if "nothing fits" in str(error) and not fits:
                yield "invalid, and the schema refused: nothing fits it", about
            else:
                yield f"the schema refused: {reason}" if reason else "WRONG: the schema refused", f"{about}: {error}"
        return
    names = sorted({note.partition(" at ")[0] for note in schema.relaxed})
    named = f": {', '.join(names)}"
    for about, value, fits in case.values:
        passed, judged = passes(schema, value), fault(json.dumps(value), schema) is None
        if case.file == "format.json" and fits and not (passed and judged):
            yield "a format, which holds here and is an annotation there", about
        elif fits and not passed and "$schema" not in names:
            yield "WRONG: valid, and refused", about
        elif passed and not fits and not names:
            yield "WRONG: invalid, and passed, and nothing is named", about
        elif judged != fits and not UNJUDGED.intersection(names):
            yield "WRONG: so says the final check", about
        elif fits:
            yield "valid, and passed" if passed else "valid, and refused" + named, about
        else:
            yield "invalid, and passed" + named if passed else "invalid, and refused", about


@pytest.mark.parametrize("folder", ["", "optional", "optional/format"])
def test_a_mask_passes_what_is_valid_and_names_what_it_leaves_out(folder: str) -> None:
    found = [
        (case.file, case.about, *one)
        for case in cases()
        if str(Path(case.file).parent) == (folder or ".")
        for one in outcome(case)
    ]
    assert len(found) > 100
    assert not [one for one in found if one[2].startswith("WRONG")]


def main() -> None:
    """Print how many values of the suite came to what end."""
    counts: collections.Counter[str] = collections.Counter()
    for case in cases():
        for what, about in outcome(case):
            counts[what] += 1
            if what.startswith("WRONG"):
                print(f"{what}\n    {case.file}: {case.about}: {about}\n    {json.dumps(case.document)[:200]}")
    for what, count in counts.most_common():
        print(f"{count:6,}  {what}")
    print(f"{counts.total():6,}  in all")


if __name__ == "__main__":
    main()
