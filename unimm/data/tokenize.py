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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import unimm
from unimm.checkpoint import sha256
from unimm.data.batch import Layouts, Structure, structure_of
from unimm.data.manifest import Manifest, Recipe, digest, manifest_path
from unimm.data.media import MediaError
from unimm.data.shards import Sample, ShardReader, ShardWriter, remove_abandoned
from unimm.data.templates import Draw, Drawing, Fields, Template, check_templates, make_document
from unimm.sequence import Segment
from unimm.signals import Document, Item
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import MODALITIES, Vocabulary

IDS_FILE = "ids.npy"
META_FILE = "meta.json"
NPY_HEADER = 128
_log = logging.getLogger("unimm")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How shards are tokenized.

    Args:
        documents_per_sample: templates drawn for each sample; None writes every template once.
        seed: of the draws.
        max_skipped: share of a shard's samples that may be unusable; one always may.
        window: samples whose media are coded together.
        verify: compare every byte of a raw shard with its manifest, where it has one.
    """

    documents_per_sample: int | None = 1
    seed: int = 0
    max_skipped: float = 0.001
    window: int = 64
    verify: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.max_skipped <= 1:
            raise ValueError(
                f"window must be at least 1 and max_skipped in [0, 1], got {self.window} and "
                f"{self.max_skipped}"
            )


class TokenDocument(NamedTuple):
    """One document of a token shard: ids int64 (T,), template, key of the raw sample, items."""

    ids: torch.Tensor
    template: str
    source: str
    structure: Structure


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


class ShardTokenizer:
    """Tokenizer, templates and draws, checked against each other once for many shards.

    Args:
        tokenizer: codes the items; its codecs' device does the work.
        templates: how samples become documents.
        config: draws, seed, what may be skipped.

    Raises:
        ValueError: a template needs a modality that the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: UnifiedTokenizer,
        templates: Sequence[Template],
        config: TokenizeConfig | None = None,
    ) -> None:
        self.config = config or TokenizeConfig()
        check_templates(templates, tokenizer.vocabulary.modalities)
        self.tokenizer = tokenizer
        self.draw = Drawing(templates, self.config.documents_per_sample, self.config.seed)
        self._coders = coder_hashes(tokenizer)
        self._layouts = Layouts(tokenizer.grammar)
        self._dtype = ids_dtype(tokenizer.vocabulary)

    def recipe(self, source: str | Path) -> Recipe:
        """What decides the token shard of a raw shard.

        Raises:
            ValueError: the raw shard is missing, or is not the one of its manifest.
        """
        return Recipe(
            source=_source_hash(Path(source), verify=self.config.verify),
            vocabulary=self.tokenizer.vocabulary.fingerprint,
            coders=self._coders,
            templates=self.draw.digest,
            version=unimm.__version__,
        )

    def committed(self, source: str | Path, out: str | Path) -> Manifest | None:
        """The manifest of a token shard that is there already; None where it is not.

        Raises:
            ValueError: it was made from something else.
        """
        shard = Path(out) / Path(source).name
        if not manifest_path(shard).exists():
            return None
        manifest = Manifest.read(shard)
        if manifest.recipe is None:
            raise ValueError(f"{shard}: a raw shard stands here; write to another folder")
        difference = manifest.recipe.difference(self.recipe(source))
        if difference:
            raise ValueError(
                f"{shard}: was made with {difference}; write to another folder, or overwrite it"
            )
        manifest.check(shard)
        return manifest

    def run(
        self,
        source: str | Path,
        out: str | Path,
        on_progress: Callable[[float], None] | None = None,
    ) -> Manifest:
        """Tokenize one raw shard into `out`, under its own file name.

        Args:
            source: the raw shard.
            out: folder of the token shards; not the raw shard's own.
            on_progress: told the share of the shard that is done, now and then.

        Raises:
            ValueError: the raw shard is damaged, or too many of its samples are unusable.
        """
        source, shard = Path(source), Path(out) / Path(source).name
        if shard.resolve() == source.resolve():
            raise ValueError(f"{source}: token shards would replace raw ones; name another folder")
        recipe = self.recipe(source)
        reader = ShardReader(source)
        if manifest_path(source).exists():
            Manifest.read(source).check_samples(source, len(reader))
        remove_abandoned(shard)
        manifest_path(shard).unlink(missing_ok=True)  # what is about to be replaced is void
        skipped = _Skipped(source, len(reader), self.config.max_skipped)
        tokens: Counter[str] = Counter()
        with ShardWriter(shard) as writer:
            for start in range(0, len(reader), self.config.window):
                samples = reader.samples[start : start + self.config.window]
                for sample, documents in self._window(samples, skipped):
                    for number, document in enumerate(documents):
                        key = f"{sample.key}-{number}"
                        writer.write(key, self._files(document))
                        tokens.update(self._count(document))
                if on_progress is not None:
                    on_progress(min(1.0, (start + len(samples)) / len(reader)))
            if writer.samples == 0:
                raise ValueError(f"{source}: holds no usable sample {skipped.example}".rstrip())
        manifest = Manifest(
            shard=shard.name,
            samples=writer.samples,
            bytes=writer.bytes,
            sha256=writer.sha256,
            kind="tokens",
            tokens={m: tokens[m] for m in MODALITIES if tokens[m]},
            recipe=recipe,
            skipped=tuple(skipped.entries),
        )
        manifest.write(shard.parent)
        return manifest

    def _window(
        self, samples: Sequence[Sample], skipped: _Skipped
    ) -> Iterator[tuple[Sample, list[TokenDocument]]]:
        """The documents of a few samples; their media are coded together."""
        ready: list[tuple[Sample, list[tuple[Draw, Document]]]] = []
        for sample in samples:
            try:
                fields = Fields(sample)
                ready.append(
                    (
                        sample,
                        [
                            (
                                draw,
                                make_document(
                                    fields, draw.template, drop_condition=draw.drop_condition
                                ),
                            )
                            for draw in self.draw(sample)
                        ],
                    )
                )
            except ValueError as error:
                skipped.add(sample, error)
        try:
            coded = self._code(ready)
        except ValueError:
            # A codec refused one of the items: code the samples one by one to find whose it is.
            for sample, documents in ready:
                try:
                    coded = self._code([(sample, documents)])
                except ValueError as error:
                    skipped.add(sample, error)
                else:
                    yield sample, coded[0]
            return
        for (sample, _), documents in zip(ready, coded, strict=True):
            yield sample, documents

    def _code(
        self, ready: Sequence[tuple[Sample, Sequence[tuple[Draw, Document]]]]
    ) -> list[list[TokenDocument]]:
        """Documents -> ids; an item that several documents of a sample hold is coded once."""
        items: dict[int, Item] = {
            id(item): item
            for _, documents in ready
            for _, document in documents
            for item in document
        }
        segments = dict(zip(items, self.tokenizer.encode_items(list(items.values())), strict=True))
        coded = []
        for sample, documents in ready:
            written = []
            for draw, document in documents:
                parts: list[Segment] = [segments[id(item)] for item in document]
                ids = self.tokenizer.grammar.encode(parts)
                label = draw.template.label
                written.append(TokenDocument(ids, label, sample.key, structure_of(parts)))
            coded.append(written)
        return coded

    def _files(self, document: TokenDocument) -> dict[str, bytes]:
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

    def _count(self, document: TokenDocument) -> dict[str, int]:
        layout = self._layouts(document.structure, document.ids.numpy())
        counts = np.bincount(layout.modality, minlength=len(MODALITIES))
        return dict(zip(MODALITIES, counts.tolist(), strict=True))


class _Skipped:
    """Unusable samples of one shard, up to the share that is allowed."""

    def __init__(self, source: Path, samples: int, share: float) -> None:
        self._source = source
        self._samples = samples
        self._allowed = max(1, int(share * samples))
        self.entries: list[dict[str, str]] = []

    def add(self, sample: Sample, error: ValueError) -> None:
        """Count a sample; raise when there are too many."""
        reason = error.reason if isinstance(error, MediaError) else str(error)
        self.entries.append({"key": sample.key, "reason": reason})
        _log.warning("%s: skipped: %s", sample.where, reason)
        if len(self.entries) > self._allowed:
            raise TooManySkippedError(
                f"{self._source}: more than {self._allowed} of {self._samples} samples are "
                f"unusable {self.example}; repair them or raise max_skipped"
            ) from None

    @property
    def example(self) -> str:
        """The first skipped sample, in brackets."""
        first = next(iter(self.entries), None)
        return "" if first is None else f"(the first is {first['key']}: {first['reason']})"


class TooManySkippedError(ValueError):
    """More samples of a shard are unusable than `max_skipped` allows."""


def tokenize_shard(
    source: str | Path,
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
