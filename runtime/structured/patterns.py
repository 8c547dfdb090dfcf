"""Patterns and formats of JSON Schema in the syntax of Rust's regular expressions and of Python's package `regex`.

JSON Schema's patterns follow ECMA-262. llguidance reads Rust's syntax, and lacks look-around and references to groups:
patterns with those are left to the final check, which reads them with `regex`.
"""

from __future__ import annotations

import re

ESCAPE = (
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}"
    r"|\\x[0-9a-fA-F]{2}|\\c[A-Za-z]|\\0(?![0-9])|\\[pP]\{[^}]*\}|\\k<[^>]*>|\\[1-9][0-9]*|\\."
)
QUANTIFIER = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})\??")
GROUP_NAME = re.compile(r"\(\?P?<([^>]*)>")
OUTSIDE = re.compile(  # one part of a pattern outside of brackets; a class in brackets is one part
    rf"{ESCAPE}|\[\^?(?:\\.|[^\]\\])*\]|{QUANTIFIER.pattern}|\(\?(?:[:=!]|<[=!]|[ims-]+[:)])|\(\?P?<[^>]*>|\(\?|.",
    re.S,
)
INSIDE = re.compile(rf"{ESCAPE}|.", re.S)
CLASSES = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
}
CONTROLS = {"0": "\0", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
WRITTEN = {".": r"[^\n\r\u2028\u2029]", "[^]": "(?s:.)", "[]": "[a&&b]"}
WORD = f"[{CLASSES['w']}]"
ASSERTIONS = {  # in `regex`; its own \b knows the letters of all scripts
    "b": f"(?:(?<={WORD})(?!{WORD})|(?<!{WORD})(?={WORD}))",
    "B": f"(?:(?<={WORD})(?={WORD})|(?<!{WORD})(?!{WORD}))",
    "z": r"\Z",
}
SYNTAX = r"\.+*?()|[]{}^$#&-~"  # characters that mean something in one of the two syntaxes


def rust_pattern(pattern: str) -> str:
    """Return an ECMA-262 pattern in Rust's syntax; what Rust lacks stays as it is.

    Raises:
        re.error: it is no such pattern.
    """
    return "".join(_outside(part, rust=True) for part in _parts(pattern))


def regex_pattern(pattern: str) -> str:
    """Return an ECMA-262 pattern in the syntax of the package `regex`, for its flag V1.

    Raises:
        re.error: it is no such pattern.
    """
    parts = _parts(pattern)
    names = dict.fromkeys(found[1] for found in map(GROUP_NAME.match, parts) if found)
    groups = {name: f"group{number}" for number, name in enumerate(names)}
    return "".join(_outside(part, rust=False, groups=groups) for part in parts)


def _parts(pattern: str) -> list[str]:
    parts = OUTSIDE.findall(pattern)
    for before, part in zip(["", *parts], parts, strict=False):
        if part in ("[", "(?", "\\"):
            raise re.error(f"{part!r} without its end, or of no known kind")
        if QUANTIFIER.fullmatch(part) and QUANTIFIER.fullmatch(before):
            raise re.error(f"{part!r} repeats a repetition")
    return parts


def _outside(part: str, rust: bool, groups: dict[str, str] | None = None) -> str:
    """Write a part of a pattern. groups: the groups' names in `regex`, whose names are narrower than ECMA's."""
    if part in WRITTEN:
        return WRITTEN[part]
    if part[0] == "[" and len(part) > 1:
        return _class(part)
    if part[0] == "\\":
        character = _character(part, "dDwWsSpPkbBAzZ")
        return _literal(character) if character else _named(part) or _reference(part, rust, groups or {})
    if name := GROUP_NAME.match(part):
        return "(" if rust else f"(?P<{(groups or {})[name[1]]}>"  # Rust lacks references: its groups need no names
    if part == "$" and not rust:
        return r"\Z"  # the other one also stands before a line break at the end
    return "\\" + part if part in "{}]" else part


def _reference(part: str, rust: bool, groups: dict[str, str]) -> str:
    """Write an assertion, or a reference to a group, which matches nothing where the group took no part."""
    letter, name = part[1], part[3:-1] if part[1] == "k" else part[1:]
    if rust or not (letter == "k" or letter.isdigit()):
        return part if rust else ASSERTIONS.get(letter, part)
    if letter == "k" and name not in groups:
        raise re.error(f"no group is named {name!r}")
    return f"(?({groups[name]})(?P={groups[name]}))" if letter == "k" else f"(?({name})\\{name})"


def _class(part: str) -> str:
    """Write a class in brackets: ranges, single characters and other classes."""
    start = 2 if part[1] == "^" else 1
    parts, written, at = INSIDE.findall(part[start:-1]), [], 0
    while at < len(parts):
        ends = [_character(end, "dDwWsSpP") for end in parts[at : at + 3 : 2]]
        if parts[at + 1 : at + 2] == ["-"] and len(ends) == 2 and all(ends):
            written.append("-".join(map(_literal, ends)))
            at += 3
        else:
            one = _literal(ends[0]) if ends[0] else _named(parts[at])
            if not one:
                raise re.error(f"{parts[at]} stands for nothing in a class")
            written.append(one)
            at += 1
    return f"{part[:start]}{''.join(written)}]"


def _character(part: str, other: str) -> str:
    """Return the character that a part stands for; "" for escapes with one of the `other` letters, and references."""
    letter = part[1:2]
    if part[0] != "\\":
        return part
    if letter in "xu" and len(part) > 2:
        codes = [int(code, 16) for code in re.findall("[0-9a-fA-F]+", part[2:])]
        if len(codes) == 2:  # a pair of surrogates: one character
            codes = [0x10000 + ((codes[0] - 0xD800) << 10) + codes[1] - 0xDC00]
        if codes[0] > 0x10FFFF:
            raise re.error(f"{part}: there is no such character")
        return chr(codes[0])
    if letter == "c" and len(part) == 3:
        return chr(ord(part[2]) % 32)
    if (letter in other and (letter not in "pPk" or len(part) > 2)) or letter in "123456789":
        return ""
    return CONTROLS.get(letter, letter)


def _literal(character: str) -> str:
    if character in SYNTAX:
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def _named(part: str) -> str:
    """Write an escape that stands for a class of characters; "" if it stands for something else."""
    letter = part[1]
    if letter.lower() in CLASSES:
        return f"[{'^' if letter.isupper() else ''}{CLASSES[letter.lower()]}]"
    return part if letter in "pP" else ""


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
