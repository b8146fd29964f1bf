"""Questions and answers about a scene, in English and Chinese, each with exactly one right answer.

An object is named only by something no other object of the scene has. Answers are balanced, so that the
question alone says little: see ``make_turns``.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vl_jax.data.sample import Box, Turn

Kind = Literal["colour", "shape", "count", "position", "relation", "word", "caption", "said"]
KINDS: tuple[Kind, ...] = ("colour", "shape", "count", "position", "relation", "word")
Language = Literal["en", "zh"]


@dataclass(frozen=True)
class SceneObject:
    """One shape: lengths in pixels, angle in radians, cell as (column, row)."""

    colour: str
    shape: str
    cell: tuple[int, int]
    centre: tuple[float, float]
    radius: float
    angle: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """A pixel rectangle around the object."""
        (x, y), r = self.centre, self.radius
        return (x - r, y - r, x + r, y + r)


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn; an empty ``word`` means no word."""

    image_size: int
    background: tuple[int, ...]
    objects: tuple[SceneObject, ...]
    word: str
    word_script: str
    word_corners: tuple[float, float, float, float]
    grid: int = 3  # cells each way, 2 or 3

    def place(self, item: SceneObject) -> int:
        """The cell of an object as an index into the nine named places, corners first when there are four."""
        step = 2 // (self.grid - 1)
        return (item.cell[1] * 3 + item.cell[0]) * step


