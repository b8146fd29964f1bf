"""How much room an exchange of tokens keeps on every device, planned before anything is traced.

    (T, K, E, N, factor) --plan--> Rooms of every hop, outermost first

At even load a device sends and receives T * (mean number of a token's destinations) rows, and its experts
multiply T * K. Rooms are that much times a factor, for a part of the tokens at a time; what finds no room
follows in another round (``ragged``, ``windows``). So the sizes here decide memory and speed, never a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from contextvars import ContextVar
from fractions import Fraction

from vl_jax.moe.slots import as_fraction, ceil_times

# Without a number given, tokens are cut into as many chunks as leave an expert so many rows ...
CHUNK_ROWS = 1024
MOST_CHUNKS = 8  # ... but into no more than this


@dataclasses.dataclass(frozen=True)
class Rooms:
    """The sizes of the arrays of one hop on one device, for one round."""

    shards: int  # that a token may go to
    experts: int  # behind each of them
    tokens: int  # of a chunk, at most
    sent: int  # rows that leave: a token's vector, once for every shard it goes to
    received: int  # rows that arrive
    pairs: int  # rows that the experts multiply: a token's vector, once for every expert it has here


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What is planned for: the layer, and how its experts are spread."""

    tokens: int  # T of one device
    top_k: int  # experts of a token, in the mean
    num_experts: int
    shards: int  # N devices, among which the experts are cut up
    factor: float = 1.25  # room over what comes at even load
    chunks: int | None = None  # parts that tokens are cut into; None: see ``CHUNK_ROWS``
    slices: int = 1  # a token goes once to each of so many groups of devices, and on from there
    most_choices: int | None = None  # the most experts of a token; None: ``top_k``
    most_slices: int | None = None  # the most slices of a token, where the scheme limits them
    slots: int | None = None  # the most choices that an expert takes from all devices

    def __post_init__(self):
        if self.num_experts % self.shards or self.shards % self.slices:
            raise ValueError(
                f"num_experts={self.num_experts} must divide by the {self.shards} devices of the exchange, "
                f"and these by slices={self.slices}"
            )

    @property
    def widest(self) -> int:
        """The most experts of a token."""
        return max(self.most_choices or self.top_k, self.top_k)

    @property
    def num_chunks(self) -> int:
        """Parts that the tokens of a device are cut into."""
        if self.chunks is not None:
            return min(self.chunks, self.tokens)
        rows = self.tokens * self.top_k * self.shards // self.num_experts
        return min(max(rows // CHUNK_ROWS, 1), MOST_CHUNKS, self.tokens)


def destinations(shards: int, num_experts: int, top_k: int) -> Fraction:
    """On how many of the shards the experts of a token are in the mean, if all choices are as likely."""
    each = num_experts // shards
    missed = Fraction(math.comb(num_experts - each, top_k), math.comb(num_experts, top_k))
    return shards * (1 - missed)


def pairs_room(tokens: int, top_k: int, share: Fraction, *, factor: float, most: int) -> int:
    """Room for the rows of a device's experts.

    Args:
      tokens: that it sees, whether they choose its experts or not.
      share: of all experts, those of this device.
      most: the most that any choice could ask for.
    """
    return _room(tokens, as_fraction(factor) * top_k * share, least=1, most=most)


_noted: ContextVar[list[Traffic] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted() -> Iterator[list[Traffic]]:
    """Gives a list, in which everything is noted that is planned for meanwhile, each once."""
    plans: list[Traffic] = []
    token = _noted.set(plans)
    try:
        yield plans
    finally:
        _noted.reset(token)


def plan(traffic: Traffic) -> tuple[Rooms, ...]:
    """The rooms of the only hop; or of the one between slices, and the one between the devices of a slice."""
    plans = _noted.get()
    if plans is not None and traffic not in plans:
        plans.append(traffic)
    t, factor = traffic, as_fraction(traffic.factor)
    tokens = -(-t.tokens // t.num_chunks)
    pairs_wanted = factor * t.top_k
    counts = [t.slices, t.shards // t.slices] if t.slices > 1 else [t.shards]
    rooms, incoming, reached, experts, widest = [], tokens, 1, t.num_experts, t.widest
    for level, shards in enumerate(counts):
        reached *= shards
        experts //= shards
        mean = destinations(reached, t.num_experts, t.top_k)
        most = min(widest, shards)
        if t.most_slices is not None and t.slices > 1 and level == 0:
            most = min(most, t.most_slices)
            mean = min(mean, Fraction(most))
        sent = _room(tokens, factor * mean, least=widest, most=incoming * most)
        everything = incoming * shards * most
        if t.slots is not None:
            everything = min(everything, max(experts * t.slots, 1))
        received = _room(tokens, factor * mean, least=1, most=everything)
        widest = min(widest, experts)
        pairs = _room(tokens, pairs_wanted, least=widest, most=received * widest)
        rooms.append(Rooms(shards, experts, incoming, sent, received, pairs))
        incoming = received
    return tuple(rooms)


def _room(count: int, ratio: Fraction, *, least: int, most: int) -> int:
    """``ceil(count * ratio)`` within bounds."""
    ratio = ratio.limit_denominator(2**20)
    return max(min(ceil_times(count, ratio, most=max(count, 1)), most), least)


@dataclasses.dataclass(frozen=True)
class RoomBytes:
    """Bytes of one device, for one layer forward and backward."""

    balanced: int  # of the rows that arrive at even load, all at once
    travelling: int  # rows that are sent and received, both ways, and their gradients
    products: int  # what the experts work on
    gradients: int  # sums of the gradients of this device's experts
    tokens: int  # sums of results and of gradients of the tokens

    @property
    def total(self) -> int:
        return self.travelling + self.products + self.gradients + self.tokens


def memory(traffic: Traffic, *, width: int, hidden: int, inputs: int = 2, itemsize: int = 2) -> RoomBytes:
    """What the arrays of a layer need at the same time, were nothing fused and nothing reused.

    Args:
      width: of a token.
      hidden: width of an expert.
      inputs: projections of an expert's input, two if it is gated.
    """
    hops = plan(traffic)
    last, overlapped = hops[-1], traffic.num_chunks > 1
    # Forward and backward, a row and its gradient: what is sent, what arrives, and what comes back.
    rows = sum(3 * hop.sent + (4 if overlapped else 2) * hop.received for hop in hops)
    sorted_rows = 3 * last.pairs if last.experts > 1 else last.pairs
    kept = traffic.num_experts // traffic.shards * (inputs + 1) * width * hidden
    return RoomBytes(
        balanced=traffic.tokens * traffic.top_k * width * itemsize,
        travelling=rows * width * itemsize,
        products=(sorted_rows * width + last.pairs * 2 * (inputs + 1) * hidden) * itemsize,
        gradients=kept * (4 + itemsize),
        tokens=2 * traffic.tokens * width * itemsize,
    )


def describe(traffic: Traffic, **sizes: int) -> str:
    """The plan in words, a line for every hop, and the memory; arguments as for ``memory``."""
    t, names = traffic, ("slices", "devices") if traffic.slices > 1 else ("devices",)
    lines = [
        f"T={t.tokens} k={t.top_k} E={t.num_experts} over {t.shards} devices, in {t.num_chunks} chunk(s), "
        f"factor {t.factor:g}"
    ]
    for name, hop in zip(names, plan(t), strict=True):
        lines.append(
            f"  among {hop.shards} {name}: room for {hop.sent} rows out, {hop.received} in, "
            f"{hop.pairs} in the experts"
        )
    found = memory(t, **sizes)
    parts = ", ".join(
        f"{field.name} {getattr(found, field.name) / 2**20:,.0f}"
        for field in dataclasses.fields(found)
        if field.name != "balanced"
    )
    lines.append(
        f"  at most {found.total / 2**20:,.0f} MiB a device ({parts}); "
        f"{found.balanced / 2**20:,.0f} MiB of rows arrive at even load"
    )
    return "\n".join(lines)
