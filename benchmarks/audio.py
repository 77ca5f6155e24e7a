"""Sound codecs: how fast they are, and how good beside Opus and MP3.

    python benchmarks/audio.py                                    speed alone
    python benchmarks/audio.py --held-back runs/audio/raw/val     and quality
                               --trained-on runs/audio/raw/train  and codes used in training

Speed: real-time factors (seconds of sound per second of one thread's processor time) of the preset
`encodec-24khz` beside EnCodec and DAC as `transformers` has them, all with random weights, in one
run; and of streams beside the whole. Quality: shipped codecs on the sound that their training held
back, as `recipes/audio/prepare.py` writes it, with 2, 4 and all levels, beside Opus and MP3 at low
settings. Bitrates of files count all their bytes; neither format goes as low as these codecs do.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from math import isnan, log2
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torchaudio
from kernel_meter import Meter, write
from torch import Tensor

from unimm import build_codec, load_codec
from unimm.data.shards import ShardReader, expand
from unimm.data.sounds import SoundReader
from unimm.evaluation.metrics.sound import mel_distance, stft_distance
from unimm.evaluation.reconstruction.extras import speech_quality, unavailable
from unimm_tokenizers import Codec
from unimm_tokenizers.adapters.byte_codec import ClassicalConfig
from unimm_tokenizers.adapters.classical_media import SoundFileCodec
from unimm_tokenizers.audio import StreamingCodec
from unimm_tokenizers.quantize import UsageCounter

SECONDS = 2.0  # of sound that is timed
CHUNKS = (1, 10, 50)  # code frames of a chunk
LEVELS = (2, 4, 12)
OPUS, MP3 = (6, 12), (8, 16)  # kbit/s that are asked for
SPEECH = ("pesq_wb", "pesq_nb", "stoi", "visqol")
LONGEST = 10  # seconds of each sound that quality is measured on
SKIPPED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Real-time factors of one codec; None where it does not stream."""

    codec: str
    parameters: float
    chunk: str
    encode: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One codec at one setting on one kind of sound; means over its sounds."""

    sound: str
    seconds: float
    codec: str
    kbps: float
    mel: float
    stft: float
    speech: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a codec uses its codes on some sound, by level: share of codes, bits per code."""

    codec: str
    sound: str
    frames: int
    used: list[float]
    bits: list[float]


def speeds(meter: Meter) -> Iterator[Speed]:
    """The preset, whole and in chunks, then its rivals."""
    codec = build_codec("encodec-24khz")
    assert isinstance(codec, StreamingCodec)
    sound = noise(codec.num_channels, int(SECONDS * 24000))
    codes = codec.encode(sound)
    yield speed(meter, "unimm encodec-24khz", codec, codec.encode, codec.decode, sound, codes)
    for frames in CHUNKS:
        yield streamed(meter, "unimm encodec-24khz", codec, sound, codes, frames)
    if find_spec("transformers") is None:
        print(f"EnCodec and DAC: {SKIPPED}: transformers is not installed (extra 'adapters')")
        return
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel

    torch.manual_seed(0)
    encodec: Any = EncodecModel(EncodecConfig()).eval()
    yield speed(
        meter,
        "EnCodec 24 kHz (transformers)",
        encodec,
        lambda x: encodec.encode(x, bandwidth=6.0).audio_codes,
        lambda c: encodec.decode(c, [None]).audio_values,
        sound,
    )
    dac: Any = DacModel(DacConfig(sampling_rate=24000)).eval()
    yield speed(
        meter,
        "DAC (transformers)",
        dac,
        lambda x: dac.encode(x).audio_codes,
        lambda c: dac.decode(audio_codes=c).audio_values,
        sound,
    )


def speed(
    meter: Meter,
    name: str,
    module: torch.nn.Module,
    encode: Callable[[Tensor], Any],
    decode: Callable[[Any], Any],
    sound: Tensor,
    codes: Any = None,
) -> Speed:
    codes = encode(sound) if codes is None else codes
    return Speed(
        codec=name,
        parameters=sum(p.numel() for p in module.parameters()) / 1e6,
        chunk="whole",
        encode=1e3 * SECONDS / meter.milliseconds(lambda: encode(sound)),
        decode=1e3 * SECONDS / meter.milliseconds(lambda: decode(codes)),
    )


