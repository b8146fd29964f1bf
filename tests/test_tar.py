"""The walk over tar files: the members that ``tarfile`` finds too, or a refusal with the position."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path

import pytest

from vl_jax.data.files.tar import walk

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
HUGE = 9 << 30  # bytes, more than eleven octal digits can say


def header(name: str, size: int | bytes = 0, kind: bytes = b"0") -> bytes:
    """A header in the GNU format, its size a number or as it is written, and its checksum right."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    return signed(block)


def signed(block: bytearray) -> bytes:
    """The header with its checksum made right."""
    block[148:156] = b" " * 8
    return bytes(block[:148] + b"%06o\0 " % sum(block) + block[156:])


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*fields: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with these fields, each shorter than 90 bytes."""
    content = b"".join(b"%d %s\n" % (len(field) + 4, field) for field in fields)
    return header("pax", len(content), kind) + padded(content)


def found(file: Path, data: bytes) -> list[tuple[bytes, int, int]]:
    file.write_bytes(data)
    return list(walk(file))


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_tarfile_finds(tmp_path, form):
    long = ["d/" * 60 + "a.jpg", "n" * 90 + ".json", "p" * 100 + "/" + "q" * 50 + ".txt"]
    longer = [] if form == tarfile.USTAR_FORMAT else ["猫/" * 80 + "é.png", "x" * 300 + ".b"]
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as out:
        for number, name in enumerate(["a.jpg", "./b.json", *long, *longer, "last.txt"]):
            member = tarfile.TarInfo(name)
            member.size = (0, 1, 511, 512, 513, 5000)[number % 6]
            out.addfile(member, io.BytesIO(b"x" * member.size))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo(f"no-file-{number}.txt")
                other.type, other.linkname = kind, "y" * 150 if form != tarfile.USTAR_FORMAT else "y"
                out.addfile(other)
    with tarfile.open(tmp_path / "s.tar") as archive:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in archive if m.isreg()]
    assert list(walk(tmp_path / "s.tar")) == expected and len(expected) == 6 + len(longer)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_may_have_more_than_eight_gibibytes(tmp_path, form):
    member = tarfile.TarInfo("a.jpg")
    member.size = HUGE
    file = tmp_path / "s.tar"
    start = member.tobuf(form)
    file.write_bytes(start)
    os.truncate(file, len(start) + HUGE)  # a hole on the disk
    with file.open("ab") as out:
        out.write(header("b.jpg"))
    assert list(walk(file)) == [(b"a.jpg", len(start), HUGE), (b"b.jpg", len(start) + HUGE + 512, 0)]


def test_fields_of_a_pax_header_are_of_the_next_member_only(tmp_path):
    data = pax(b"path=long/name.txt", b"size=3", b"comment=a=b\nc") + header("short", 0) + padded(b"abc")
    data += header("other.txt", 2) + padded(b"de")
    assert [(n, s) for n, _, s in found(tmp_path / "s.tar", data)] == [
        (b"long/name.txt", 3),
        (b"other.txt", 2),
    ]


def test_checksums_of_signed_bytes_are_right_too(tmp_path):
    block = bytearray(header("é.txt"))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(struct.unpack("512b", block))
    assert found(tmp_path / "s.tar", bytes(block)) == [("é.txt".encode(), 512, 0)]


def test_a_folder_of_the_oldest_format_is_no_file(tmp_path):
    assert found(tmp_path / "s.tar", header("d/", kind=b"\0") + header("d/a.txt", kind=b"\0")) == [
        (b"d/a.txt", 1024, 0)
    ]


GOOD = header("a.txt", 3) + padded(b"abc")


@pytest.mark.parametrize(
    ("data", "position", "rule"),
    [
        (b"", 0, "an empty file"),
        (GOOD[:514], 0, "a member of 3 bytes is cut off"),
        (GOOD + header("b", 600), 1024, "a member of 600 bytes is cut off"),
        (GOOD + GOOD[:100], 1024, "a header is cut off"),
        (GOOD + b"x" * 512, 1024, "is no number"),
        (GOOD + b"x" + GOOD[1:], 1024, "the checksum of a header is wrong"),
        (header("a", b"-0000000001\0"), 0, "is no number"),
        (header("a", b"0000000_001\0"), 0, "is no number"),
        (header("a", b"\xff" * 12), 0, "is no number"),
        (header("a", b"\x80" + b"\xff" * 11), 0, "is cut off"),
        (header("a", kind=b"S"), 0, "a member of type 'S'"),
        (header("a", kind=b"V"), 0, "a member of type 'V'"),
        (pax(b"GNU.sparse.major=1") + GOOD, 0, "a file with holes"),
        (pax(b"size=-1") + GOOD, 0, "a size of b'-1'"),
        (pax(b"path=x", kind=b"g") + GOOD, 0, "a path or size for all members"),
        (GOOD + pax(b"path=x"), 2048, "an extended header without its member"),
        (GOOD + pax(b"path=x") + bytes(1024), 2048, "an extended header without its member"),
        (header("p", 9, b"x") + padded(b"99 path=x"), 0, "a PAX header that is none"),
        (header("p", 9, b"x") + padded(b"0 path=x\n"), 0, "a PAX header that is none"),
        (header("p", 9, b"x") + padded(b"9 path-x\n"), 0, "a PAX header that is none"),
        (header("p", 2 << 20, b"L") + bytes(2 << 20) + GOOD, 0, "limit 1048576"),
        (header("p", 600, b"L") + bytes(512), 0, "a member of 600 bytes is cut off"),
    ],
)
def test_what_is_no_sound_tar_file_is_refused_with_the_position(tmp_path, data, position, rule):
    with pytest.raises(ValueError, match=f"s.tar: no sound .* at byte {position}: .*{rule}") as caught:
        found(tmp_path / "s.tar", data)
    assert "\n" not in str(caught.value)
