"""Whether a prompt holds every text that it was made of, each under its own tier; and what looks like a marker."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from .tier_text import TIERS, Tier, TierText

TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
HTML = frozenset(
    (
        "a abbr address article aside b bdi bdo big blockquote body br button caption center cite code col colgroup "
        "dd del details dfn div dl dt em fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 head header hr "
        "html i iframe img input ins kbd label legend li link main mark meta nav ol option p pre q s samp section "
        "select small span strike strong style sub summary sup table tbody td textarea tfoot th thead time title tr "
        "tt u ul var video wbr"
    ).split()
)


def looks_like_marker(text: str) -> bool:
    """Tell whether a token's text looks like a marker: `<|im_end|>`, `<tool_call>`, `[INST]`; but no tag of HTML."""
    if re.fullmatch(r"<[|｜].*[|｜]>", text, re.DOTALL):
        return True
    return TAG.fullmatch(text) is not None and text.strip("</>").lower() not in HTML


def left_out(prompt: TierText, texts: Iterable[tuple[Tier, str]]) -> Tier | None:
    """Name a tier of which a text is not in the prompt whole, as that tier's, and in order; None if all are.

    White space is not compared: templates trim texts and indent them. Of a response the part behind its last marker
    must be there: templates leave out what a model thought before.
    """
    pieces: dict[Tier, list[str]] = {tier: [] for tier in TIERS}
    for piece, owner in prompt.pieces():
        if owner in pieces:
            pieces[owner].append(squeezed(piece))
    said = {tier: "".join(found) for tier, found in pieces.items()}
    at = dict.fromkeys(TIERS, 0)
    for tier, text in texts:
        for form in forms(TAG.split(text)[-1] if tier == "response" else text):
            place = said[tier].find(form, at[tier])
            if place >= 0:
                at[tier] = place + len(form)
                break
        else:
            return tier
    return None


def forms(text: str) -> Iterator[str]:
    """Yield how a template may write a text: as it is, or as JSON."""
    yield squeezed(text)
    yield squeezed(json.dumps(text, ensure_ascii=False)[1:-1])
    yield squeezed(json.dumps(text)[1:-1])


def squeezed(text: str) -> str:
    """Return a text without its white space."""
    return "".join(str.__str__(text).split())