def streamed(
    meter: Meter, name: str, codec: StreamingCodec, sound: Tensor, codes: Tensor, frames: int
) -> Speed:
    """In chunks of so many code frames."""
    hop = codec.downsample[0]

    def encode() -> None:
        state = codec.init_state(1)
        for chunk in sound.split(frames * hop, dim=2):
            _, state = codec.encode_chunk(chunk, state)

    def decode() -> None:
        state = codec.init_state(1)
        for chunk in codes.split(frames, dim=2):
            _, state = codec.decode_chunk(chunk, state)

    return Speed(
        codec=name,
        parameters=sum(p.numel() for p in codec.parameters()) / 1e6,
        chunk=f"{frames} frame{'s' * (frames > 1)}",
        encode=1e3 * SECONDS / meter.milliseconds(encode),
        decode=1e3 * SECONDS / meter.milliseconds(decode),
    )


def noise(channels: int, length: int) -> Tensor:
    return 0.1 * torch.randn(1, channels, length, generator=torch.Generator().manual_seed(0))


def sounds_of(shards: Path, rate: int) -> dict[str, list[Tensor]]:
    """Kind -> sounds (1, 1, T): pieces of a recording, `kind-name-number`, put together again."""
    pieces: dict[tuple[str, int], list[Tensor]] = {}
    for path in expand(shards):
        for sample in ShardReader(path):
            sound = SoundReader(sample["flac"])
            name = sample.key.rpartition("-")[0]
            pieces.setdefault((name, sound.sample_rate), []).append(sound.whole())
    found: dict[str, list[Tensor]] = {}
    for (name, own), parts in pieces.items():
        whole = torchaudio.functional.resample(torch.cat(parts, dim=1), own, rate).clamp(-1, 1)
        found.setdefault(name.split("-")[0].replace("_", " "), []).append(whole[None])
    return found


def usage(name: str, sound: str, kinds: dict[str, list[Tensor]]) -> Usage:
    """Over all sounds whole, with all levels."""
    codec = load_codec(name)
    counter = UsageCounter(codec.num_codebooks, codec.codebook_size)
    for each in (each for kind in kinds.values() for each in kind):
        counter.update(codec.encode(each))
    frames, found = int(counter.counts[0].sum()), counter.finish()
    return Usage(
        codec=name,
        sound=sound,
        frames=frames,
        used=found.usage.tolist(),
        bits=found.entropy.tolist(),
    )


def qualities(name: str, kinds: dict[str, list[Tensor]]) -> Iterator[Quality]:
    """A shipped codec at some numbers of levels, and the classical ones."""
    codec = load_codec(name)
    assert isinstance(codec, StreamingCodec)
    assert codec.sample_rate is not None
    most = codec.num_codebooks
    for kind, whole in kinds.items():
        sounds = [sound[..., : LONGEST * codec.sample_rate] for sound in whole]
        for levels in LEVELS:
            if levels <= most:
                codec.num_codebooks = levels
                yield quality(f"{name}, {levels} levels", codec, kind, sounds, codec.bitrate)
        for form, settings in (("opus", OPUS), ("mp3", MP3)):
            for setting in settings:
                yield classical(form, setting, codec.sample_rate, kind, sounds)


def classical(form: str, setting: int, rate: int, kind: str, sounds: list[Tensor]) -> Quality:
    config = ClassicalConfig(format=form, setting=setting, num_channels=1, sample_rate=rate)
    return quality(f"{form} {setting} kbit/s", SoundFileCodec(config), kind, sounds)


