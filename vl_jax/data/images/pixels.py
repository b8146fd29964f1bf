"""Published image processors: a whole picture to the pixel arrays of its encoders, in Pillow and NumPy.

Each array is one *view* of the picture, made in a fixed order of optional steps::

    pad to a square -> resize -> pad to a square -> crop the centre -> rescale -> normalise
    (LLaVA)                      (DeepSeek-VL)      (LLaVA, CLIP)

A view may start from an earlier one: the hybrid DeepSeek-VL processor resizes the picture to the high
resolution, pads it, and makes the low resolution from that (so it is resized twice).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as PilImage

from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.picture import to_rgb
from vl_jax.runtime import json_text

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)

Colour = tuple[int, int, int]
Levels = tuple[float, float, float]


@dataclass(frozen=True)
class Resize:
    """The size to resize to; which fields are set says by which rule.

    ``height, width`` exactly that; ``shortest_edge`` the shorter side becomes that, and with
    ``longest_edge`` the longer one at most that; ``longest_edge`` alone: the longer side becomes that, and
    no side less than ``min_size``; ``max_height, max_width``: the largest that fits into both.
    """

    height: int = 0
    width: int = 0
    shortest_edge: int = 0
    longest_edge: int = 0
    max_height: int = 0
    max_width: int = 0
    min_size: int = 1
    resample: int = PilImage.Resampling.BICUBIC

    def __post_init__(self):
        names = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
        given = tuple(name for name in names if getattr(self, name))
        rules = (names[:2], names[2:3], names[2:4], names[3:4], names[4:])
        if given not in rules or any(getattr(self, name) < 0 for name in given):
            allowed = "; ".join(" and ".join(rule) for rule in rules)
            raise ValueError(f"size { ({n: getattr(self, n) for n in given}) }: must be positive {allowed}")
        if self.min_size < 1:
            raise ValueError(f"min_size={self.min_size}: must be at least 1")
        if self.resample not in tuple(PilImage.Resampling):
            raise ValueError(f"resample={self.resample}: must be one of 0..5, as in Pillow")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The new (height, width) of a picture."""
        if self.height:
            return self.height, self.width
        if self.max_height:
            scale = min(self.max_height / height, self.max_width / width)
            return int(height * scale), int(width * scale)
        if self.shortest_edge:
            return self._by_shortest(height, width)
        scale = self.longest_edge / max(height, width)
        # Python rounds halves to even, and so do the published models.
        return max(round(height * scale), self.min_size), max(round(width * scale), self.min_size)

    def _by_shortest(self, height: int, width: int) -> tuple[int, int]:
        shorter, longer = min(height, width), max(height, width)
        edge, exact = self.shortest_edge, float(self.shortest_edge)
        if self.longest_edge and longer / shorter * edge > self.longest_edge:
            exact = self.longest_edge * shorter / longer
            edge = round(exact)
        if self.longest_edge and shorter == edge:
            return height, width
        other = int(exact * longer / shorter)
        return (other, edge) if width < height else (edge, other)


@dataclass(frozen=True)
class ViewConfig:
    """How one array is made; a step whose field is None or "none" is left out."""

    name: str = "pixel_values"
    made_from: str = ""  # the name of an earlier view; empty means the picture
    pad: Literal["none", "before", "after"] = "none"  # to a centred square, before or after resizing
    padding_colour: Colour = (0, 0, 0)
    resize: Resize | None = None
    crop: tuple[int, int] | None = None  # height, width, around the centre; black where the picture ends
    rescale: float | None = 1 / 255
    mean: Levels | None = None
    std: Levels | None = None

    def __post_init__(self):
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"crop={self.crop} of view {self.name!r}: must be at least 1 by 1")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean={self.mean}, std={self.std} of view {self.name!r}: give both or neither")


@dataclass(frozen=True)
class ImageProcessor:
    """All arrays that a published processor makes of one picture."""

    views: tuple[ViewConfig, ...]
    convert_rgb: bool = True  # False refuses pictures that are not RGB

    def __post_init__(self):
        names = [""]
        for view in self.views:
            if view.made_from not in names or view.name in names:
                raise ValueError(
                    f"view {view.name!r} from {view.made_from!r}: needs a new name, made earlier"
                )
            names.append(view.name)

    def __call__(self, picture: PilImage.Image | np.ndarray) -> dict[str, np.ndarray]:
        """The views by name, each [h w 3] in float32 (u8 where nothing rescales or normalises).

        Args:
          picture: a Pillow picture, or grey levels u8[h w 3].

        Raises:
          ValueError: the picture is not RGB and must not be converted.
        """
        if isinstance(picture, np.ndarray):
            picture = PilImage.fromarray(picture)
        if picture.mode != "RGB" and not self.convert_rgb:
            raise ValueError(f"picture of mode {picture.mode!r}: must be RGB, or set do_convert_rgb")
        made = {"": np.asarray(to_rgb(picture))}
        for view in self.views:
            made[view.name] = shape_view(made[view.made_from], view)
        return {view.name: scale_view(made[view.name], view) for view in self.views}


