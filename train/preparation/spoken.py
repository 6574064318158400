"""How written words are spoken: numbers, signs and abbreviations as plain English words.

Used to look words up in a pronouncing dictionary and to compare a transcript with what was
recognised; what the model reads stays as written.
"""

from __future__ import annotations

import re
import unicodedata

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = [
    "zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"))
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
_SIGNS = {"%": "percent", "&": "and", "@": "at", "+": "plus", "=": "equals", "#": "number"}
_MONEY = {"$": "dollars", "£": "pounds", "€": "euros", "¥": "yen"}
_TITLES = {
    "mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "st": "saint", "vs": "versus",
    "etc": "et cetera", "prof": "professor",
}  # fmt: skip

#: The pieces of a word that are spoken for themselves.
_PIECE = re.compile(
    r"(?P<money>[$£€¥])?(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?P<ending>(?:st|nd|rd|th)(?![^\W\d_])|s(?![^\W\d_]))?"
    r"|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)*)|(?P<sign>[%&@+=#])",
    re.IGNORECASE,
)


def spoken_forms(word: str) -> list[list[str]]:
    """Ways in which a written word may be spoken, the likeliest first.

    Each is a list of lower-case words of letters and apostrophes. Empty when nothing in it is
    spoken: punctuation, and sounds in parentheses such as ``(laughs)``.
    """
    plain = word.replace("’", "'").strip()
    if plain.startswith("(") and plain.rstrip(".,!?;").endswith(")"):
        return []
    forms: list[list[str]] = [[]]
    for match in _PIECE.finditer(_without_accents(plain)):
        ways = _piece_forms(match)
        # Every piece has at most two ways; words with many numbers stay few by this cut.
        forms = [form + way for form in forms for way in ways][:4]
    return [form for form in forms if form]


def normalized(word: str) -> str:
    """A word by which two spellings of the same speech compare equal: "21" and "twenty-one"."""
    forms = spoken_forms(word)
    return "".join(forms[0]).replace("'", "") if forms else ""


def _without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def _piece_forms(match: re.Match[str]) -> list[list[str]]:
    if (sign := match["sign"]) is not None:
        return [[_SIGNS[sign]]]
    if (text := match["word"]) is not None:
        lower = text.lower()
        return [_TITLES.get(lower, lower).split()]
    number, ending = match["number"].replace(",", ""), (match["ending"] or "").lower()
    whole, _, fraction = number.partition(".")
    if fraction:
        digits = [_ONES[int(digit)] for digit in fraction]
        ways = [[*_cardinal(int(whole)), "point", *digits]]
    elif len(whole) > 15 or (len(whole) > 1 and whole[0] == "0"):
        ways = [[_ONES[int(digit)] for digit in whole]]
    elif len(whole) == 4 and not match["money"] and "," not in match["number"]:
        ways = [_year(int(whole)), _cardinal(int(whole))]
    else:
        ways = [_cardinal(int(whole))]
    if ending in ("st", "nd", "rd", "th"):
        ways = [[*way[:-1], _ordinal(way[-1])] for way in ways]
    elif ending == "s":  # "the 1990s"
        ways = [[*way[:-1], _plural(way[-1])] for way in ways]
    if match["money"]:
        unit = _MONEY[match["money"]]
        ways = [[*way, unit.removesuffix("s") if number == "1" else unit] for way in ways]
    return ways


def _cardinal(number: int) -> list[str]:
    if number < 20:
        return [_ONES[number]]
    if number < 100:
        rest = number % 10
        return [_TENS[number // 10], *([_ONES[rest]] if rest else [])]
    if number < 1000:
        rest = number % 100
        return [_ONES[number // 100], "hundred", *(_cardinal(rest) if rest else [])]
    for scale, name in _SCALES:
        if number >= scale:
            rest = number % scale
            return [*_cardinal(number // scale), name, *(_cardinal(rest) if rest else [])]
    raise AssertionError(number)


def _year(number: int) -> list[str]:
    century, rest = divmod(number, 100)
    if century % 10 == 0 and rest < 10:  # 2005, 3000
        return _cardinal(number)
    if rest == 0:
        return [*_cardinal(century), "hundred"]
    return [*_cardinal(century), *(["oh", _ONES[rest]] if rest < 10 else _cardinal(rest))]


def _ordinal(word: str) -> str:
    if word.endswith("y"):
        return word[:-1] + "ieth"
    return _ORDINALS.get(word, word + "th")


def _plural(word: str) -> str:
    return word[:-1] + "ies" if word.endswith("y") else word + ("es" if word == "six" else "s")
