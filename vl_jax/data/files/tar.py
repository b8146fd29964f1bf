"""Members of an uncompressed tar file, found by its headers alone: ustar, GNU and PAX.

    header | data, up to a multiple of 512 bytes | header | data | ... | zeros

    header      name 100 | ... | size 12 | ... | checksum 8 | type 1 | ... | magic 6 | ... | prefix 155 | ...
    before it   type L: the name of the next member      type x: fields of the next member, such as its size

A header is only read, and what it says of the file checked; nothing is unpacked, and no link is followed.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 512
_HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
_AT_ONCE = 4096  # bytes read for a header: of small members several are there
_END = bytes(BLOCK)
_REGULAR, _LINKS = b"0\x007", b"123456"  # types; of links, devices and folders there are no data
_MOST_EXTENDED = 1 << 20  # bytes of a long name, or of fields


def walk(file: Path) -> Iterator[tuple[bytes, int, int]]:
    """The name of every regular member, where in the file its data begin, and their size in bytes.

    Raises:
      ValueError: it is no sound tar file, or has members that are not stored as they are; one line that names
        the file and the position.
    """
    position = 0
    try:
        with file.open("rb", buffering=0) as opened:
            descriptor, length = opened.fileno(), os.fstat(opened.fileno()).st_size
            if not length:
                raise ValueError("an empty file")
            read, read_at = b"", 0
            longer: dict[bytes, bytes] = {}  # what extended headers say of the next member
            while position < length:
                start = position - read_at
                if start > len(read) - BLOCK:
                    read, read_at, start = os.pread(descriptor, _AT_ONCE, position), position, 0
                header = read[start : start + BLOCK]
                if header == _END:
                    break
                name, size, kind = _parse(header)
                size, data = int(longer[b"size"]) if b"size" in longer else size, position + BLOCK
                if kind in _LINKS:
                    position, longer = data, {}
                    continue
                if data + size > length:
                    raise ValueError(f"a member of {size} bytes is cut off")
                following = data + -(-size // BLOCK) * BLOCK
                if kind in _REGULAR:
                    name = longer.get(b"path", name)
                    if kind != b"\0" or not name.endswith(b"/"):  # which in the oldest files is a folder
                        yield name, data, size
                    longer = {}
                else:
                    longer |= _extended(kind, size, descriptor, data)
                position = following
            if longer:
                raise ValueError("an extended header without its member")
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: no sound uncompressed tar file at byte {position}: {error}") from None


def _parse(header: bytes) -> tuple[bytes, int, bytes]:
    """Name, size and type; the checksum is right."""
    if len(header) < BLOCK:
        raise ValueError("a header is cut off")
    name, size, checksum, kind, magic, prefix = _HEADER.unpack(header)
    # Adler-32 has one more than the sum of all bytes in its lower half, modulo 65521, and is quick.
    if zlib.adler32(header) & 0xFFFF != (_sum(checksum) + 1) % 65521 and not _is_signed(header, checksum):
        raise ValueError("the checksum of a header is wrong")
    name = name.partition(b"\0")[0]
    if magic == b"ustar\0" and prefix[0]:
        name = prefix.partition(b"\0")[0] + b"/" + name
    return name, _number(size), kind


@functools.lru_cache(1 << 12)
def _sum(checksum: bytes) -> int:
    """The sum of all bytes of a header with that checksum: the sum it tells has blanks in its own place."""
    return _number(checksum) + sum(checksum) - len(checksum) * ord(" ")


def _is_signed(header: bytes, checksum: bytes) -> bool:
    """Whether the checksum is one of bytes with a sign, as some old programs make it."""
    return sum(header) - 256 * sum(byte > 127 for byte in header) == _sum(checksum)


def _number(field: bytes) -> int:
    """Octal digits, or a binary number behind a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits and not digits.isdigit():
        raise ValueError(f"{field!r} is no number")
    return int(digits or b"0", 8)


def _extended(kind: bytes, size: int, descriptor: int, data: int) -> dict[bytes, bytes]:
    """What a member that is no file says of the next one.

    Raises:
      ValueError: it is of a type that cannot be read, such as a file with holes, or not what it should be.
    """
    if kind not in b"LKxg":
        raise ValueError(f"a member of type {kind.decode('latin-1')!r}, such as a file with holes")
    if size > _MOST_EXTENDED:
        raise ValueError(f"an extended header of {size} bytes, limit {_MOST_EXTENDED}")
    content = os.pread(descriptor, size, data)
    if len(content) < size:
        raise ValueError("an extended header is cut off")
    if kind in b"LK":
        return {b"path": content.partition(b"\0")[0]} if kind == b"L" else {}
    fields = _fields(content)
    if any(key.startswith(b"GNU.sparse") for key in fields):
        raise ValueError("a file with holes")
    told = {key: value for key, value in fields.items() if key in (b"path", b"size")}
    if told and kind == b"g":
        raise ValueError("a path or size for all members")
    if not told.get(b"size", b"0").isdigit():
        raise ValueError(f"a size of {told[b'size'][:20]!r}")
    return told


def _fields(content: bytes) -> dict[bytes, bytes]:
    """The fields of a PAX header: lines of ``LENGTH KEY=VALUE``, which has the whole line's bytes."""
    fields, place = {}, 0
    while place < len(content) and content[place]:
        digits, _, _ = content[place : place + 20].partition(b" ")
        stop = place + int(digits) if digits.isdigit() else 0
        key, equals, value = content[place + len(digits) + 1 : stop - 1].partition(b"=")
        if not equals or stop > len(content) or content[stop - 1 : stop] != b"\n":
            raise ValueError("a PAX header that is none")
        fields[key], place = value.partition(b"\0")[0] if key == b"path" else value, stop
    return fields
