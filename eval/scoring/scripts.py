"""What a script says and who says it: words with speakers, and the text that a listener hears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dia2_jax.text.script import Lexer, Word
from dia2_jax.text.tokenizer import SPEAKER_TAGS

#: Sounds that Dia2's tokenizer knows as tags. They are no words: nobody transcribes them.
SOUND_TAGS = (
    "(applause)", "(beep)", "(burps)", "(chuckle)", "(chuckles)", "(claps)", "(clears throat)",
    "(coughs)", "(exhales)", "(gasps)", "(groans)", "(humming)", "(inhales)", "(laughs)",
    "(mumbles)", "(screams)", "(sighs)", "(singing)", "(sings)", "(sneezes)", "(sniffs)",
    "(whistles)",
)  # fmt: skip


@dataclass(frozen=True)
class SpokenWord:
    """A word of a take.

    Attributes:
      text: as written.
      speaker: ``[S1]`` or ``[S2]``.
      start, end: seconds from the start of the take; ``end`` None where nobody knows it.
    """

    text: str
    speaker: str
    start: float
    end: float | None = None


def script_words(script: str) -> list[tuple[str, str]]:
    """(word, its speaker) of a script, sound tags included; speaker 1 begins unless named."""
    lexer = Lexer(tag for tag in SOUND_TAGS if " " in tag)
    speaker, words = SPEAKER_TAGS[0], []
    for item in [*lexer.feed(script), *lexer.close()]:
        if not isinstance(item, Word):
            continue
        if item.text in SPEAKER_TAGS:
            speaker = item.text
            continue
        for tag in SPEAKER_TAGS:
            if item.text.startswith(tag):  # a tag that touches its word
                speaker = tag
        words.append((item.text, speaker))
    return words


def spoken_text(script: str) -> str:
    """The words of a script that a transcript of it should hold.

    Speaker tags, pauses and sound tags are left out. Other brackets are opened, because what is in
    them is spoken, while Whisper's normaliser would drop it.
    """
    text = " ".join(word for word, _ in script_words(script))
    for tag in (*SPEAKER_TAGS, *SOUND_TAGS):
        text = text.replace(tag, " ")
    for bracket in "()[]<>":
        text = text.replace(bracket, " ")
    return " ".join(text.split())


def with_speakers(words: Iterable[tuple[str, float]], script: str) -> tuple[SpokenWord, ...]:
    """Words that a model reports, in order, with the speakers that the script gives them.

    A word of the script that the model did not take (one without a token, or the rest of a
    truncated take) is passed over. A word that does not occur in what is left of the script goes
    to the speaker before it.
    """
    left: Sequence[tuple[str, str]] = script_words(script)
    speaker, spoken = left[0][1] if left else SPEAKER_TAGS[0], []
    for text, start in words:
        for index, (written, of) in enumerate(left):
            if written == text:
                speaker, left = of, left[index + 1 :]
                break
        spoken.append(SpokenWord(text, speaker, float(start)))
    return tuple(spoken)
