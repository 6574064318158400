"""What a codec keeps of speech: ``python -m eval.codec CODEC --prompts … --out DIR``.

Recordings go through the codec with few and with all codebooks, whole and frame by frame. What is
measured is in `eval.scoring`, what is done for each take here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from eval.needed import needed_from

with needed_from("eval"):
    from dia2_jax.audio import voiced_span
    from dia2_jax.errors import ConfigError
    from dia2_jax.typing import Float, Int
    from eval.command import OutputFolder, Resumable, integers, metric_options, names
    from eval.scoring import sources as making
    from eval.scoring.added_metrics import score_added
    from eval.scoring.evaluation import (
        EXIT_STATUS,
        conclude,
        evaluate,
        measuring,
        progress,
        start,
        versions,
    )
    from eval.scoring.metric import Options, Row
    from eval.scoring.prompts import Prompt, read_sets
    from eval.scoring.registry import require_known
    from eval.scoring.report import Section
    from eval.scoring.run_folder import open_run, refuse_taken
    from eval.scoring.takes import RECORDING, Take

if TYPE_CHECKING:
    from dia2_jax.mimi.runtime import Codec

#: What is measured of a codec: what a take says about the model's text or turns is left out.
MEASURED = (
    "intelligibility", "quality", "utmos", "fidelity", "perceived", "signal", "speakers", "prosody",
)  # fmt: skip

EPILOG = f"""\b
Prompts are JSON Lines files with recordings, such as the manifest of a corpus; their format is in
eval/prompts/README.md. Each is scored as it is and through the codec with every number of codebooks
in --codebooks, and once more streamed: a frame at a time through both ends, with all of them.

\b
Measured, if its packages are installed (else one line says what to install):
  intelligibility  WER and CER of resynthesis: faster-whisper
  quality          predicted opinion scores: DNSMOS, from speechmos
  utmos            predicted opinion score of naturalness: utmos-pytorch
  fidelity         mel distance and SI-SDR to the recording
  perceived        PESQ and STOI: pesq, pystoi
  signal           clipping, level, floor
  speakers         similarity of voices: Resemblyzer or WavLM
  prosody          pitch, rate, energy
and of the codes how much of every codebook is used.

\b
OUT holds the files of a run of eval.naturalness; codebooks.json says how codebooks are used. A
stopped run goes on where it was, with the same command; with more metrics, what is there is scored
with them first. One run at a time works in a folder. eval.compare compares two runs.

