"""Written text to sentences that can be read out as they stand: numbers and signs in words,
slips of chats mended, anything doubtful left out."""

from __future__ import annotations

import re
from collections import Counter

from train.corpus_making.lexicon import Lexicon
from train.preparation.spoken import spoken_forms

#: Words that no corpus of ours says, by how they begin.
_COARSE = re.compile(
    r"\b(fuck|shit|bitch|cunt|dick(s|head)?\b|cock(s|sucker)?\b|pussy|asshole|ass(es)?\b|bastard|"
    r"whor|slut|nigg|fag|rape[ds]?\b|raping|rapist|porn|penis|vagina|dildo|orgasm|masturbat|"
    r"horny|boob|tits?\b|sex|nude|naked|retard|suicid|damn|piss|crap\b|crappy|erecti|genital|"
    r"kill (your|my|him|her|them)sel|hitler|nazi|prostitut|molest|incest)",
    re.IGNORECASE,
)
_SLIPS = {
    "im": "I'm", "dont": "don't", "didnt": "didn't", "cant": "can't", "wont": "won't",
    "thats": "that's", "whats": "what's", "youre": "you're", "ive": "I've", "isnt": "isn't",
    "doesnt": "doesn't", "wasnt": "wasn't", "havent": "haven't", "couldnt": "couldn't",
    "wouldnt": "wouldn't", "shouldnt": "shouldn't", "arent": "aren't", "werent": "weren't",
    "hasnt": "hasn't", "hadnt": "hadn't", "theyre": "they're", "theres": "there's",
    "hes": "he's", "shes": "she's", "i": "I", "i'm": "I'm", "i've": "I've", "i'll": "I'll",
    "i'd": "I'd", "ok": "okay", "yea": "yeah", "ya": "yeah", "tho": "though", "thru": "through",
    "wanna": "want to", "gotta": "got to", "gonna": "going to", "til": "till", "cuz": "because",
    "mr": "Mister", "mrs": "Missus", "dr": "Doctor", "vs": "versus", "alot": "a lot",
    "tv": "TV", "us": "us", "pls": "please", "plz": "please", "thx": "thanks",
}  # fmt: skip
#: Letters that are read one by one, as everybody does.
_INITIALS = frozenset({"TV", "DVD", "CD", "PC", "FBI", "USA", "UK", "DNA", "GPS", "ATM", "VIP"})
_LAUGHTER = re.compile(r"\b(?:a?ha(?:ha)+h?|he(?:he)+|lol|lmao|rofl|xd)\b[\s,.!]*", re.IGNORECASE)
_MONEY = re.compile(r"\$\s?(\d[\d,]*)\.(\d\d)\b")
_CLOCK = re.compile(r"\b(\d{1,2}):(\d\d)\s*(am|pm|a\.m\.|p\.m\.)?(?=\W|$)", re.IGNORECASE)
_NUMBER = re.compile(r"[$£€]?\d[\d,]*(?:\.\d+)?(?:st|nd|rd|th|s)?%?(?![A-Za-z])")
_ODD = re.compile(r"[^A-Za-z ,.?!'-]")
_ENDS = re.compile(r"(?<=[.?!])\s+")
_ASKS = re.compile(
    r"^(what|who|where|when|why|how|which|whose|do|does|did|is|are|was|were|can|could|would|will|"
    r"should|have|has|had|may|isn't|aren't|don't|doesn't|didn't|won't|can't|wouldn't)\b(?!,)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def words_of(sentence: str) -> list[str]:
    """Its words in small letters, without punctuation around them."""
    return [match.group().lower().strip("'-") for match in _WORD.finditer(sentence)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, cut behind full stops, question and exclamation marks."""
    return _ENDS.split(text.strip())


def key_of(sentence: str) -> str:
    """What two sentences share that differ in capitals and punctuation alone."""
    return " ".join(words_of(sentence))


def _number_words(text: str) -> str:
    forms = spoken_forms(text)
    return " ".join(forms[0]) if forms else text


def _clock(match: re.Match[str]) -> str:
    hour, minute = int(match[1]), int(match[2])
    half = {"a": " in the morning", "p": " in the evening"}.get((match[3] or " ")[0].lower(), "")
    if not 0 < hour < 25 or minute > 59:
        return match[0]
    if minute == 0:
        return _number_words(str(hour)) + (half or " o'clock")
    return f"{_number_words(str(hour))} {'oh ' * (minute < 10)}{_number_words(str(minute))}{half}"


class _Doubtful(Exception):
    """Why a text cannot be read out."""


class Cleaner:
    """Cleans with the words of a lexicon; counts what it leaves out, and why."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        self._found: dict[str, bool] = {}
        self.left_out: Counter[str] = Counter()

    def sentences(self, text: str) -> list[str] | None:
        """The sentences of a text; None if any of it cannot be read out as it stands."""
        try:
            return self._sentences(text)
        except _Doubtful as reason:
            self.left_out[str(reason)] += 1
            return None

    def _sentences(self, text: str) -> list[str]:
        text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
        text = re.sub(r"\s+", " ", text).strip()
        if "http" in text or "www." in text or "@" in text or len(text) > 400:
            raise _Doubtful("address or length")
        if _COARSE.search(text):
            raise _Doubtful("coarse")
        text = _LAUGHTER.sub("", text)
        text = re.sub(r'(?<!\w)"|"(?!\w)|``|\'\'|(?<!\w)`|[*~]', "", text)
        text = re.sub(r"\s*(?:--+|—|–|;| - )\s*", ", ", text)
        text = re.sub(r"\.{2,}|…", ". ", text)
        text = re.sub(r"([?!])[?!]+", r"\1", text)
        text = _MONEY.sub(lambda m: f"${m[1]} and {m[2]} cents", text)
        text = _CLOCK.sub(_clock, text).replace("&", " and ").replace(":", ",")
        text = _NUMBER.sub(lambda m: f" {_number_words(m[0])}", text)
        text = re.sub(r"\s+([,.?!])", r"\1", re.sub(r"\s+", " ", text)).strip(" ,'")
        if _ODD.search(text):
            raise _Doubtful("odd characters")
        parts = [self._sentence(part) for part in split_sentences(text) if words_of(part)]
        if not parts:
            raise _Doubtful("no words")
        return parts

    def _sentence(self, text: str) -> str:
        end = text[-1] if text[-1] in ".?!" else ""
        written: list[str] = []
        for token in text.rstrip(" .?!,").split():
            bare = token.strip(",.?!'-")
            if not bare:
                continue
            comma = "," if token.endswith(",") else ""
            inner = _SLIPS.get(bare.lower(), bare) if bare not in _INITIALS else bare
            if "." in inner or "," in inner or "?" in inner or "!" in inner:
                raise _Doubtful("punctuation inside a word")
            capitals = sum(c.isupper() for c in inner)
            if inner not in _INITIALS:
                if capitals > 1 and not inner.startswith(("Mc", "Mac", "O'")):
                    raise _Doubtful("capitals")
                for word in inner.lower().split():
                    if word not in ("i", "a", "mister", "missus") and not self._known(word):
                        raise _Doubtful("unknown word")
            written.append(inner + comma)
        if not written:
            raise _Doubtful("no words")
        sentence = " ".join(written).rstrip(",")
        if not end:
            end = "?" if _ASKS.search(sentence) else "."
        return sentence[0].upper() + sentence[1:] + end

    def _known(self, word: str) -> bool:
        if word not in self._found:
            self._found[word] = self._lexicon.knows(word)
        return self._found[word]
