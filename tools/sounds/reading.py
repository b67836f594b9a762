"""Recordings to be read: files, addresses, and the bytes inside a dataset."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec

from bat_audio_tools.names import is_address
from bat_audio_tools.settings import channel_number


@dataclass(frozen=True)
class Input:
    """A recording, or the part of it that begins at `start` and lasts `duration`.

    Args:
        id: as in the list of files, else the path.
        path: as it was given, or an address of fsspec; of a sound inside a dataset the dataset's name and the row.
        start, duration: the part, in seconds; a duration of None reaches to the end of the file.
        row: of the sound inside a dataset.
        problem: why it cannot be embedded, where that is known before it is read.
        channel: "mean" of all, which None stands for too, or the number of one from 0 on.
    """

    id: str
    path: str
    start: float = 0.0
    duration: float | None = None
    row: int | None = None
    problem: str | None = None
    channel: str | None = None

    @property
    def channel_to_read(self) -> str | int:
        """The channel as `load_audio` takes it."""
        return channel_number(self.channel or "mean")

    def content(self, sounds: "datasets.Dataset | None") -> bytes | None:  # noqa: F821
        """The bytes of a sound inside the dataset `sounds` of `without_decoding`; None for any other recording."""
        return None if self.row is None else sounds[self.row]["audio"]["bytes"]


@contextlib.contextmanager
def opened(path: str, content: bytes | None) -> Iterator[str | io.IOBase]:
    """What `load_audio` and `Sound` read the recording from.

    Raises:
        OSError: a remote file that is not there, or cannot be had.
    """
    if content is not None:
        source = io.BytesIO(content)
        source.name = path
        yield source
    elif is_address(path):
        with fsspec.open(path, "rb") as file:
            yield file
    else:
        yield path