COLOUR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPE_NAMES = ("circle", "square", "triangle", "star", "cross", "diamond")
CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "black": "黑色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形",
    "star": "星形", "cross": "十字形", "diamond": "菱形",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
}  # fmt: skip
_COUNT_WEIGHTS = (1.0, 0.7, 3.0, 6.0, 9.0)  # how readily a count of 0, 1, 2, 3, 4 or more is asked for
PLACES: dict[Language, tuple[str, ...]] = {
    "en": (
        "top left",
        "top",
        "top right",
        "left",
        "centre",
        "right",
        "bottom left",
        "bottom",
        "bottom right",
    ),
    "zh": ("左上", "上方", "右上", "左侧", "中间", "右侧", "左下", "下方", "右下"),
}
_EN_PHRASES = (
    "at the top left", "at the top", "at the top right", "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip

TEMPLATES: dict[Kind, dict[Language, tuple[str, ...]]] = {
    "colour": {
        "en": ("what colour is the {0}?", "which colour does the {0} have?", "name the colour of the {0}."),
        "zh": ("{0}是什么颜色？", "{0}的颜色是什么？", "请说出{0}的颜色。"),
    },
    "shape": {
        "en": ("what shape is the {0} object?", "which shape is {0}?", "name the {0} shape."),
        "zh": ("{0}的物体是什么形状？", "哪种形状是{0}的？", "{0}物体的形状是什么？"),
    },
    "count": {
        "en": ("how many {0} are there?", "count the {0}.", "how many {0} do you see?"),
        "zh": ("图中有几个{0}？", "{0}有多少个？", "数一数{0}。"),
    },
    "position": {
        "en": ("where is the {0}?", "in which part of the picture is the {0}?", "locate the {0}."),
        "zh": ("{0}在哪里？", "{0}在图中的什么位置？", "找出{0}的位置。"),
    },
    "relation": {
        "en": ("where is the {0} relative to the {1}?", "the {0} is on which side of the {1}?"),
        "zh": ("{0}在{1}的哪个方向？", "{0}相对于{1}在哪边？"),
    },
    "word": {
        "en": ("what is written?", "which word do you see?", "read the text."),
        "zh": ("图中写了什么？", "图里的字是什么？", "读出文字。"),
    },
    "caption": {
        "en": ("describe the picture.", "what is in the picture?"),
        "zh": ("描述这张图。", "图中有什么？"),
    },
    "said": {
        "en": ("think of a {0} {1}. what colour is it?", "my {1} is {0}. what colour is my {1}?"),
        "zh": ("想象一个{0}的{1}。它是什么颜色？", "我的{1}是{0}的。我的{1}是什么颜色？"),
    },
}


def make_turns(
    scene: Scene, *, kinds: Sequence[Kind], languages: Sequence[Language], rng: random.Random
) -> tuple[Turn, ...]:
    """Every applicable question of the wanted kinds, in random order, each in a random language.

    ``caption`` and ``said`` always apply; every other kind may not, so a scene without any question of the
    wanted kinds counts its objects instead.
    """
    makers = {
        "colour": _colour, "shape": _shape, "count": _count, "position": _position,
        "relation": _relation, "word": _word, "caption": _caption, "said": _said,
    }  # fmt: skip
    turns = [turn for kind in kinds for turn in makers[kind](scene, languages, rng)]
    if not turns:
        turns = _count(scene, languages, rng)
    rng.shuffle(turns)
    return tuple(_open_with_image(turns))


def _open_with_image(turns: list[Turn]) -> list[Turn]:
    first = turns[0]
    return [
        Turn(f"<image>\n{first.question}", first.answer, first.kind, first.language, first.boxes),
        *turns[1:],
    ]


def say(term: str, language: Language) -> str:
    """A colour, shape or direction word in a language."""
    return term if language == "en" else CHINESE[term]


def _describe(language: Language, *, colour: str = "", shape: str = "") -> str:
    words = [say(w, language) for w in (colour, shape) if w]
    return (" " if language == "en" else "").join(words)


def _turn(
    kind: Kind,
    language: Language,
    rng: random.Random,
    names: Sequence[str],
    answer: str,
    boxes: Sequence[Box],
) -> Turn:
    question = rng.choice(TEMPLATES[kind][language]).format(*names)
    return Turn(question, answer, kind, language, tuple(boxes))


def _box(item: SceneObject, language: Language) -> Box:
    return Box(_describe(language, colour=item.colour, shape=item.shape), item.corners)


def _named(scene: Scene) -> list[SceneObject]:
    """The objects whose colour and shape together fit no other one: those a question can point at."""
    looks = [(item.colour, item.shape) for item in scene.objects]
    return [item for item, look in zip(scene.objects, looks, strict=True) if looks.count(look) == 1]


def _colour(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    turns = []
    for item in scene.objects:
        if sum(o.shape == item.shape for o in scene.objects) == 1:
            language = rng.choice(languages)
            answer, boxes = say(item.colour, language), [_box(item, language)]
            turns.append(_turn("colour", language, rng, [say(item.shape, language)], answer, boxes))
    return turns


def _shape(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    turns = []
    for item in scene.objects:
        if sum(o.colour == item.colour for o in scene.objects) == 1:
            language = rng.choice(languages)
            answer, boxes = say(item.shape, language), [_box(item, language)]
            turns.append(_turn("shape", language, rng, [say(item.colour, language)], answer, boxes))
    return turns


def _count(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    """All objects, and those of one colour or one shape that has few or many here."""
    language = rng.choice(languages)
    noun = "objects" if language == "en" else "物体"
    boxes = [_box(o, language) for o in scene.objects]
    turns = [_turn("count", language, rng, [noun], str(len(scene.objects)), boxes)]
    options: dict[int, list[tuple[str, str]]] = {}
    for colour in COLOUR_NAMES:
        options.setdefault(sum(o.colour == colour for o in scene.objects), []).append((colour, ""))
    for shape in SHAPE_NAMES:
        options.setdefault(sum(o.shape == shape for o in scene.objects), []).append(("", shape))
    # Large counts are rare in scenes, so they are asked for more often when they are there.
    answers = sorted(options)
    number = rng.choices(answers, weights=[_COUNT_WEIGHTS[min(n, 4)] for n in answers])[0]
    colour, shape = rng.choice(options[number])
    language = rng.choice(languages)
    if language == "en":
        noun = f"{colour} objects" if colour else f"{shape}es" if shape == "cross" else f"{shape}s"
    else:
        noun = f"{say(colour, language)}物体" if colour else say(shape, language)
    boxes = [_box(o, language) for o in scene.objects if colour in ("", o.colour) and shape in ("", o.shape)]
    return [*turns, _turn("count", language, rng, [noun], str(number), boxes)]


def _position(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    turns = []
    for item in _named(scene):
        language = rng.choice(languages)
        answer, box = PLACES[language][scene.place(item)], _box(item, language)
        turns.append(_turn("position", language, rng, [box.label], answer, [box]))
    return turns


def _relation(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    """Up to two ordered pairs in the same row or column of cells: one of four directions."""
    named = _named(scene)
    pairs = [(a, b) for a in named for b in named if (a.cell[0] == b.cell[0]) != (a.cell[1] == b.cell[1])]
    turns = []
    for item, other in rng.sample(pairs, min(2, len(pairs))):
        language = rng.choice(languages)
        dx, dy = item.cell[0] - other.cell[0], item.cell[1] - other.cell[1]
        direction = ("left" if dx < 0 else "right") if dx else ("above" if dy < 0 else "below")
        boxes = [_box(item, language), _box(other, language)]
        nouns = [box.label for box in boxes]
        turns.append(_turn("relation", language, rng, nouns, say(direction, language), boxes))
    return turns


def _word(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    if not scene.word:
        return []
    box = Box(scene.word, scene.word_corners)
    return [_turn("word", rng.choice(languages), rng, [], scene.word, [box])]


def _said(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    """A question that says its answer itself, of what the picture need not hold: nothing to look at."""
    language = rng.choice(languages)
    colour, shape = rng.choice(COLOUR_NAMES[:4]), rng.choice(SHAPE_NAMES[:4])
    nouns = [say(colour, language), say(shape, language)]
    return [_turn("said", language, rng, nouns, say(colour, language), [])]


def _caption(scene: Scene, languages: Sequence[Language], rng: random.Random) -> list[Turn]:
    language = rng.choice(languages)
    boxes = [_box(o, language) for o in _in_reading_order(scene)]
    return [_turn("caption", language, rng, [], caption(scene, language), boxes)]


def _in_reading_order(scene: Scene) -> list[SceneObject]:
    return sorted(scene.objects, key=lambda o: (o.cell[1], o.cell[0]))


def caption(scene: Scene, language: Language) -> str:
    """One sentence that names everything in reading order."""
    parts = []
    for item in _in_reading_order(scene):
        index = scene.place(item)
        if language == "en":
            parts.append(f"{_a(item, language)} {_EN_PHRASES[index]}")
        else:
            parts.append(f"{PLACES[language][index]}有{_a(item, language)}")
    if scene.word:
        parts.append(f"the word {scene.word}" if language == "en" else f"写着{scene.word}")
    return (", " if language == "en" else "，").join(parts) + ("." if language == "en" else "。")


def _a(item: SceneObject, language: Language) -> str:
    name = _describe(language, colour=item.colour, shape=item.shape)
    if language == "zh":
        return f"一个{name}"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def relation_caption(scene: Scene, language: Language) -> str:
    """One sentence that says on which side of its second object the first one is.

    Sides are left and right where the columns differ, else above and below. The order of the objects says
    nothing of where they are, so every side is as frequent as its opposite.
    """
    item, other = scene.objects[:2]
    dx, dy = item.cell[0] - other.cell[0], item.cell[1] - other.cell[1]
    side = ("left" if dx < 0 else "right") if dx else ("above" if dy < 0 else "below")
    first, second = _a(item, language), _a(other, language)
    if language == "zh":
        return f"{first}在{second}的{say(side, language)}。"
    return f"{first} {side} {'of ' if dx else ''}{second}."


def phrases(
    scene: Scene, language: Language, text: str, *, in_order: bool
) -> list[tuple[str, tuple[int, int], tuple[float, float, float, float]]]:
    """The words of a sentence that name its objects: they, where they stand, and the object's rectangle.

    Args:
      in_order: the sentence names them in reading order, as ``caption`` does.
    """
    found, after = [], 0
    for item in _in_reading_order(scene) if in_order else scene.objects:
        words = _describe(language, colour=item.colour, shape=item.shape)
        start = text.index(words, after)
        after = start + len(words)
        found.append((words, (start, after), item.corners))
    return found


def exchanged(scene: Scene) -> list[Scene]:
    """Scenes in which two objects have exchanged colour, shape or place, and that look different from it."""
    found = []
    for i, j in itertools.combinations(range(len(scene.objects)), 2):
        one, other = scene.objects[i], scene.objects[j]
        if (one.colour, one.shape) == (other.colour, other.shape):
            continue
        fields = [(name,) for name in ("colour", "shape") if getattr(one, name) != getattr(other, name)]
        for names in (*fields, ("cell", "centre", "radius", "angle")):
            objects = list(scene.objects)
            objects[i] = dataclasses.replace(one, **{name: getattr(other, name) for name in names})
            objects[j] = dataclasses.replace(other, **{name: getattr(one, name) for name in names})
            found.append(dataclasses.replace(scene, objects=tuple(objects)))
    return found


_COUNT_WEIGHTS = (1.0, 0.7, 3.0, 6.0, 9.0)
