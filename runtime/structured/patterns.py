"""Patterns and formats of JSON Schema in the syntax of Rust's regular expressions, which llguidance uses.

JSON Schema's patterns follow ECMA-262. Rust differs in the meaning of `\\s`, `.` and `[`, and in a few escapes.
Look-around and references to groups, which Rust lacks, are left as they are, and llguidance refuses them.
"""

from __future__ import annotations

import json
import re

ESCAPE = (
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}"
    r"|\\x[0-9a-fA-F]{2}|\\c[A-Za-z]|\\0(?![0-9])|\\[pP]\{[^}]*\}|\\."
)
OUTSIDE = re.compile(rf"{ESCAPE}|\[\^\]|\[\]|\{{\d+(?:,\d*)?\}}|.", re.S)  # one part of a pattern outside of brackets
INSIDE = re.compile(rf"{ESCAPE}|.", re.S)
CLASSES = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
}
WRITTEN = {".": r"[^\n\r\u2028\u2029]", "[^]": "(?s:.)", "[]": "[a&&b]", "{": r"\{"}  # in Rust


def rust_pattern(pattern: str) -> str:
    """Return an ECMA-262 pattern in Rust's syntax; parts that Rust lacks stay as they are."""
    written: list[str] = []
    inside, at = False, 0
    while found := (INSIDE if inside else OUTSIDE).match(pattern, at):
        part, at = found[0], found.end()
        if part[0] == "\\":
            written.append(_escape(part, inside))
        elif inside:
            inside = part != "]"
            operator = part in "[&~" or (part == "-" and written[-1][-1] == "-")  # Rust's `[`, `&&`, `~~`, `--`
            written.append("\\" + part if operator else part)
        else:
            inside = part == "["
            written.append(WRITTEN.get(part, part))
    return "".join(written)


def _escape(part: str, inside: bool) -> str:
    letter = part[1:2]
    if letter.lower() in CLASSES:
        return f"[{'^' if letter.isupper() else ''}{CLASSES[letter.lower()]}]"
    if part == r"\0" or (inside and letter == "b"):
        return r"\x00" if letter == "0" else r"\x08"
    if letter == "c" and len(part) == 3:
        return rf"\x{ord(part[2]) % 32:02x}"
    if len(part) == 12:  # a pair of surrogates: one character
        return str(json.loads(f'"{part}"'))
    return part


# -- formats ----------------------------------------------------------------------------------------------------------
# The formats whose pattern in llguidance is too wide or too narrow. A text must match all patterns of its format.

HOUR, SIXTY = "([01][0-9]|2[0-3])", "[0-5][0-9]"
DAYS = "(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31"  # without 29 February
YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
DATE = f"({YEAR}-({DAYS})|([0-9]{{2}}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)"

# A leap second is 23:59:60 in UTC: LEAP_HOURS checks the hour against the offset, LEAP_MINUTES the minute.
LEAP, SOME = r":60(\.[0-9]+)?", "(0[1-9]|[1-5][0-9])"
LEAP_HOURS = [f"23:59{LEAP}[Zz]"] + [
    f"{hour:02}:{SIXTY}{LEAP}([+]({hour:02}:{SOME}|{(hour + 1) % 24:02}:00)|-{23 - hour:02}:{SIXTY})"
    for hour in range(24)
]
LEAP_MINUTES = [f"23:59{LEAP}[Zz]"] + [
    f"{HOUR}:{minute:02}{LEAP}([+]{HOUR}:{(minute + 1) % 60:02}|-{HOUR}:{59 - minute:02})" for minute in range(60)
]
PLAIN_TIME = rf"{HOUR}:{SIXTY}:{SIXTY}(\.[0-9]+)?([Zz]|[+-]{HOUR}:{SIXTY})"
TIMES = [f"({'|'.join([PLAIN_TIME, *leap])})" for leap in (LEAP_HOURS, LEAP_MINUTES)]

BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{BYTE}(\.{BYTE}){{3}}"
GROUP = "[0-9a-fA-F]{1,4}"
LAST_TWO = f"({GROUP}:{GROUP}|{IPV4})"
IPV6 = "|".join(  # by the number of groups before and after `::`
    [f"({GROUP}:){{6}}{LAST_TWO}", f"::({GROUP}:){{5}}{LAST_TWO}"]
    + [f"(({GROUP}:){{0,{before}}}{GROUP})?::({GROUP}:){{{4 - before}}}{LAST_TWO}" for before in range(5)]
    + [f"(({GROUP}:){{0,5}}{GROUP})?::{GROUP}", f"(({GROUP}:){{0,6}}{GROUP})?::"]
)

ATOM, LABEL = r"[a-zA-Z0-9!#$%&'*+\-/=?\^_`{|}~]+", "[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
QUOTED = r'"([\x20-\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*"'
EMAIL = rf"({ATOM}(\.{ATOM})*|{QUOTED})@({LABEL}(\.{LABEL})*|\[({IPV4}|IPv6:({IPV6}))\])"

FORMATS = {
    "date": [DATE],
    "time": TIMES,
    "date-time": [f"{DATE}[Tt]{time}" for time in TIMES],
    "email": [EMAIL],
    "ipv6": [IPV6],
}
