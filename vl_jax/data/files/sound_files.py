"""Sound files to numbers: WAV by itself, whatever else libsndfile reads (FLAC, MP3, OGG) with its package.

    RIFF | size | WAVE | chunk ... | "fmt " size (format, channels, rate, ..., bits) | "data" size (samples)

A file is looked at by its header first, so that none is read that is longer than it may be.
"""

from __future__ import annotations

import importlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from vl_jax.data.sample import BadSample

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_STEPS = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}
_MAX_CHANNELS, _RATES = 16, range(1000, 384_001)
_UNKNOWN = 0x7FFFF000  # sizes from here on are those of a writer that could not go back: all that follows
# How FLAC, OGG, and MP3 with a tag or without begin; the last with eleven bits that are set.
_OTHERS, _MPEG = (b"fLaC", b"OggS", b"ID3"), b"\xff\xe0"
_MAX_CHUNKS, _MAX_FORMAT = 1000, 40  # chunks before the sound, bytes of the format


class Sound(NamedTuple):
    """Samples of all channels, full scale at 1."""

    samples: Float[np.ndarray, "n channels"]
    rate: int  # samples a second


@dataclass(frozen=True)
class Header:
    """What a sound file says of itself."""

    rate: int  # samples a second
    channels: int
    length: int  # samples of a channel

    @property
    def seconds(self) -> float:
        return self.length / self.rate


class _Format(NamedTuple):
    tag: int
    channels: int
    rate: int
    bits: int

    @property
    def frame(self) -> int:
        """Bytes of one sample of all channels."""
        return self.channels * self.bits // 8


def read_header(file: Path, where: str) -> Header:
    """Rate, channels and length, without reading a sample.

    Raises:
      BadSample: there is no such file, or it is no sound that can be read here.
    """
    return _use(file, where, _wav_header, _other_header)


def read_sound(file: Path, where: str) -> Sound:
    """All samples of a file.

    Raises:
      BadSample: as ``read_header``; or the file ends before its sound does, or it holds what is no number.
    """
    sound = _use(file, where, _wav_samples, _other_samples)
    if not np.isfinite(sound.samples).all():
        raise BadSample("corrupt_audio", f"{where}: {file} holds samples that are no finite numbers")
    return sound


def read_blocks(file: Path, where: str, size: int) -> Iterator[Float[np.ndarray, "n channels"]]:
    """The samples of a file, so many at a time; the last block may be shorter.

    Raises:
      BadSample: as ``read_sound``.
    """
    header = read_header(file, where)
    for start in range(0, header.length, size):

        def wav(opened: BinaryIO, start: int = start) -> np.ndarray:
            form, _ = _wav_chunks(opened)
            opened.seek(start * form.frame, os.SEEK_CUR)
            count = min(size, header.length - start)
            data = np.frombuffer(opened.read(count * form.frame), np.uint8)
            return _levels(data, form).reshape(-1, form.channels)

        def other(path: Path, begins: bytes, start: int = start) -> np.ndarray:
            with _soundfile(begins).SoundFile(path) as opened:
                opened.seek(start)
                return opened.read(size, dtype="float32", always_2d=True)

        block = _use(file, where, wav, other)
        if not np.isfinite(block).all():
            raise BadSample("corrupt_audio", f"{where}: {file} holds samples that are no finite numbers")
        yield block


def _use(file: Path, where: str, wav: Any, other: Any) -> Any:
    """What the reader of the file's format makes of it."""
    if not os.path.isfile(file):
        raise BadSample("missing_audio", f"{where}: no sound file {file}")
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
            if start[:4] == b"RIFF" and start[8:] == b"WAVE":
                return wav(opened)
        return other(file, start)
    except _NoDecoderError as error:
        raise BadSample("missing_package", f"{where}: {file}: {error}") from None
    except Exception as error:  # Decoders of hostile files raise almost anything.
        message = f"{where}: cannot read {file}: {error or type(error).__name__}"
        raise BadSample("corrupt_audio", message) from None