def shape_view(levels: np.ndarray, config: ViewConfig) -> np.ndarray:
    """Pads, resizes and crops grey levels u8[h w 3]; the result still holds grey levels."""
    if config.pad == "before":
        levels = _pad_to_square(levels, config.padding_colour)
    if config.resize is not None:
        height, width = config.resize.size(*levels.shape[:2])
        picture = PilImage.fromarray(levels).resize((width, height), resample=config.resize.resample)
        levels = np.asarray(picture)
    if config.pad == "after":
        levels = _pad_to_square(levels, config.padding_colour)
    return levels if config.crop is None else _crop_centre(levels, config.crop)


def scale_view(levels: np.ndarray, config: ViewConfig) -> np.ndarray:
    """Rescales and normalises: ``(levels * rescale - mean) / std``."""
    result = levels
    if config.rescale is not None:
        result = (levels.astype(np.float64) * config.rescale).astype(np.float32)
    if config.mean is not None and config.std is not None:
        mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
        result = (result.astype(np.float32) - mean) / std
    return result


def load_image_processor(folder: str | Path) -> ImageProcessor:
    """Reads the ``preprocessor_config.json`` of a published checkpoint.

    Raises:
      ValueError: the file is missing or malformed, or describes a processor that is not known here.
    """
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        raise ValueError(f"image processor {str(folder)!r}: no such file {file}")
    try:
        settings = json_text.read(file)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: must hold an object, not {type(settings).__name__}")
    return read_image_processor(settings)


