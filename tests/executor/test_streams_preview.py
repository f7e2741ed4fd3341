"""The sheet of frames: a PNG that any viewer reads, and a command that refuses nonsense politely."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from executor.streams.figures import CLASSES
from executor.streams.open import open_source
from executor.streams.preview import contact_sheet, main, write_png
from protocol.errors import InputError
from protocol.schema import CitySource, StreamSpec


def read_png(path: Path) -> NDArray[np.uint8]:
    """Decode what ``write_png`` writes, by the format's own rules."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        (crc,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        position += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 2)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert (rows[:, 0] == 2).all()
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, 3)


def test_a_written_picture_reads_back_as_it_was(tmp_path: Path) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    write_png(picture, tmp_path / "p.png")
    assert (read_png(tmp_path / "p.png") == picture).all()


def test_a_contact_sheet_holds_the_frames_in_order(tmp_path: Path) -> None:
    city = CitySource(seed=2, width=160, height=120, drift_period_s=0.0)
    source = open_source(StreamSpec(stream_id="cam", source=city, classes=CLASSES))
    contact_sheet(source, [5, 50, 500], tmp_path / "p.png", num_columns=2, boxes=False)
    picture = read_png(tmp_path / "p.png")
    assert (picture[:120, :160] == source.frame(5).image()).all()
    assert (picture[:120, 164:324] == source.frame(50).image()).all()
    assert (picture[124:244, :160] == source.frame(500).image()).all()
    contact_sheet(source, [5], tmp_path / "p.png")
    assert (read_png(tmp_path / "p.png")[:120, :160] != source.frame(5).image()).any(), "boxes are drawn"
    with pytest.raises(InputError, match="at least one frame"):
        contact_sheet(source, [], tmp_path / "p.png")


def test_the_command_writes_a_sheet_and_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["", "night,rain", "--halve", "--columns", "2", "--output", str(tmp_path / "p.png")]) == 0
    assert read_png(tmp_path / "p.png").shape == (184, 648, 3)
    assert main(["sunny", "--output", str(tmp_path / "q.png")]) == 2
    assert "sunny: no such condition; allowed: commute, " in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "no" / "p.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err
