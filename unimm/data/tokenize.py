"""Raw shards -> token shards: `tokenize_shard` is one unit of work, whole or absent.

A token shard holds, for every document, `ids.npy` (uint16, or uint32 from 65,536 ids on) and
`meta.json` (template, source key, items). It is written beside its final name, moved there whole,
and committed by its manifest. The bytes depend on the raw shard, tokenizer, templates, draws and
seed, on one kind of device, and on nothing else. Many shards at once: `unimm.data.tokenize_many`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import unimm
from unimm.checkpoint import sha256
from unimm.data.batch import Structure, structure_of
from unimm.data.coding import Coder, Slot
from unimm.data.manifest import Manifest, Recipe, digest, manifest_path
from unimm.data.prefetch import Prefetch
from unimm.data.preparing import Prepared, Preparer
from unimm.data.shards import Sample, ShardReader, ShardWriter, remove_abandoned
from unimm.data.sources import Source
from unimm.data.templates import Drawing, Template, check_templates
from unimm.sequence import Segment
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import MODALITIES, Vocabulary

IDS_FILE = "ids.npy"
META_FILE = "meta.json"
NPY_HEADER = 128
PREFETCH_BYTES = 2**28  # of decoded signals that wait for the codecs
WAITING_SAMPLES = 16  # batches' worth of samples that may wait for a batch of theirs to fill
_log = logging.getLogger("unimm")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How shards are tokenized.

    Args:
        documents_per_sample: templates drawn for each sample; None writes every template once.
        seed: of the draws.
        max_skipped: share of a shard's samples that may be unusable; one always may.
        batch_size: signals of one shape that are coded together, at most.
        decoders: threads that read and decode beside the codecs; 0 decodes between them.
        verify: compare also shards that are committed already with every byte of their source and
            manifest; what is tokenized is always compared with the manifest of its source.
    """

    documents_per_sample: int | None = 1
    seed: int = 0
    max_skipped: float = 0.001
    batch_size: int = 64
    decoders: int = 1
    verify: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.decoders < 0 or not 0 <= self.max_skipped <= 1:
            raise ValueError(
                f"batch_size must be at least 1, decoders at least 0 and max_skipped in [0, 1], "
                f"got {self.batch_size}, {self.decoders} and {self.max_skipped}"
            )


class Progress(NamedTuple):
    """How far a shard is: samples done of all, documents and ids per modality so far."""

    samples: int
    total: int
    documents: int
    tokens: Mapping[str, int]


