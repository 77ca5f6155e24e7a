"""Running a benchmark: every sample, once, through every codec that serves it."""

from __future__ import annotations

import hashlib
import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from unimm.evaluation import metrics
from unimm.evaluation.reconstruction.exactness import measure_exactness
from unimm.evaluation.reconstruction.extras import speech_quality, unavailable
from unimm.evaluation.reconstruction.predictability import measure_predictability
from unimm.evaluation.reconstruction.protocol import Protocol, given, reference, taken
from unimm.evaluation.reconstruction.results import Example, Failure, Results, Row, Summary
from unimm.evaluation.reconstruction.samples import Data, Sample, gather, limited
from unimm.evaluation.reconstruction.tables import KEY_MEASURE, rate_of
from unimm.evaluation.reconstruction.timing import code, device_of, peak_mib, stream_latency
from unimm.evaluation.reconstruction.weights import (
    Judge,
    Moments,
    SampleJudge,
    SetJudge,
    WeightFile,
    frechet_distance,
    open_judges,
)
from unimm.evaluation.report import environment
from unimm.evaluation.statistics import bootstrap_mean
from unimm.signals import Audio, Item, Video
from unimm_tokenizers.adapters import ByteCodec
from unimm_tokenizers.codec import Codec

_PACKAGES = ("numpy", "pillow", "torchaudio", "soundfile", "av", "pesq", "pystoi", "transformers")


def run(
    codecs: Mapping[str, Codec],
    data: Data,
    protocol: Protocol | None = None,
    *,
    weights: Mapping[str, WeightFile] | None = None,
    progress: bool = False,
) -> Results:
    """Send every sample through every codec that serves its modality, and measure.

    Args:
        codecs: name -> codec.
        data: shards, a folder of media files, samples, or several of these; see `read_samples`.
        protocol: None takes the defaults.
        weights: name -> local file, for measures by a network; see `weights.NEEDED`.
        progress: draw a bar on the terminal.

    Raises:
        ValueError: there is nothing to read, no sample for one of the codecs, or weights that are
            not what they should be.
    """
    protocol = protocol or Protocol()
    samples = limited(gather(data), protocol.limit)
    judges, absent = open_judges(weights or {})
    skipped = _skipped(protocol, {sample.modality for sample in samples}, absent)
    benches = [
        _Bench(name, codec, modality, protocol, judges, skipped)
        for name, codec in codecs.items()
        for modality in _served(name, codec, samples)
    ]
    digests: dict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
    for sample in track(samples, "benchmark", disable=not progress):
        serving = [bench for bench in benches if bench.serves(sample)]
        if not serving:
            continue
        try:
            real = reference(sample.load(), protocol)
        except (ValueError, RuntimeError) as error:
            for bench in serving:
                bench.fail(sample.key, error)
            continue
        digests[sample.modality].update(real.flatten().numpy().data)
        for bench in serving:
            bench.add(sample.key, real)
    for kind in ("image", "semantic"):  # both are pictures, and one codec may serve either
        digests.setdefault(kind, digests["image"])
    summaries = [bench.summary(digests[bench.modality].hexdigest()) for bench in benches]
    return Results(
        protocol,
        [row for bench in benches for row in bench.rows],
        [failure for bench in benches for failure in bench.failures],
        summaries,
        skipped,
        _environment(),
        [example for bench in benches for example in bench.examples],
    )


def _skipped(
    protocol: Protocol, modalities: Iterable[str], absent: Mapping[str, str]
) -> dict[str, str]:
    """Measures that cannot be taken, and why; those of modalities that are not there are silent."""
    there = set(modalities)
    skipped = {}
    if "audio" in there:
        for name in protocol.extras:
            reason = unavailable(name, protocol.sample_rate)
            if reason is not None:
                skipped[name] = reason
    kinds = {"wer": "audio", "utmos": "audio", "rfvd": "video"}
    return skipped | {n: why for n, why in absent.items() if kinds.get(n, "image") in there}