def read_image_processor(settings: Mapping[str, Any]) -> ImageProcessor:
    """The processor that published settings describe; absent and null keys have the published defaults.

    Raises:
      ValueError: the type of processor is not known here, or a value is out of range.
    """
    said = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    kind = str(said).removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if kind not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise ValueError(f"image_processor_type={said!r}: known are {known}")
    read, defaults = _READERS[kind]
    given = {key: value for key, value in settings.items() if value is not None}
    merged = {**_COMMON, **defaults, **given}
    try:
        return ImageProcessor(read(merged), convert_rgb=merged["do_convert_rgb"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{kind}: settings cannot be read: {error}") from None


def as_tiling(view: ViewConfig) -> TilingConfig:
    """Pictures of one tile, with the grey levels of a view; rescaling and normalisation are not part of it.

    Raises:
      ValueError: tiles are made in no such way.
    """
    resize, crop = view.resize, view.crop
    if view.pad == "none" and resize is not None and (side := resize.shortest_edge or resize.height):
        if (resize, crop) == (Resize(shortest_edge=side), (side, side)):
            return TilingConfig(tile_size=side, views="global", fit="crop")
        if resize == Resize(height=side, width=side) and crop in (None, (side, side)):
            return TilingConfig(tile_size=side, views="global", fit="stretch")
    raise ValueError(f"pad={view.pad!r}, resize={resize}, crop={crop}: no tiles are made so, set data.tiling")


def _read_deepseek_vl(settings: Mapping[str, Any]) -> tuple[ViewConfig, ...]:
    return (_read_padded(settings, name="pixel_values", pads=settings["do_pad"]),)


def _read_deepseek_vl_hybrid(settings: Mapping[str, Any]) -> tuple[ViewConfig, ...]:
    prefix = "high_res_"
    high = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    # The filter "nearest" (0) of the high resolution is taken for "not set" by the published code.
    high["resample"] = high["resample"] or settings["resample"]
    high = {**{k: v for k, v in settings.items() if k != "background_color"}, **high}
    pads = settings["do_pad"] and settings["do_resize"]
    return (
        _read_padded(high, name="high_res_pixel_values", pads=pads),
        _read_padded(settings, name="pixel_values", pads=pads, made_from="high_res_pixel_values"),
    )


def _read_padded(settings: Mapping[str, Any], *, name: str, pads: bool, made_from: str = "") -> ViewConfig:
    """A view of the DeepSeek-VL kind: the longer side to ``size``, then padded to a square."""
    height, width = _height_width(settings["size"])
    if height != width:
        raise ValueError(f"size={settings['size']}: height and width must be the same")
    resize = Resize(longest_edge=height, min_size=settings["min_size"], resample=settings["resample"])
    colour = settings.get("background_color", _colour(settings["image_mean"]))
    return ViewConfig(
        name=name,
        made_from=made_from,
        pad="after" if pads else "none",
        padding_colour=_three(colour),
        resize=resize if settings["do_resize"] else None,
        **_read_levels(settings),
    )


def _read_cropped(settings: Mapping[str, Any]) -> tuple[ViewConfig, ...]:
    """A view of the CLIP kind: resized, then cropped; LLaVA may pad to a square before."""
    if settings["do_pad"] and not settings["pads_to_square"]:
        raise ValueError("do_pad=True: known for LLaVA and DeepSeek-VL processors only")
    size = settings["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if not settings["default_to_square"] else [size, size]
    if not isinstance(size, Mapping):
        size = dict(zip(("height", "width"), size, strict=True))
    if set(size) == {"longest_edge"}:
        raise ValueError(f"size={size}: the longest edge alone gives no size")
    return (
        ViewConfig(
            pad="before" if settings["do_pad"] else "none",
            padding_colour=_colour(settings["image_mean"]),
            resize=Resize(**size, resample=settings["resample"]) if settings["do_resize"] else None,
            crop=_height_width(settings["crop_size"]) if settings["do_center_crop"] else None,
            **_read_levels(settings),
        ),
    )


def _read_levels(settings: Mapping[str, Any]) -> dict[str, Any]:
    normalise = settings["do_normalize"]
    return {
        "rescale": settings["rescale_factor"] if settings["do_rescale"] else None,
        "mean": _three(settings["image_mean"]) if normalise else None,
        "std": _three(settings["image_std"]) if normalise else None,
    }


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            raise ValueError(f"size={dict(size)}: must have height and width")
        return size["height"], size["width"]
    height, width = size
    return height, width


def _three(values: Any) -> tuple[Any, Any, Any]:
    if isinstance(values, int | float):
        return values, values, values
    red, green, blue = values
    return red, green, blue


def _colour(mean: Any) -> Colour:
    red, green, blue = _three(mean)
    return int(red * 255), int(green * 255), int(blue * 255)


def _pad_to_square(levels: np.ndarray, colour: Colour) -> np.ndarray:
    height, width = levels.shape[:2]
    side = max(height, width)
    if height == width:
        return levels
    result = np.full((side, side, 3), colour, levels.dtype)
    top, left = (side - height) // 2, (side - width) // 2
    result[top : top + height, left : left + width] = levels
    return result


def _crop_centre(levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    result = np.zeros((*size, 3), levels.dtype)
    source, target = [], []
    for have, want in zip(levels.shape[:2], size, strict=True):
        # Floor division: an odd pixel is cut off at the end, and added at the beginning.
        start, count = (have - want) // 2, min(have, want)
        source.append(slice(max(start, 0), max(start, 0) + count))
        target.append(slice(max(-start, 0), max(-start, 0) + count))
    result[tuple(target)] = levels[tuple(source)]
    return result


_COMMON = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_pad": False,
    "do_center_crop": False,
    "crop_size": None,
    "pads_to_square": False,
    "default_to_square": False,
    "rescale_factor": 1 / 255,
    "resample": PilImage.Resampling.BICUBIC,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_CLIP = {"size": {"shortest_edge": 224}, "crop_size": [224, 224], "do_center_crop": True}
_SQUARE = {"size": [224, 224], "image_mean": _HALF, "image_std": _HALF}
_DEEPSEEK_VL = {"do_pad": True, "size": 384, "min_size": 14}
_HIGH_RES = {
    "high_res_size": 1024,
    "high_res_resample": PilImage.Resampling.BICUBIC,
    "high_res_image_mean": _CLIP_MEAN,
    "high_res_image_std": _CLIP_STD,
}
_Reader = Callable[[Mapping[str, Any]], tuple[ViewConfig, ...]]
# A published type of processor: how its settings are read, and those of its defaults that are its own.
_READERS: dict[str, tuple[_Reader, dict[str, Any]]] = {
    "DeepseekVLImageProcessor": (_read_deepseek_vl, _DEEPSEEK_VL),
    "DeepseekVLHybridImageProcessor": (_read_deepseek_vl_hybrid, {**_DEEPSEEK_VL, **_HIGH_RES}),
    "LlavaImageProcessor": (_read_cropped, {**_CLIP, "pads_to_square": True}),
    "CLIPImageProcessor": (_read_cropped, _CLIP),
    "SiglipImageProcessor": (_read_cropped, _SQUARE),
    "ViTImageProcessor": (
        _read_cropped,
        {**_SQUARE, "resample": PilImage.Resampling.BILINEAR, "default_to_square": True},
    ),
}