def coder_hashes(tokenizer: UnifiedTokenizer) -> dict[str, str]:
    """sha256 (hex) of the text model and of every codec's configuration and weights."""
    hashes = {"text": hashlib.sha256(tokenizer.text.model).hexdigest()}
    for modality, codec in tokenizer.codecs.items():
        if modality != codec.modality:
            continue
        total = hashlib.sha256(digest({"codec": codec.name, **asdict(codec.config)}).encode())
        for name, tensor in sorted(codec.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            total.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
            total.update(data.reshape(-1).view(torch.uint8).numpy())
        hashes[modality] = total.hexdigest()
    return hashes


Decoding = Callable[[Preparer, Sequence[Sample]], Iterator[Prepared]]


class ShardTokenizer:
    """Tokenizer, templates and draws, checked against each other once for many shards.

    Args:
        tokenizer: codes the items; its codecs' device does the work.
        templates: how samples become documents.
        config: draws, seed, what may be skipped.
        decoding: how samples are prepared, in their order; threads of this process when None.

    Raises:
        ValueError: a template needs a modality that the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: UnifiedTokenizer,
        templates: Sequence[Template],
        config: TokenizeConfig | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> None:
        self.config = config or TokenizeConfig()
        check_templates(templates, tokenizer.vocabulary.modalities)
        self.tokenizer = tokenizer
        self.draw = Drawing(templates, self.config.documents_per_sample, self.config.seed)
        self._preparer = Preparer(tokenizer, self.draw)
        self._decoding = decoding or self._in_threads
        self._coders = coder_hashes(tokenizer)
        self._dtype = ids_dtype(tokenizer.vocabulary)

    def recipe(self, source: str) -> Recipe:
        """What decides the token shard of a raw shard.

        Args:
            source: sha256 (hex) of the raw shard.
        """
        return Recipe(
            source=source,
            vocabulary=self.tokenizer.vocabulary.fingerprint,
            coders=self._coders,
            templates=self.draw.digest,
            version=unimm.__version__,
        )

    def committed(self, source: Source | str | Path, out: str | Path) -> Manifest | None:
        """The manifest of a token shard that is there already; None where it is not.

        Raises:
            ValueError: it was made from something else.
        """
        source, verify = Source.of(source), self.config.verify
        shard = Path(out) / source.name
        if not manifest_path(shard).exists():
            return None
        manifest = Manifest.read(shard)
        if manifest.recipe is None:
            raise ValueError(f"{shard}: a raw shard stands here; write to another folder")
        if not verify and manifest.origin and manifest.origin == source.origin():
            known = manifest.recipe.source
        else:
            with source.local(out) as path:
                known = _source_hash(path, verify=verify)
        difference = manifest.recipe.difference(self.recipe(known))
        if difference:
            raise ValueError(
                f"{shard}: was made with {difference}; write to another folder, or overwrite it"
            )
        manifest.check(shard, verify=verify)
        return manifest

    def run(
        self,
        source: Source | str | Path,
        out: str | Path,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Manifest:
        """Tokenize one raw shard into `out`, under its own file name.

        Args:
            source: the raw shard.
            out: folder of the token shards; not the raw shard's own.
            on_progress: told now and then how far the shard is.

        Raises:
            ValueError: the raw shard is damaged, or too many of its samples are unusable.
        """
        source = Source.of(source)
        shard = Path(out) / source.name
        if source.path is not None and shard.resolve() == source.path.resolve():
            raise ValueError(f"{source}: token shards would replace raw ones; name another folder")
        origin = source.origin()
        with source.local(out) as path:
            reader = _checked_reader(path)
            recipe = self.recipe(_source_hash(path, verify=True))
            remove_abandoned(shard)
            manifest_path(shard).unlink(missing_ok=True)  # what is about to be replaced is void
            skipped = _Skipped(path, len(reader), self.config.max_skipped)
            tokens: Counter[str] = Counter()
            done = 0
            with ShardWriter(shard) as writer:
                for key, documents in self._documents(reader.samples, skipped):
                    done += 1
                    for number, document in enumerate(documents):
                        writer.write(f"{key}-{number}", self._files(document))
                        tokens.update(document.tokens)
                    if on_progress is not None:
                        on_progress(Progress(done, len(reader), writer.samples, tokens))
                if writer.samples == 0:
                    raise ValueError(f"{path}: holds no usable sample {skipped.example}".rstrip())
        manifest = Manifest(
            shard=shard.name,
            samples=writer.samples,
            bytes=writer.bytes,
            sha256=writer.sha256,
            kind="tokens",
            tokens={m: tokens[m] for m in MODALITIES if tokens[m]},
            recipe=recipe,
            skipped=tuple(skipped.entries),
            origin=origin,
            device=_device_name(self.tokenizer),
        )
        manifest.write(shard.parent)
        return manifest

    def _in_threads(self, preparer: Preparer, samples: Sequence[Sample]) -> Iterator[Prepared]:
        prefetch = Prefetch(
            preparer,
            lambda prepared: prepared.bytes,
            threads=self.config.decoders,
            ahead=2 * self.config.batch_size,
            budget=PREFETCH_BYTES,
        )
        return prefetch(samples)

    def _documents(
        self, samples: Sequence[Sample], skipped: _Skipped
    ) -> Iterator[tuple[str, list[_Document]]]:
        """The documents of all samples, in order; none for those that are left out."""
        coder = Coder(self.tokenizer, self.config.batch_size)
        waiting: deque[tuple[Sample, Prepared, list[Slot]]] = deque()
        most = WAITING_SAMPLES * self.config.batch_size
        for sample, prepared in zip(samples, self._decoding(self._preparer, samples), strict=True):
            waiting.append((sample, prepared, [coder.add(part) for part in prepared.parts]))
            while len(waiting) > most and not _done(waiting[0]):
                coder.relieve()
            while waiting and _done(waiting[0]):
                yield self._finished(*waiting.popleft(), skipped)
        coder.flush()
        while waiting:
            yield self._finished(*waiting.popleft(), skipped)

    def _finished(
        self, sample: Sample, prepared: Prepared, slots: Sequence[Slot], skipped: _Skipped
    ) -> tuple[str, list[_Document]]:
        error = prepared.error or next((slot.error for slot in slots if slot.error), "")
        if error:
            skipped.add(sample, error)
            return sample.key, []
        documents = []
        for template, places in prepared.documents:
            parts = [slots[place].segment for place in places]
            segments = [segment for segment in parts if segment is not None]
            assert len(segments) == len(places)
            try:
                ids = self.tokenizer.grammar.encode(segments)
            except ValueError as refused:  # an item too large for its size to be written
                skipped.add(sample, str(refused))
                return sample.key, []
            facts = (structure_of(segments), self._count(segments))
            documents.append(_Document(ids, template, sample.key, *facts))
        return sample.key, documents

    def _files(self, document: _Document) -> dict[str, bytes]:
        meta = {
            "template": document.template,
            "source": document.source,
            "items": document.structure,
        }
        ids = document.ids.numpy().astype(self._dtype)
        return {
            IDS_FILE: npy_header(self._dtype, len(ids)) + ids.tobytes(),
            META_FILE: json.dumps(meta, separators=(",", ":")).encode(),
        }

    def _count(self, segments: Sequence[Segment]) -> Counter[str]:
        """Ids by modality, as a layout says; `<bos>`, `<eos>` and turns count as text."""
        tokens = Counter({"text": 2})
        for segment in segments:
            kind = segment.kind if segment.kind in self.tokenizer.grammar.rules else "text"
            tokens[kind] += self.tokenizer.grammar.length(segment)
        return tokens


class _Document(NamedTuple):
    """A document of a token shard: ids int64 (T,), template, key of the sample, items, counts."""

    ids: torch.Tensor
    template: str
    source: str
    structure: Structure
    tokens: Counter[str]


def _done(waiting: tuple[Sample, Prepared, list[Slot]]) -> bool:
    return all(slot.done for slot in waiting[2])


def _checked_reader(path: Path) -> ShardReader:
    """A raw shard, its number of samples compared with its manifest, where it has one."""
    reader = ShardReader(path)
    if manifest_path(path).exists():
        Manifest.read(path).check_samples(path, len(reader))
    return reader


def _device_name(tokenizer: UnifiedTokenizer) -> str:
    codec = next(iter(tokenizer.codecs.values()), None)
    if codec is None:
        return ""
    device = next(codec.parameters()).device
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {platform.machine()}"


class _Skipped:
    """Unusable samples of one shard, up to the share that is allowed."""

    def __init__(self, source: Path, samples: int, share: float) -> None:
        self._source = source
        self._samples = samples
        self._allowed = max(1, int(share * samples))
        self.entries: list[dict[str, str]] = []

    def add(self, sample: Sample, reason: str) -> None:
        """Count a sample; raise when there are too many."""
        self.entries.append({"key": sample.key, "reason": reason})
        _log.warning("%s: skipped: %s", sample.where, reason)
        if len(self.entries) > self._allowed:
            raise TooManySkippedError(
                f"{self._source}: more than {self._allowed} of {self._samples} samples are "
                f"unusable {self.example}; repair them or raise max_skipped"
            )

    @property
    def example(self) -> str:
        """The first skipped sample, in brackets."""
        first = next(iter(self.entries), None)
        return "" if first is None else f"(the first is {first['key']}: {first['reason']})"


class TooManySkippedError(ValueError):
    """More samples of a shard are unusable than `max_skipped` allows."""


def tokenize_shard(
    source: Source | str | Path,
    out: str | Path,
    tokenizer: UnifiedTokenizer,
    templates: Sequence[Template],
    config: TokenizeConfig | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Tokenize one raw shard into the folder `out`; a committed one is left as it is.

    Raises:
        ValueError: a template or the raw shard is unusable, or the committed shard was made from
            something else and `overwrite` is not set.
    """
    worker = ShardTokenizer(tokenizer, templates, config)
    return (None if overwrite else worker.committed(source, out)) or worker.run(source, out)


def _source_hash(source: Path, *, verify: bool) -> str:
    """sha256 of a raw shard: from its manifest where it has one, else from its bytes."""
    if not source.is_file():
        raise ValueError(f"{source}: no such shard")
    if manifest_path(source).exists():
        manifest = Manifest.read(source)
        manifest.check(source, verify=verify)
        return manifest.sha256
    return sha256(source)


def ids_dtype(vocabulary: Vocabulary) -> str:
    """How token shards of a vocabulary store an id."""
    return "<u2" if len(vocabulary) < 2**16 else "<u4"


@lru_cache(maxsize=65536)
def npy_header(dtype: str, length: int) -> bytes:
    """The 128 bytes with which NumPy's format 1.0 begins a vector; dtype as in "<u2"."""
    fields = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


def read_ids(data: bytes, dtype: str) -> NDArray[np.unsignedinteger]:
    """The vector in an `ids.npy` that `npy_header` begins.

    Raises:
        ValueError: it is something else, or damaged.
    """
    length = (len(data) - NPY_HEADER) // np.dtype(dtype).itemsize
    if data[:NPY_HEADER] != npy_header(dtype, length):
        raise ValueError(f"{IDS_FILE} is damaged")
    return np.frombuffer(data, dtype, count=length, offset=NPY_HEADER)