def quality(
    name: str, codec: Codec, kind: str, sounds: list[Tensor], bitrate: float | None = None
) -> Quality:
    """Means over sounds; the bitrate of files is that of all their bytes."""
    assert codec.sample_rate is not None
    rate, rows, bits = codec.sample_rate, [], 0.0
    scores: dict[str, list[float]] = {each: [] for each in SPEECH if not unavailable(each, rate)}
    for sound in sounds:
        codes = codec.encode(sound)
        made = codec.decode(codes, (sound.shape[-1],))
        made = torch.nn.functional.pad(made, (0, sound.shape[-1] - made.shape[-1]))
        bits += int((codes >= 0).sum()) * log2(codec.codebook_size)
        measured = mel_distance(made, sound, sample_rate=rate), stft_distance(made, sound)
        rows.append([float(x) for x in measured])
        if kind in ("speech", "unseen speaker", "digits"):
            for each, found in scores.items():
                value = speech_quality(each, made, sound, rate)
                found += [] if isnan(value) else [value]
    seconds = sum(sound.shape[-1] for sound in sounds) / rate
    return Quality(
        sound=kind,
        seconds=seconds,
        codec=name,
        kbps=(bits / seconds if bitrate is None else bitrate) / 1e3,
        mel=mean(row[0] for row in rows),
        stft=mean(row[1] for row in rows),
        speech={each: mean(found) for each, found in scores.items() if found},
    )


def report(
    machine: str, fast: Sequence[Speed], good: Sequence[Quality], used: Sequence[Usage]
) -> str:
    lines = [f"# Sound codecs\n\n{machine}\n", "## Speed, times real time, one thread\n"]
    lines += ["| codec | M parameters | chunk | encode | decode |", "|---|---|---|---|---|"]
    lines += [
        f"| {s.codec} | {s.parameters:.1f} | {s.chunk} | {s.encode:.1f} | {s.decode:.1f} |"
        for s in fast
    ]
    if good:
        measures = [each for each in SPEECH if any(each in q.speech for q in good)]
        lines += ["\n## Quality on held-back sound\n"]
        lines += ["Mel and STFT distance: less is better. Speech measures: more is better.\n"]
        lines += [f"| sound | codec | kbit/s | mel | STFT | {' | '.join(measures)} |"]
        lines += ["|" + "---|" * (5 + len(measures))]
        for q in good:
            cells = [f"{q.speech[m]:.2f}" if m in q.speech else "-" for m in measures]
            head = f"{q.sound} ({q.seconds:.0f} s) | {q.codec} | {q.kbps:.2f}"
            lines += [f"| {head} | {q.mel:.3f} | {q.stft:.3f} | {' | '.join(cells)} |"]
    if used:
        lines += ["\n## Codes used\n"]
        levels = max(len(each.used) for each in used)
        lines += [f"| codec | sound | frames | | {' | '.join(map(str, range(1, levels + 1)))} |"]
        lines += ["|" + "---|" * (4 + levels)]
        for each in used:
            head = f"{each.codec} | {each.sound} | {each.frames:,}"
            lines += [f"| {head} | share | {' | '.join(f'{x:.1%}' for x in each.used)} |"]
            lines += [f"| {head} | bits | {' | '.join(f'{x:.2f}' for x in each.bits)} |"]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--held-back", type=Path, help="shards of recipes/audio/prepare.py: val")
    parser.add_argument("--trained-on", type=Path, help="shards of the same: train")
    parser.add_argument("--codecs", nargs="+", default=["sound-16khz"])
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="for which each speed is timed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fast = [] if args.no_speed else list(speeds(Meter("cpu", args.seconds)))
    good: list[Quality] = []
    used: list[Usage] = []
    for name in args.codecs:
        rate = load_codec(name).sample_rate
        assert rate is not None
        if args.held_back is not None:
            kinds = sounds_of(args.held_back, rate)
            used.append(usage(name, "held back", kinds))
            for each in qualities(name, kinds):
                print(f"{each.sound}: {each.codec}: mel {each.mel:.3f}", flush=True)
                good.append(each)
        if args.trained_on is not None:
            used.append(usage(name, "of the training", sounds_of(args.trained_on, rate)))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    machine = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, "
        f"torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    )
    device = f"cpu-{platform.machine()}"
    stem = args.out / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{device}-audio"
    found = {
        "machine": machine,
        "speed": [asdict(each) for each in fast],
        "quality": [asdict(each) for each in good],
        "codes": [asdict(each) for each in used],
    }
    write(stem.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    text = report(machine, fast, good, used)
    write(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
