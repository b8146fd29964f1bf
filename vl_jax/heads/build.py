"""Heads by config. A head file holds the config, the module, how labels are read, the loss and the answer."""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

import flax.linen as nn
import numpy as np

from vl_jax.data.sample import Sample
from vl_jax.heads.classification import Classification
from vl_jax.heads.depth import Depth
from vl_jax.heads.detection import Detection
from vl_jax.heads.image.picture_flow import PictureFlow
from vl_jax.heads.instances import InstanceMasks
from vl_jax.heads.levels.regions import PhraseRegions
from vl_jax.heads.levels.tokens import TokenPairs
from vl_jax.heads.pairs import Pairs
from vl_jax.heads.segmentation import Segmentation
from vl_jax.heads.speech.speaking import Speaking
from vl_jax.heads.text.writing import Writing
from vl_jax.heads.transcript import Transcript
from vl_jax.schema import Open


@runtime_checkable
class HeadConfig(Protocol):
    """What the config of a head has to have. It is the ``RowField`` of its labels too.

    Its module maps ``Streams`` to a prediction: a pytree of arrays, one row for each of the batch (but for
    scalars that all rows share).

    A head whose rows do not act on one another may have a loss of its own, which ``Heads`` trains:
    ``sums(prediction, label) -> (loss, metrics)``, each summed over the rows that have a label. One whose
    prediction can be said has ``decode(prediction of a row) -> JSON value``, and one of classes
    ``probabilities(prediction of a row) -> {class: share}`` too. One whose streams have to fit
    one another has ``check_widths(widths of the pooled vectors by stream)``, which raises ``ValueError``. One
    whose labels are of the size of the tiles has ``check_tile(pixels on the side of a tile)``, which does the
    same. One that can show what it says has ``draw(picture of the tile, what decode gave) -> picture``. One
    that can do with streams without tokens has ``reads_empty = True``: then a batch in which no row has what
    a tower reads is computed without the tower. One that makes a file has ``made(what decode gave) ->
    content``, and ``shown(prediction of a row) -> picture`` if a tower can see it (see ``Creations``).

    One that makes what it says out of noise names its random stream as ``rng`` and has
    ``noised(label, key) -> hint``. ``Denoising`` puts the hint into the batch (see ``batch.hint_of``), and
    the module is called with it as a second argument; what it returns then goes to ``sums``. One that says
    its label piece by piece, each behind the true ones, has ``led(label) -> hint``: ``Heads`` does the same.
    """

    @property
    def name(self) -> str:
        """Of the head, of its labels in ``Batch.labels``, and before what it logs."""
        ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the streams it reads."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the label of one row."""
        ...

    @property
    def dtype(self) -> str:
        """Of labels, as numpy names it."""
        ...

    def read(self, sample: Sample) -> np.ndarray | None:
        """The label of a sample; see ``RowField``."""
        ...

    def build(self) -> nn.Module:
        """The module."""
        ...


HEAD_NEEDS = ("name", "inputs", "shape", "dtype", "read", "build")
AnyHead = Annotated[
    Classification
    | Pairs
    | TokenPairs
    | PhraseRegions
    | Detection
    | InstanceMasks
    | Segmentation
    | Depth
    | Transcript
    | Writing
    | PictureFlow
    | Speaking
    | HeadConfig,
    Open("head", HEAD_NEEDS),
]
