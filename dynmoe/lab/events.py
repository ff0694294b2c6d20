"""What TensorBoard's files of a run tell: how long it took, and its latest pictures."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"
"""How every PNG file begins."""
WALL_TIME = 0x09
"""Byte before an event's time: its first field, a double (TensorFlow's event.proto)."""


@dataclass(frozen=True)
class Events:
    """Of one run."""

    seconds: float
    """from the first to the last entry, without the time between its sessions"""
    images: dict[str, bytes]
    """tag -> its latest picture, a PNG file; sorted by tag"""


def read_events(folder: Path, prefix: str | None = None) -> Events:
    """Read the files `events.out.tfevents.*` of a run's folder.

    Of a file that is cut off, all before is read; one that may not be read is as if it were empty.

    Args:
        folder: the run's.
        prefix: of the tags whose pictures are wanted; None for no pictures.
    """
    seconds = 0.0
    images: dict[str, bytes] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        times = []
        try:
            data = path.read_bytes()
        except OSError:
            continue
        for record in _records(data):
            if len(record) > 9 and record[0] == WALL_TIME:
                times.append(struct.unpack_from("<d", record, 1)[0])
            if prefix is not None and PNG in record:
                images |= _images(record, prefix)
        seconds += max(times, default=0.0) - min(times, default=0.0)
    return Events(seconds, dict(sorted(images.items())))


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, content, its checksum."""
    place = 0
    while place + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        end = place + 12 + size
        if end + 4 > len(data):
            return
        yield data[place + 12 : end]
        place = end + 4


def _images(record: bytes, prefix: str) -> dict[str, bytes]:
    """Tag -> PNG file of an event's pictures; none of an event that cannot be read."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        values = Event.FromString(record).summary.value
    except DecodeError:
        return {}
    found = {v.tag: v.image.encoded_image_string for v in values if v.tag.startswith(prefix)}
    return {tag: image for tag, image in found.items() if image.startswith(PNG)}
