"""Clips cut from long recordings of frames, and whether something out of the ordinary is on them.

    {"01": {"frames": 180, "abnormal_intervals_1based": [[61, 180]]}, ...}   and  frames/01/001.jpg, ...

So are the test clips of UCSD Ped2 (Mahadevan et al. 2010) laid out in the shared data. A clip ends at the
frame that it is judged by, so that frames can be scored one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.files.shards import Places, check_fields, file_and_folder
from vl_jax.data.images.clips import frames_in
from vl_jax.data.media.clip import ClipConfig, ClipFile
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, BadSample, FileImage, Sample, Turn, image_in
from vl_jax.data.sources.llava import read_json

NORMAL, ABNORMAL = "normal", "abnormal"


@dataclass(frozen=True)
class RecordedWalksConfig:
    """Clips of recordings with intervals that are abnormal."""

    name: str
    file: str = "labels.json"  # relative to the data root
    folder: str = "frames"  # with a folder of frames for each recording, relative to that of ``file``
    medium: str = "clip"  # name in ``Sample.media``
    recordings: tuple[str, ...] = ()  # those that are read; empty: all
    frames: int = 8  # of a clip
    step: int = 1  # from one frame of a clip to the next
    hop: int = 1  # from one clip to the next
    size: tuple[int, int] = (128, 192)  # height and width of frames
    grey: bool = True
    rate: float = 10.0  # frames a second
    normal_only: bool = False  # clips are left out that are judged abnormal
    picture: bool = False  # the last frame is a picture as well

    def __post_init__(self):
        check_fields(self.name, self.file, (".json",))
        if min(self.frames, self.step, self.hop, *self.size) < 1 or not self.rate > 0:
            raise ValueError(
                f"frames={self.frames}, step={self.step}, hop={self.hop}, size={self.size}, "
                f"rate={self.rate} of source {self.name!r}: must be above 0"
            )

    def open(self, root: str, *, orientation: Orientation = "shown") -> RecordedWalks:
        """The source; files are relative to ``root``."""
        return RecordedWalks(self, root, orientation)


class RecordedWalks:
    """Random access to clips. Labels are ``event`` (normal, abnormal), ``recording`` and ``frame``, from 1.

    Raises (on opening):
      ValueError: the file is unusable, a recording is not there, or no clip is left; one line.
    """

    def __init__(self, config: RecordedWalksConfig, root: str, orientation: Orientation):
        self._config = config
        self._file, place = file_and_folder(root, config.file, "", config.name)
        self.files = [self._file]
        known = read_json(self._file)
        if not isinstance(known, dict) or not known:
            raise ValueError(f"{self._file}: expected an object with an entry for each recording")
        names = config.recordings or tuple(sorted(known))
        lost = [name for name in names if name not in known]
        if lost:
            raise ValueError(f"source {config.name!r}: no recording {lost[0]!r}; known: {', '.join(known)}")
        try:
            self._recordings = [self._read(name, known[name], place, orientation) for name in names]
        except (BadSample, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"source {config.name!r}: {self._file}: {error}") from None
        self._places = Places([len(recording.ends) for recording in self._recordings])
        if not len(self):
            raise ValueError(f"source {config.name!r}: no clip of {config.frames} frames is left")

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"RecordedWalks({str(self._file)!r}, {len(self._recordings)} recordings, {len(self)} clips)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of one clip; its frames are read when it is asked for."""
        number, place = self._places[index]
        recording, config = self._recordings[number], self._config
        end = recording.ends[place]
        first = end - (config.frames - 1) * config.step
        frames = recording.images[first : end + 1 : config.step]
        reader = ClipConfig(
            config.medium,
            size=config.size,
            grey=config.grey,
            most=config.frames,
            file_rate=config.rate / config.step,
        )
        clip = ClipFile(frames, f"{recording.name}/{end + 1} ({self._file})", reader, None)
        shown = (frames[-1],) if config.picture else ()
        return Sample(
            f"{recording.name}/{end + 1:03d}",
            (Turn(f"{IMAGE_PLACEHOLDER}\n" * len(shown), "", kind=TEXT),),
            shown,
            labels={
                "event": ABNORMAL if recording.is_abnormal(end) else NORMAL,
                "recording": recording.name,
                "frame": end + 1,
            },
            media={config.medium: clip, f"{config.medium}_times": clip.seconds},
        )

    def _read(self, name: str, entry: Any, place: Path, orientation: Orientation) -> _Recording:
        config, where = self._config, f"recording {name!r}"
        names = frames_in(f"{config.folder}/{name}", place, where)
        if len(names) != entry["frames"]:
            raise ValueError(f"{where}: {len(names)} frames in its folder, {entry['frames']} in the file")
        images = tuple(image_in(place, n, where, FileImage.max_pixels, orientation) for n in names)
        intervals = tuple((int(a) - 1, int(b) - 1) for a, b in entry["abnormal_intervals_1based"])
        first = (config.frames - 1) * config.step
        found = _Recording(name, images, intervals, tuple(range(first, len(images), config.hop)))
        if config.normal_only:
            kept = tuple(end for end in found.ends if not found.is_abnormal(end))
            found = _Recording(name, images, intervals, kept)
        return found


@dataclass(frozen=True)
class _Recording:
    name: str
    images: tuple[FileImage, ...]
    intervals: tuple[tuple[int, int], ...]  # first and last abnormal frame, from 0
    ends: tuple[int, ...]  # last frames of its clips, from 0

    def is_abnormal(self, frame: int) -> bool:
        return any(first <= frame <= last for first, last in self.intervals)
