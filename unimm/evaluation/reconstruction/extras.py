"""Measures of speech by other packages (extra `bench`): PESQ, STOI, ViSQOL.

PESQ (ITU-T P.862, package `pesq`) has two bands that must not be mixed: "pesq_wb" is taken at
16 kHz, "pesq_nb" at 8 kHz, and neither of sound that was recorded below that. STOI (Taal et al.
2011, package `pystoi`). ViSQOL (Chinen et al., arXiv 2004.09584, package `visqol-python`) in its
speech mode at 16 kHz with the polynomial mapping.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torchaudio
from numpy.typing import NDArray
from torch import Tensor


class _Extra(NamedTuple):
    module: str
    package: str
    sample_rate: int


EXTRAS: Mapping[str, _Extra] = {
    "pesq_wb": _Extra("pesq", "pesq", 16000),
    "pesq_nb": _Extra("pesq", "pesq", 8000),
    "stoi": _Extra("pystoi", "pystoi", 10000),
    "visqol": _Extra("visqol", "visqol-python", 16000),
}


def unavailable(name: str, sample_rate: int) -> str | None:
    """Why a measure cannot be taken of sounds at `sample_rate`; None if it can."""
    extra = EXTRAS[name]
    if sample_rate < extra.sample_rate and name != "stoi":
        return (
            f"{name} needs sound at {extra.sample_rate} Hz or more, the protocol has {sample_rate}"
        )
    if find_spec(extra.module) is None:
        return f"{name} needs the package {extra.package}: pip install {extra.package}"
    return None


def speech_quality(name: str, made: Tensor, real: Tensor, sample_rate: int) -> float:
    """One measure of one sound, (1, C, T), channels averaged; NaN where there is no speech.

    Raises:
        ValueError: the sample rate is below what the measure is defined for.
    """
    reason = unavailable(name, sample_rate)
    if reason is not None:
        raise ValueError(reason)
    rate = sample_rate if name == "stoi" else EXTRAS[name].sample_rate
    sounds = []
    for sound in (real, made):
        mono = sound[0].mean(dim=0).cpu().float()
        if rate != sample_rate:
            mono = torchaudio.functional.resample(mono, sample_rate, rate)
        sounds.append(mono.numpy())
    if np.abs(sounds[0]).max() < 1e-5:
        return (
            math.nan
        )  # there is nothing to understand, and the packages give numbers all the same
    with warnings.catch_warnings():
        # The packages warn of silent or short speech and give a number all the same.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(_MEASURES[name](sounds[0], sounds[1], rate))
        except (RuntimeWarning, _NoSpeech):
            return math.nan


class _NoSpeech(Exception):
    pass


def _pesq(real: NDArray[Any], made: NDArray[Any], rate: int) -> float:
    from pesq import PesqError, pesq  # pyright: ignore[reportMissingImports]

    try:
        return pesq(rate, real, made, "wb" if rate == 16000 else "nb")
    except PesqError:  # no utterance, or less than a quarter of a second
        raise _NoSpeech from None


def _stoi(real: NDArray[Any], made: NDArray[Any], rate: int) -> float:
    from pystoi import stoi  # pyright: ignore[reportMissingImports]

    return float(stoi(real, made, rate))


def _visqol(real: NDArray[Any], made: NDArray[Any], rate: int) -> float:
    from visqol import VisqolApi  # pyright: ignore[reportMissingImports]

    api = VisqolApi()
    api.create(mode="speech", use_lattice_model=False)
    found = api.measure_from_arrays(real.astype(np.float64), made.astype(np.float64), rate)
    return float(found.moslqo)


_MEASURES = {"pesq_wb": _pesq, "pesq_nb": _pesq, "stoi": _stoi, "visqol": _visqol}
