"""Files that lie in the data folder for the length of one request, and never under a name."""

from __future__ import annotations

import io
import secrets
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, cast

_KEY_NBYTES = 32
_BLOCK_NBYTES = 16
_BUFFER_NBYTES = 1 << 20


def scratch_file(folder: Path, *, encrypted: bool) -> BinaryIO:
    """A new empty file, for its owner alone. If `encrypted`, with a key that goes with the file; each byte is
    to be written once then."""
    file = cast("BinaryIO", TemporaryFile(dir=folder))  # noqa: SIM115  # the caller closes it
    if not encrypted:
        return file
    return cast("BinaryIO", io.BufferedRandom(_SealedFile(file), _BUFFER_NBYTES))


class _SealedFile(io.RawIOBase):
    """AES-CTR over a file, where any place can be read. What is read is checked by whoever reads it: an
    agent's file has checksums and a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._key = secrets.token_bytes(_KEY_NBYTES)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        place = self._file.tell()
        sealed = self._file.read(len(buffer))
        buffer[: len(sealed)] = self._crypt(place, sealed)
        return len(sealed)

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        sealed = self._crypt(self._file.tell(), bytes(data))
        return self._file.write(sealed)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _crypt(self, place: int, data: bytes) -> bytes:
        """The same both ways. `place` is that of `data` in the file, in bytes."""
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR

        number, skipped = divmod(place, _BLOCK_NBYTES)
        stream = Cipher(AES(self._key), CTR(number.to_bytes(_BLOCK_NBYTES, "big"))).encryptor()
        stream.update(bytes(skipped))
        return stream.update(data)