def _served(name: str, codec: Codec, samples: Sequence[Sample]) -> list[str]:
    """The modalities of a codec that there are samples of; pictures also serve semantic codecs."""
    there = {sample.modality for sample in samples}
    found = [
        modality
        for modality in codec.modalities
        if modality in there or (modality == "semantic" and "image" in there)
    ]
    if not found:
        raise ValueError(
            f"{name}: serves {' and '.join(codec.modalities)}, but the data holds "
            f"{', '.join(sorted(there)) or 'nothing'}"
        )
    return found


def _environment() -> dict[str, str]:
    """Versions of all that decides a figure, and the machine."""
    facts = {**environment(), "processor": platform.processor() or platform.machine()}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


class _Bench:
    """One codec on one modality."""

    def __init__(
        self,
        name: str,
        codec: Codec,
        modality: str,
        protocol: Protocol,
        judges: Sequence[Judge],
        skipped: Mapping[str, str],
    ) -> None:
        self.name, self.codec, self.modality, self.protocol = name, codec.eval(), modality, protocol
        kind = "image" if modality == "semantic" else modality
        self.judges = [judge for judge in judges if judge.modality == kind]
        self.extras = [e for e in protocol.extras if kind == "audio" and e not in skipped]
        self.moments = {
            judge.measure: (Moments(), Moments())
            for judge in self.judges
            if isinstance(judge, SetJudge)
        }
        self.rows: list[Row] = []
        self.failures: list[Failure] = []
        self.examples: list[Example] = []
        self.codes: list[Tensor] = []
        self.signals: list[Tensor] = []  # the first ones, for exactness
        self.first_call_seconds: float | None = None
        self.largest: Tensor | None = None

    def serves(self, sample: Sample) -> bool:
        """Whether a sample is of this modality."""
        pictures = self.modality == "semantic" and sample.modality == "image"
        return pictures or sample.modality == self.modality

    def fail(self, key: str, error: Exception) -> None:
        """Count and name a sample that could not be measured."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self.failures.append(Failure(self.name, self.modality, key, reason))

    def add(self, key: str, real: Tensor) -> None:
        """Code and measure one reference (1, C, *signal), or note why that failed."""
        try:
            signal = given(real, self.codec, self.protocol)
            if self.first_call_seconds is None:
                first = code(self.codec, signal)
                self.first_call_seconds = first.encode_seconds + first.decode_seconds
            coded = code(self.codec, signal)
            made = taken(coded.made, signal, real, self.codec, self.protocol)
            values = self._measured(key, made, real)
        except (ValueError, RuntimeError) as error:
            self.fail(key, error)
            return
        amount = float(real[0, 0].numel())
        if self.modality == "audio":
            amount /= self.protocol.sample_rate
        bits = float(metrics.code_bits(coded.codes, self.codec.codebook_size))
        values[rate_of(self.modality)] = bits / amount / (1000 if self.modality == "audio" else 1)
        tokens = int((coded.codes >= 0).sum())
        place = (self.name, self.modality, key)
        seconds = (coded.encode_seconds, coded.decode_seconds)
        self.rows.append(Row(*place, tokens, amount, *seconds, values))
        self.codes.append(coded.codes)
        if len(self.signals) < self.protocol.exactness:
            self.signals.append(signal)
        if self.largest is None or signal.numel() > self.largest.numel():
            self.largest = signal
        if len(self.examples) < self.protocol.examples:
            self._show(key, real, made, signal, coded.codes[0], values)

    def _measured(self, key: str, made: Tensor, real: Tensor) -> dict[str, float]:
        kind = "image" if self.modality == "semantic" else self.modality
        rate = self.protocol.sample_rate
        values = metrics.measure(kind, made, real, rate)
        speech = self.protocol.is_speech(key)
        for name in self.extras:
            values[name] = speech_quality(name, made, real, rate) if speech else math.nan
        for judge in self.judges:
            if isinstance(judge, SampleJudge):
                heard = speech or not judge.speech
                values[judge.measure] = judge.score(made, real, rate) if heard else math.nan
            elif isinstance(judge, SetJudge):
                for moments, signal in zip(self.moments[judge.measure], (made, real), strict=True):
                    moments.add(judge.features(signal))
        return values

    def _show(
        self,
        key: str,
        real: Tensor,
        made: Tensor,
        signal: Tensor,
        codes: Tensor,
        values: Mapping[str, float],
    ) -> None:
        regions = None
        if self.modality == "semantic" and hasattr(self.codec, "explain"):
            x = signal.to(device_of(self.codec))
            regions = self.codec.explain(x)[0].cpu()  # pyright: ignore[reportCallIssue]
        items = [_item(self.modality, x[0], self.protocol) for x in (real, made)]
        measure = KEY_MEASURE[self.modality]
        name, _, unit = metrics.MEASURES[measure].label.partition(", ")
        note = f"{name} {values[measure]:.3g} {unit}".strip()
        place = (self.name, self.modality, key)
        self.examples.append(Example(*place, items[0], items[1], codes, regions, note))

    def summary(self, digest: str) -> Summary:
        """Figures over all samples; no means where every sample failed."""
        measured: dict[str, list[float]] = {}
        undefined: dict[str, int] = {}
        for name in self.rows[0].values if self.rows else ():
            values = [row.values[name] for row in self.rows]
            measured[name] = [value for value in values if not math.isnan(value)]
            undefined[name] = len(values) - len(measured[name])
        seed, count = self.protocol.seed, len(self.rows)
        usage = metrics.usage(self.codes, self.codec.codebook_size) if count else None
        entropy = usage.entropy.tolist() if usage else []
        classical = isinstance(self.codec, ByteCodec)
        amount = sum(row.amount for row in self.rows)
        tokens = sum(row.tokens for row in self.rows)
        bits = 8.0 if classical else sum(entropy) / max(1, len(entropy))
        audio = self.modality == "audio"
        unit = 1.0 if audio else 1e6
        largest = self.largest
        return Summary(
            codec=self.name,
            modality=self.modality,
            samples=count,
            failed=len(self.failures),
            means={m: bootstrap_mean(v, seed=seed) for m, v in measured.items() if v},
            undefined={m: n for m, n in undefined.items() if n},
            whole={m: frechet_distance(*pair) for m, pair in self.moments.items() if count},
            tokens=tokens / max(1, count),
            token_rate=tokens / amount if count else 0.0,
            usage=usage.usage.tolist() if usage else [],
            perplexity=usage.perplexity.tolist() if usage else [],
            entropy=entropy,
            coded_rate=tokens / amount * bits / (1000 if audio else 1) if count else 0.0,
            encode_speed=amount / unit / max(1e-9, sum(row.encode_seconds for row in self.rows)),
            decode_speed=amount / unit / max(1e-9, sum(row.decode_seconds for row in self.rows)),
            encode_ms=1000 * statistics.median([row.encode_seconds for row in self.rows] or [0.0]),
            decode_ms=1000 * statistics.median([row.decode_seconds for row in self.rows] or [0.0]),
            latency_ms=stream_latency(self.codec),
            peak_mib=None
            if largest is None
            else peak_mib(device_of(self.codec), lambda: code(self.codec, largest)),
            first_call_seconds=self.first_call_seconds,
            classical=classical,
            exactness=measure_exactness(self.codec, self.signals) if self.signals else None,
            predictability=None
            if classical or not count or not self.protocol.probes
            else measure_predictability(self.codes, self.codec.codebook_size, seed=seed),
            reference=digest,
            weights=_weights(self.codec),
        )


def _weights(codec: Codec) -> str:
    """sha256 of a codec's config and weights."""
    digest = hashlib.sha256(repr(codec.config).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _item(modality: str, signal: Tensor, protocol: Protocol) -> Item:
    """(C, *signal) in [-1, 1] -> what a page shows."""
    if modality == "audio":
        return Audio(signal.clone(), protocol.sample_rate)
    pixels = ((signal + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if modality == "video":
        return Video(pixels.permute(1, 2, 3, 0).contiguous(), protocol.rate_of("video"))
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
