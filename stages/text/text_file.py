"""A text file of any size as blocks of text: unpacked if it is packed, every byte of it UTF-8 or refused by its place.

Read here and not by `datasets`, which would read a file without line breaks whole, cannot say at which byte a file
stops being UTF-8, and makes URLs and cache entries of file names.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from espalier.stages.errors import Refusal

BLOCK = 1 << 20  # bytes of a file, or characters of a string, taken up at once
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # how packed files begin -> Arrow's codec
PACKED_SUFFIXES = (".gz", ".zst", ".bz2")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def inner_name(file: Path) -> str:
    """The file's name in small letters, without what says how it is packed: `a.jsonl` of `A.jsonl.gz`."""
    name = file.name.lower()
    return name.rpartition(".")[0] if name.endswith(PACKED_SUFFIXES) else name


def unpacked(handle: IO[bytes]) -> Any:
    """A binary stream of what the file holds; how it is packed is seen from its first bytes, not from its name."""
    beginning = handle.read(4)
    handle.seek(0)
    codec = next((codec for magic, codec in PACKED.items() if beginning.startswith(magic)), None)
    return handle if codec is None else pa.CompressedInputStream(handle, codec)


def looks_like_text(file: Path) -> bool:
    """Whether the file's beginning is that of a text; a packed one is taken for one."""
    try:
        with file.open("rb") as handle:
            return b"\0" not in unpacked(handle).read(8192)
    except OSError:
        return False


def text_blocks(file: Path, name: str) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about 1 MiB, its line breaks as they are, a byte order mark dropped.

    Raises Refusal, in words that begin with `name`, for a file that cannot be read or unpacked, and for a byte that is
    not UTF-8, by its offset (in the unpacked file).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    try:
        with file.open("rb") as handle:
            stream = unpacked(handle)
            while block := stream.read(BLOCK):
                if consumed == 0 and block.startswith(UTF_16):
                    raise Refusal(
                        f"{name}: UTF-16, and tokenizers read UTF-8; convert it (iconv -f utf-16 -t utf-8 FILE > NEW)"
                    )
                mark = len(codecs.BOM_UTF8) if consumed == 0 and block.startswith(codecs.BOM_UTF8) else 0
                yield _decoded(decoder, block[mark:], consumed + mark - len(decoder.getstate()[0]), name)
                consumed += len(block)
            _decoded(decoder, b"", consumed - len(decoder.getstate()[0]), name, final=True)
    except (OSError, pa.ArrowException) as error:
        raise Refusal(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, start: int, name: str, final: bool = False) -> str:
    """The text of `block`, whose first undecoded byte is byte `start` of the file."""
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        where = f"{name}: not UTF-8 at byte offset {start + error.start} ({error.reason}, "
        byte = f"byte 0x{error.object[error.start]:02x})"
        if b"\0" in error.object[:8192]:
            raise Refusal(f"{where}{byte}, and no text at all by its zero bytes; give a text file") from error
        raise Refusal(f"{where}{byte}; convert the file to UTF-8 (iconv -f latin1 -t utf-8)") from error
