"""Phones of English words that no dictionary has: names, slang, abbreviations.

Letter by letter and rough, in the phone set of the CMU dictionary: good enough to find where a
word is spoken among words that are known, not to judge how.
"""

from __future__ import annotations

_LETTER_NAMES = {
    "a": "EY", "b": "B IY", "c": "S IY", "d": "D IY", "e": "IY", "f": "EH F", "g": "JH IY",
    "h": "EY CH", "i": "AY", "j": "JH EY", "k": "K EY", "l": "EH L", "m": "EH M", "n": "EH N",
    "o": "OW", "p": "P IY", "q": "K Y UW", "r": "AA R", "s": "EH S", "t": "T IY", "u": "Y UW",
    "v": "V IY", "w": "D AH B AH L Y UW", "x": "EH K S", "y": "W AY", "z": "Z IY",
}  # fmt: skip

#: What letters sound like, longest first; tried from the left.
_SOUNDS = {
    "ough": "AO", "tion": "SH AH N", "sion": "ZH AH N", "tch": "CH", "sch": "SH", "igh": "AY",
    "ch": "CH", "sh": "SH", "th": "TH", "ph": "F", "wh": "W", "ck": "K", "ng": "NG", "qu": "K W",
    "gh": "G", "kn": "N", "wr": "R", "dg": "JH", "ee": "IY", "ea": "IY", "oo": "UW", "ou": "AW",
    "ow": "OW", "oi": "OY", "oy": "OY", "ai": "EY", "ay": "EY", "au": "AO", "aw": "AO", "ie": "IY",
    "ei": "EY", "ey": "IY", "oa": "OW", "eu": "UW", "ew": "UW", "ue": "UW", "ar": "AA R",
    "er": "ER", "ir": "ER", "ur": "ER", "or": "AO R", "a": "AE", "b": "B", "c": "K", "d": "D",
    "e": "EH", "f": "F", "g": "G", "h": "HH", "i": "IH", "j": "JH", "k": "K", "l": "L", "m": "M",
    "n": "N", "o": "AA", "p": "P", "q": "K", "r": "R", "s": "S", "t": "T", "u": "AH", "v": "V",
    "w": "W", "x": "K S", "y": "IY", "z": "Z",
}  # fmt: skip
_LONGEST = max(map(len, _SOUNDS))
_VOWELS = "aeiouy"


def letter_names(word: str) -> str | None:
    """Phones of a word that is spelled out, "bbc"; None without a letter a to z."""
    names = [_LETTER_NAMES[c] for c in word.lower() if c in _LETTER_NAMES]
    return " ".join(names) or None


def guess_phones(word: str) -> str | None:
    """Phones of a word as it is probably read; None without a letter a to z."""
    letters = "".join(c for c in word.lower() if c in _LETTER_NAMES)
    if letters and not any(c in _VOWELS for c in letters):
        return letter_names(letters)  # "hmm" is read otherwise, and takes as long
    phones: list[str] = []
    place = 0
    while place < len(letters):
        rest = letters[place:]
        if rest == "e" and len(phones) > 1:
            break  # silent at the end
        if len(rest) > 1 and rest[0] == rest[1] and rest[:2] not in _SOUNDS:
            place += 1  # doubled consonants sound once
            continue
        if rest[0] == "c" and rest[1:2] in ("e", "i", "y"):
            phones.append("S")
            place += 1
            continue
        size = next(n for n in range(_LONGEST, 0, -1) if rest[:n] in _SOUNDS)
        phones.append(_SOUNDS[rest[:size]])
        place += size
    return " ".join(phones) or None