{EXIT_STATUS.format(unusable="a codec, prompt, option or folder")}"""


class Resynthesis:
    """Makes takes of recordings through a codec.

    Attributes:
      variants: sources of takes by name: how many codebooks, and whether streamed.
    """

    def __init__(self, codec: Codec, codebooks: Sequence[int]) -> None:
        """
        Args:
          codebooks: numbers of codebooks, ascending; the last one is streamed, too.
        """
        self._codec = codec
        self.variants: dict[str, tuple[int, bool]] = {
            f"codebooks-{n}": (n, False) for n in codebooks
        }
        self.whole = list(self.variants)[-1]
        self.variants[f"{self.whole}-streamed"] = (codebooks[-1], True)
        self._studio = making.Studio(codec=codec)

    def sources(self, prompt: Prompt) -> list[tuple[str, int | None]]:
        """Sources of takes of a prompt, for `eval.scoring.evaluation.evaluate`."""
        if prompt.reference is None:
            return []
        return [(RECORDING, None), *((name, None) for name in self.variants)]

    def take(self, source: str, prompt: Prompt, seed: int | None = None) -> Take:
        """A take; of the whole one, its row keeps the codes.

        Raises:
          AudioError: the recording cannot be read.
        """
        if source == RECORDING:
            return self._studio.take(source, prompt)
        count, streamed = self.variants[source]
        original = self._studio.read(prompt, self._codec.sample_rate)
        codes, wave = (self._stream if streamed else self._at_once)(original, count)
        first, last = voiced_span(original, self._codec.sample_rate)
        about: dict[str, Any] = {}
        if source == self.whole:
            about["codes"] = codes.tolist()
        if streamed:
            same_codes, same_wave = self._at_once(original, count)
            about["difference"] = {
                "codes": int((codes != same_codes).sum()),
                "wave": float(np.abs(wave - same_wave).max(initial=0)),
            }
        return Take(
            source=source,
            prompt=prompt,
            wave=making.as_saved(wave),
            rate=self._codec.sample_rate,
            words=prompt.words,
            reference_seconds=last - first,
            original=original,
            about=about,
        )

    def _at_once(
        self, wave: Float[np.ndarray, " W"], count: int
    ) -> tuple[Int[np.ndarray, "C T"], Float[np.ndarray, " W"]]:
        codes = self._codec.encode(wave[None], codebooks=count)
        return codes[0], self._codec.decode(codes)[0][: len(wave)]

    def _stream(
        self, wave: Float[np.ndarray, " W"], count: int
    ) -> tuple[Int[np.ndarray, "C T"], Float[np.ndarray, " W"]]:
        from dia2_jax.mimi.runtime import StreamingDecoder, StreamingEncoder

        encoder = StreamingEncoder(self._codec, codebooks=count)
        decoder = StreamingDecoder(self._codec)
        codes, heard = [], []
        frame = self._codec.samples_per_frame
        for at in range(0, len(wave), frame):
            codes.append(encoder.push(wave[None, at : at + frame]))
            heard.append(decoder.push(codes[-1]))
        codes.append(encoder.close())
        heard.append(decoder.push(codes[-1]))
        return np.concatenate(codes, 2)[0], np.concatenate(heard, 1)[0][: len(wave)]


def codebook_usage(rows: Iterable[Row], entries: int) -> list[dict[str, float]]:
    """How every codebook is used over the takes whose rows keep codes.

    Returns:
      For each: ``used``, the share of its entries that occur; ``perplexity``, exp of the entropy of
      their frequencies (with F frames at most F); ``bits``, the entropy in bits a frame.
    """
    kept = [np.array(row["codes"]) for row in rows if "codes" in row]
    if not kept:
        return []
    import jax.numpy as jnp

    from train.codec_training.quantizer import perplexity

    codes = np.concatenate(kept, axis=1)
    counts = np.stack([np.bincount(row, minlength=entries) for row in codes])
    spread = np.asarray(perplexity(jnp.asarray(counts, jnp.float32)))
    return [
        {"used": float((row > 0).mean()), "perplexity": float(p), "bits": float(np.log2(p))}
        for row, p in zip(counts, spread, strict=True)
    ]


def usage_table(usage: Sequence[dict[str, float]], rows: Sequence[Row]) -> Section:
    """The codebooks, and how far streaming is from the whole."""
    streamed = [row["difference"] for row in rows if "difference" in row]
    note = ""
    if streamed:
        note = (
            f"Streamed against whole, {len(streamed)} recordings: "
            f"{sum(one['codes'] for one in streamed)} codes differ; largest difference of a "
            f"sample {max(one['wave'] for one in streamed):.1e} of full scale."
        )
    return Section(
        "Codebooks",
        ("codebook", "entries used, %", "perplexity", "bits a frame"),
        [
            (f"{i}", f"{100 * one['used']:.1f}", f"{one['perplexity']:.1f}", f"{one['bits']:.2f}")
            for i, one in enumerate(usage)
        ],
        note,
    )


@click.command(cls=Resumable, epilog=EPILOG)
@click.argument("codec")
@click.option(
    "--prompts", "-p", multiple=True, required=True, callback=names, metavar="FILE[,…]",
    help="Recordings with their scripts; may be given several times.",
)  # fmt: skip
@click.option("--out", "-o", type=OutputFolder(), required=True, help="Folder of the run.")
@click.option(
    "--codebooks", callback=integers, metavar="N[,…]",
    help="Numbers of codebooks; 1, 2, 4, … and all of them by default.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N",
    help="At most N recordings of each file, chosen by a hash of their ids.",
)  # fmt: skip
@metric_options
@click.option("--quiet", "-q", is_flag=True, help="No progress, no report on standard output.")
def main(
    codec: str,
    prompts: Sequence[str],
    out: Path,
    codebooks: Sequence[int] | None,
    limit: int | None,
    asr: str,
    speaker_model: str,
    utmos: Path | None,
    metrics: Sequence[str],
    quiet: bool,
) -> None:
    """Measure what CODEC keeps of recorded speech, by number of codebooks, whole and streamed.

    CODEC is the folder of a Mimi, a hub repository, or a model for its codec (nano: the one inside
    the package).

    \b
      python -m eval.codec nano -p data/nano/corpus/test.jsonl --limit 40 -o runs/codec
    """
    refuse_taken(out)
    whole = read_sets(prompts)
    sets = [each.limited(limit) for each in whole]
    if not any(prompt.reference for each in sets for prompt in each.prompts):
        raise ConfigError(
            f"--prompts {','.join(prompts)}: has no recordings; give a set whose rows have a path"
        )
    making.check_files(sets)
    wanted = metrics or MEASURED
    require_known(wanted)
    runtime, most, found = making.open_codec(codec)
    counts = _counts(codebooks, most)
    opened, left_out = measuring(Options(asr, speaker_model, utmos), wanted)
    maker = Resynthesis(runtime, counts)
    identity = {
        "codec": found,
        "codebooks": counts,
        "versions": versions(),
        "prompts": {each.name: each.digest for each in whole},
        "metrics": {metric.name: metric.identity() for metric in opened},
    }
    about = {
        "codec": codec,
        "prompts": ", ".join(f"{each.name} ({len(each.prompts)})" for each in sets),
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        "not measured": "; ".join(left_out) or "nothing was left out",
    }
    bar = progress(quiet)
    with open_run(out, identity) as folder:
        score_added(maker.take, whole, opened, folder, progress=bar)
        start(
            folder,
            "eval.codec",
            {
                "codec": codec,
                "prompts": {each.name: str(each.path) for each in sets},
                "limit": limit,
                "left_out": left_out,
            },
        )
        rows = evaluate(maker.take, sets, opened, folder, maker.sources, progress=bar)
        usage = codebook_usage(rows, runtime.mimi.codebook_size)
        folder.write_json("codebooks.json", usage)
        conclude(
            folder, rows, opened, about, f"Codec {codec}", [usage_table(usage, rows)],
            judged=maker.whole, quiet=quiet,
        )  # fmt: skip


def _counts(asked: Sequence[int] | None, most: int) -> list[int]:
    """Numbers of codebooks, ascending: those asked for, else powers of two and all."""
    if asked is None:
        return sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})
    for count in asked:
        if not 1 <= count <= most:
            raise ConfigError(f"--codebooks {count}: the codec has 1 to {most}")
    return sorted(set(asked))


if __name__ == "__main__":
    main(prog_name="python -m eval.codec")
