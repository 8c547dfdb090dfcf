"""An answer as a JSON document: what `--json` prints, and a row of `batch`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import Any

from metaalign_edge import Answer
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.structured import Schema


def answer_document(answer: Answer, schema: Schema | None) -> dict[str, Any]:
    """Return an answer's fields; a response that fits its schema is the JSON value itself, any other one a text."""
    document = asdict(answer)
    if schema is not None and structured.fault(answer.response, schema) is None:
        with contextlib.suppress(ValueError, RecursionError):  # 1e999, or a lone surrogate: no JSON document holds it
            found = json.loads(answer.response)
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
            document["response"] = found
    return document
