"""The text tokenizer of a checkpoint and the token ids that the word machine needs.

Owns reading ``tokenizer.json`` (with the ``tokenizers`` library) and the rules by which the
published runtime finds the bos id and the two speaker ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from dia2_jax.errors import CheckpointError, HubError

SPEAKER_TAGS = ("[S1]", "[S2]")


class TextDataConfig(Protocol):
    """The fields of ``Dia2Config.data`` that decide token ids."""

    @property
    def text_vocab_size(self) -> int: ...
    @property
    def text_new_word_token_id(self) -> int: ...
    @property
    def text_pad_token_id(self) -> int: ...
    @property
    def text_zero_token_id(self) -> int: ...
    @property
    def audio_pad(self) -> int: ...
    @property
    def audio_bos(self) -> int: ...


@dataclass(frozen=True)
class TokenIds:
    """Ids with a meaning of their own.

    Attributes:
      card: size of the text vocabulary (ids are below it).
      new_word: marks the frame in which a word starts.
      pad: no text in this frame.
      bos: main-stream text before the first frame.
      zero: text of the unconditional guidance row.
      spk1, spk2: the speaker tags; ``new_word`` when the vocabulary has none.
      audio_pad, audio_bos: special audio codes.
    """

    card: int
    new_word: int
    pad: int
    bos: int
    zero: int
    spk1: int
    spk2: int
    audio_pad: int
    audio_bos: int


class Tokenizer:
    """Text to ids. Immutable after construction, so it may be shared between sessions.

    Attributes:
      ids: the special ids.
      sound_tags: added tokens in parentheses that contain white space, such as
        ``(clears throat)``; the script parser must not cut them in two.
      has_speaker_tags: for each of ``[S1]`` and ``[S2]``, whether the vocabulary has it.
    """

    ids: TokenIds
    sound_tags: tuple[str, ...]
    has_speaker_tags: tuple[bool, bool]

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        data: TextDataConfig,
        *,
        bos_token: str | None = None,
        where: str = "tokenizer",
    ) -> None:
        """Use ``from_folder`` or ``from_file``; ``where`` names the source in errors.

        Raises:
          CheckpointError: the vocabulary holds ids beyond ``data.text_vocab_size``.
        """
        # A file may carry training-time truncation or padding; a script is never cut or filled.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # The embedding lookup on the device clamps silently, so this is the last chance to see it.
        if vocabulary and (largest := max(vocabulary.values())) >= data.text_vocab_size:
            raise CheckpointError(
                f"{where}: token id {largest} does not fit data.text_vocab_size "
                f"{data.text_vocab_size}; the tokenizer and config.json belong to different "
                "checkpoints, take both from the same one"
            )
        new_word = data.text_new_word_token_id
        spk1, spk2 = (vocabulary.get(tag, new_word) for tag in SPEAKER_TAGS)
        self.has_speaker_tags = (SPEAKER_TAGS[0] in vocabulary, SPEAKER_TAGS[1] in vocabulary)
        bos = None if bos_token is None else vocabulary.get(bos_token)
        self.ids = TokenIds(
            card=data.text_vocab_size,
            new_word=new_word,
            pad=data.text_pad_token_id,
            # Upstream writes `bos_token_id or 1`: the published id 0 becomes 1, and the network
            # was trained with that.
            bos=bos or 1,
            zero=data.text_zero_token_id,
            spk1=spk1,
            spk2=spk2,
            audio_pad=data.audio_pad,
            audio_bos=data.audio_bos,
        )
        added = sorted(backend.get_added_tokens_decoder().items())
        self.sound_tags = tuple(
            token.content
            for _, token in added
            if token.content.startswith("(")
            and token.content.endswith(")")
            and len(token.content.split()) > 1
        )

    @classmethod
    def from_folder(cls, folder: str | Path, data: TextDataConfig) -> Tokenizer:
        """Reads ``tokenizer.json`` of a checkpoint folder, and the bos token's name beside it.

        Raises:
          HubError: the folder has no ``tokenizer.json``.
          CheckpointError: a file is corrupt, or does not fit ``data``.
        """
        return cls.from_file(Path(folder) / "tokenizer.json", data)

    @classmethod
    def from_file(cls, path: str | Path, data: TextDataConfig) -> Tokenizer:
        """Reads a ``tokenizer.json``; the bos token's name comes from the files beside it.

        Raises:
          HubError: there is no such file.
          CheckpointError: a file is corrupt, or does not fit ``data``.
        """
        path = Path(path)
        if not path.is_file():
            raise HubError(
                f"no tokenizer at {path}: copy tokenizer.json (and tokenizer_config.json) of the "
                "checkpoint there, or name another folder"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(
                f"{path} is not a readable tokenizer ({error}); fetch the file again"
            ) from error
        return cls(backend, data, bos_token=_bos_token(path.parent), where=str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any token that is not written in it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def speaker_prefix(self, speaker: int) -> str | None:
        """``"[S1]"`` or ``"[S2]"`` for speaker 1 or 2; None when the vocabulary lacks the tag."""
        if speaker not in (1, 2):
            raise ValueError(f"speaker must be 1 or 2, not {speaker!r}")
        return SPEAKER_TAGS[speaker - 1] if self.has_speaker_tags[speaker - 1] else None


def _bos_token(folder: Path) -> str | None:
    """Name of the bos token in the first file that gives one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_object(folder / name).get("bos_token")
        if isinstance(token, dict):  # a serialised AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError alike
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold one JSON object; fetch the file again")
    return content
