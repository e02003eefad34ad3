"""Writes TensorBoard's event files: scalars only, and with nothing to install.

An event file is a sequence of records, each of them a protocol buffer (``tensorflow/core/util/event.proto``)
between its length and a checksum (``tensorflow/core/lib/io/record_writer.h``). Training environments have
TensorBoard, torch or neither; these few bytes need none of them.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """Appends steps to a new file in a folder, which TensorBoard shows as one run.

    Args:
        folder: Made when the first step is written.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step.

        Raises:
            OSError: They cannot be written.
        """
        values = b"".join(
            _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in figures.items()
        )
        now = b"\x09" + struct.pack("<d", time.time())
        records = _record(now + b"\x10" + _varint(step) + _field(5, values))
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            records = _record(now + _field(3, b"brain.Event:2")) + records
        with self.file.open("ab") as out:
            out.write(records)


def _varint(number: int) -> bytes:
    """A number in groups of 7 bits, the lowest first.

    >>> _varint(300).hex()
    'ac02'
    """
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes, a text or a message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked_crc(length) + content + _masked_crc(content)


def _masked_crc(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """The checksum of RFC 3720, section 12.1 (Castagnoli).

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]
