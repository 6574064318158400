"""Whose voice a turn has: embeddings of turns beside those of the same and the other speaker.

Turns of at least 1.5 s (from first sound to last) are embedded. A speaker's **centroid** is the
mean of the turns' embeddings, of the recordings if the run has any, else of the takes of the same
source; those of the same prompt are always left out, because what is said together sounds
alike. It makes sense where `[S1]` is the same voice in every prompt: in a model of two voices or a
run with one prefix. Similarities within a take, and to a voice that the prompt gives, need no such
assumption.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.audio import SAMPLE_RATE, read_audio
from dia2_jax.typing import Float
from eval.scoring.metric import Figure, Metric, Options, Row, Scores, mean, ratio
from eval.scoring.takes import RECORDING, Take
from eval.scoring.voice_embeddings import Embedder, open_embedder

#: Shorter turns say too little about their speaker, in seconds.
SHORTEST_TURN = 1.5

_DIGITS = 4


class Speakers(Metric):
    """Cosine similarities between turns."""

    name = "speakers"
    figures = (
        Figure(
            "nearest_own", "% of turns", "higher", "nearer to their own speaker than to the other",
            ratio("nearest", "compared", 100),
        ),
        Figure("own", "cosine", "higher", "to the own speaker", ratio("own", "compared")),
        Figure("other", "cosine", "lower", "to the other speaker", ratio("other", "compared")),
        Figure("within", "cosine", "higher", "turns of one speaker in a take", mean("within")),
        Figure("voice", "cosine", "higher", "to the voice that the prompt gives", mean("voice")),
        Figure("between", "cosine", "lower", "turns of two speakers in a take", mean("between")),
    )  # fmt: skip

    def __init__(self, embed: Embedder, identity: dict[str, Any]) -> None:
        self._embed, self._identity = embed, identity
        self._voice = functools.lru_cache(maxsize=4)(self._of_file)

    @classmethod
    def open(cls, options: Options) -> Speakers:
        """With the embedder of `options`, on the CPU."""
        return cls(*open_embedder(options.speaker_model))

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "shortest_turn": SHORTEST_TURN}

    def score(self, take: Take) -> dict[str, Any] | None:
        turns = []
        for turn in take.turns():
            piece = take.cut(turn)
            seconds = len(piece) / take.rate
            if seconds < SHORTEST_TURN:
                continue
            vector = self._vector(piece, take.rate)
            entry = {
                "speaker": turn.speaker,
                "start": round(turn.start, 3),
                "seconds": round(seconds, 3),
                "embedding": [round(float(x), _DIGITS) for x in vector],
            }
            if turn.speaker in take.prompt.voices:
                wanted = self._voice(take.prompt.voices[turn.speaker].path)
                entry["voice"] = round(float(vector @ wanted), _DIGITS)
            turns.append(entry)
        return {"turns": turns} if turns else None

    def _vector(self, wave: Float[np.ndarray, " W"], rate: int) -> Float[np.ndarray, " D"]:
        vector = np.asarray(self._embed(wave, rate), np.float64)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def _of_file(self, path: Path) -> Float[np.ndarray, " D"]:
        return self._vector(read_audio(path), SAMPLE_RATE)

    @classmethod
    def relate(cls, rows: Sequence[Row]) -> list[Scores]:
        vectors = [
            [np.array(turn["embedding"]) for turn in row["scores"][cls.name]["turns"]]
            for row in rows
        ]
        labels = [[turn["speaker"] for turn in row["scores"][cls.name]["turns"]] for row in rows]
        keys = [(row["set"], row["id"]) for row in rows]
        recorded = any(row["source"] == RECORDING for row in rows)
        pools: dict[str, _Pool] = {}
        for index, row in enumerate(rows):
            pool = pools.setdefault(row["source"], _Pool())
            for vector, speaker in zip(vectors[index], labels[index], strict=True):
                pool.add(vector, speaker, keys[index])
        related: list[Scores] = []
        for index, row in enumerate(rows):
            pool = pools[RECORDING if recorded else row["source"]]
            scores: dict[str, Any] = {"turns": [], "compared": 0, "nearest": 0}
            scores |= {"own": 0.0, "other": 0.0}
            for turn, vector in zip(row["scores"][cls.name]["turns"], vectors[index], strict=True):
                entry = {name: turn[name] for name in ("speaker", "start", "seconds")}
                nearness = pool.similarities(vector, keys[index])
                own = nearness.pop(turn["speaker"], None)
                if own is not None and nearness:
                    other = max(nearness.values())
                    scores["compared"] += 1
                    scores["nearest"] += own > other
                    scores["own"] += own
                    scores["other"] += other
                    entry |= {"own": round(own, _DIGITS), "other": round(other, _DIGITS)}
                scores["turns"].append(entry)
            given = [t["voice"] for t in row["scores"][cls.name]["turns"] if "voice" in t]
            scores["voice"] = float(np.mean(given)) if given else None
            related.append({**scores, **_inside(vectors[index], labels[index])})
        return related

    def failures(self, scores: Scores) -> list[str]:
        return [
            f"turn of {turn['speaker']} at {turn['start']:.1f} s sounds like the other speaker"
            for turn in scores["turns"]
            if "own" in turn and turn["own"] <= turn["other"]
        ]


class _Pool:
    """Sums of embeddings by speaker, from which those of one prompt can be taken out."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        self._of: dict[tuple[str, Any], tuple[np.ndarray, int]] = {}

    def add(self, vector: np.ndarray, speaker: str, key: Any) -> None:
        self._sums[speaker] = self._sums.get(speaker, 0) + vector
        self._counts[speaker] = self._counts.get(speaker, 0) + 1
        total, count = self._of.get((speaker, key), (np.zeros_like(vector), 0))
        self._of[speaker, key] = (total + vector, count + 1)

    def similarities(self, vector: np.ndarray, key: Any) -> dict[str, float]:
        """Cosine to every speaker's centroid without the turns of `key`."""
        found = {}
        for speaker, total in self._sums.items():
            own, count = self._of.get((speaker, key), (np.zeros_like(total), 0))
            if self._counts[speaker] > count:
                rest = total - own
                found[speaker] = float(vector @ rest / max(float(np.linalg.norm(rest)), 1e-12))
        return found


def _inside(vectors: Sequence[np.ndarray], speakers: Sequence[str]) -> dict[str, float | None]:
    """Mean similarity of the pairs of turns of a take, of one speaker and of two."""
    pairs: dict[str, list[float]] = {"within": [], "between": []}
    for (a, one), (b, two) in itertools.combinations(zip(vectors, speakers, strict=True), 2):
        pairs["within" if one == two else "between"].append(float(a @ b))
    return {name: float(np.mean(values)) if values else None for name, values in pairs.items()}