def _wav_chunks(file: BinaryIO) -> tuple[_Format, int]:
    """The format, and the bytes of sound from the file's position on."""
    form, end = None, os.fstat(file.fileno()).st_size
    for _ in range(_MAX_CHUNKS):
        name, size = struct.unpack("<4sI", file.read(8))
        left = end - file.tell()
        if name == b"data":
            if form is None:
                raise ValueError("its data come before their format")
            if left < size < _UNKNOWN:
                raise ValueError(f"cut off: {left} bytes of sound of {size}")
            return form, min(size, left)
        if size > left:
            raise ValueError(f"cut off in the chunk {name!r}")
        start = file.tell()
        if name == b"fmt ":
            form = _wav_format(file.read(min(size, _MAX_FORMAT)))
        file.seek(start + size + (size & 1))
    raise ValueError(f"no sound in its first {_MAX_CHUNKS} chunks")


def _wav_format(data: bytes) -> _Format:
    tag, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", data)
    if tag == _EXTENSIBLE:
        (tag,) = struct.unpack_from("<H", data, 24)
    if (tag, bits) not in _STEPS:
        raise ValueError(f"format {tag} of {bits} bits; known are PCM of 8, 16, 24, 32 bits, float of 32, 64")
    form = _Format(tag, channels, rate, bits)
    if not 1 <= channels <= _MAX_CHANNELS or rate not in _RATES or frame != form.frame:
        raise ValueError(f"{channels} channels at {rate} Hz in frames of {frame} bytes")
    return form


def _wav_header(file: BinaryIO) -> Header:
    form, size = _wav_chunks(file)
    return Header(form.rate, form.channels, size // form.frame)


def _wav_samples(file: BinaryIO) -> Sound:
    form, size = _wav_chunks(file)
    data = np.frombuffer(file.read(size // form.frame * form.frame), np.uint8)
    return Sound(_levels(data, form).reshape(-1, form.channels), form.rate)


def _levels(data: np.ndarray, form: _Format) -> np.ndarray:
    """Bytes to numbers of which 1 is full scale; eight bits have no sign."""
    if form.tag == _FLOAT:
        return data.view(f"<f{form.bits // 8}").astype(np.float32)
    if form.bits == 8:
        return (data.astype(np.float32) - 128) / 128
    if form.bits == 24:  # three bytes become the upper ones of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = data.reshape(-1, 3)
        return wide.reshape(-1).view("<i4").astype(np.float32) / 2**31
    return data.view(f"<i{form.bits // 8}").astype(np.float32) / 2 ** (form.bits - 1)


def _other_header(file: Path, start: bytes) -> Header:
    with _soundfile(start).SoundFile(file) as opened:
        return _checked(opened)


def _other_samples(file: Path, start: bytes) -> Sound:
    with _soundfile(start).SoundFile(file) as opened:
        header = _checked(opened)
        samples = opened.read(dtype="float32", always_2d=True)
    if len(samples) != header.length:
        raise ValueError(f"cut off: {len(samples)} samples of {header.length}")
    return Sound(samples, header.rate)


def _checked(opened: Any) -> Header:
    header = Header(opened.samplerate, opened.channels, opened.frames)
    if header.rate not in _RATES or not 1 <= header.channels <= _MAX_CHANNELS:
        raise ValueError(f"{header.channels} channels at {header.rate} Hz")
    return header


class _NoDecoderError(ImportError):
    pass


def _soundfile(start: bytes) -> Any:
    """The package that reads a file that begins so; without it, is the file at fault, or its absence?"""
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError):  # the package, or the library that it needs
        if not start.startswith(_OTHERS) and bytes(map(int.__and__, start, _MPEG)) != _MPEG:
            raise ValueError("no kind of sound that is known") from None
        raise _NoDecoderError("only WAV is read without soundfile: pip install 'vl_jax[audio]'") from None
