"""Sound codecs: how fast they are, and how good beside Opus and MP3.

    python benchmarks/audio.py                                   speed alone
    python benchmarks/audio.py --sounds FOLDER --digits fsdd.tar   and quality

Speed: real-time factors (seconds of sound per second of one thread's processor time) of the preset
`encodec-24khz` beside EnCodec and DAC as `transformers` has them, all with random weights, in one
run; and of streams beside the whole. Quality: shipped codecs on the sound that their training held
back, with 2, 4 and all levels, beside Opus and MP3 at low settings. Bitrates of files count all
their bytes; neither format goes as low as these codecs do.
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

import soundfile
import torch
import torchaudio
from kernel_meter import Meter, write
from torch import Tensor

from unimm import build_codec, load_codec
from unimm.data.digits import read_fsdd
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
HELD_BACK = "speech-3436"  # whole; of the other recordings the last fifth
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


def held_back(sounds: Path, rate: int) -> dict[str, list[Tensor]]:
    """Kind -> sounds (1, 1, T) that no training of `recipes/audio` has seen."""
    found: dict[str, list[Tensor]] = {}
    for path in sorted(sounds.glob("*.ogg")):
        samples, own = soundfile.read(path, dtype="float32", always_2d=True)
        mono = torch.from_numpy(samples).mean(1)[None, None]
        if path.stem != HELD_BACK:
            mono = mono[..., mono.shape[-1] * 4 // 5 :]
        sound = torchaudio.functional.resample(mono, own, rate).clamp(-1, 1)
        kind = path.stem.split("-")[0]
        name = "unseen speaker" if path.stem == HELD_BACK else kind
        found.setdefault(name, []).append(sound)
    return found


def digits(tar: Path, rate: int) -> dict[str, list[Tensor]]:
    """Takes 5 to 9 of each speaker as one sound."""
    speakers: dict[str, list[Tensor]] = {}
    for recording in read_fsdd(tar):
        if recording.take in range(5, 10):
            speakers.setdefault(recording.speaker, []).append(recording.audio.samples)
    joined = [torch.cat(takes, dim=1)[None] for takes in speakers.values()]
    return {"digits": [torchaudio.functional.resample(x, 8000, rate).clamp(-1, 1) for x in joined]}


def qualities(name: str, kinds: dict[str, list[Tensor]], notes: list[str]) -> Iterator[Quality]:
    """A shipped codec at some numbers of levels, and the classical ones; notes on its codes."""
    codec = load_codec(name)
    assert isinstance(codec, StreamingCodec)
    assert codec.sample_rate is not None
    most = codec.num_codebooks
    counter = UsageCounter(most, codec.codebook_size)
    for kind, whole in kinds.items():
        codec.num_codebooks = most
        for sound in whole:
            counter.update(codec.encode(sound))
        sounds = [sound[..., : LONGEST * codec.sample_rate] for sound in whole]
        for levels in LEVELS:
            if levels <= most:
                codec.num_codebooks = levels
                yield quality(f"{name}, {levels} levels", codec, kind, sounds, codec.bitrate)
        for form, settings in (("opus", OPUS), ("mp3", MP3)):
            for setting in settings:
                yield classical(form, setting, codec.sample_rate, kind, sounds)
    frames, usage = int(counter.counts[0].sum()), counter.finish()
    notes.append(
        f"{name}: {frames:,} frames of held-back sound; of each level's codes used "
        f"{', '.join(f'{u:.1%}' for u in usage.usage.tolist())}; bits per code "
        f"{', '.join(f'{e:.2f}' for e in usage.entropy.tolist())}."
    )


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
    machine: str, fast: Sequence[Speed], good: Sequence[Quality], notes: Sequence[str]
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
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sounds", type=Path, help="folder of recordings, as recipes/audio has it")
    parser.add_argument("--digits", type=Path, help="fsdd.tar")
    parser.add_argument("--codecs", nargs="+", default=["sound-16khz"])
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="for which each speed is timed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fast = [] if args.no_speed else list(speeds(Meter("cpu", args.seconds)))
    good: list[Quality] = []
    notes: list[str] = []
    if args.sounds is not None:
        for name in args.codecs:
            rate = load_codec(name).sample_rate
            assert rate is not None
            kinds = held_back(args.sounds, rate)
            kinds |= digits(args.digits, rate) if args.digits is not None else {}
            for each in qualities(name, kinds, notes):
                print(f"{each.sound}: {each.codec}: mel {each.mel:.3f}", flush=True)
                good.append(each)
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
        "codes": notes,
    }
    write(stem.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    text = report(machine, fast, good, notes)
    write(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
