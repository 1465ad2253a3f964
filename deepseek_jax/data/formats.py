"""Formats of files, told by their first bytes."""

import codecs
import string

from deepseek_jax.config.hints import one_line
from deepseek_jax.data.files import Content, compression

PARQUET, NPY, MEGATRON = b"PAR1", b"\x93NUMPY", b"MMIDIDX\0"
LFS = b"version https://git-lfs"
BOM = b"\xef\xbb\xbf"  # of UTF-8

# First bytes -> name of a format that holds neither text nor ids in a form that is read here.
_OTHERS = {
    b"PARE": "an encrypted Parquet file",
    b"PK\3\4": "a ZIP archive (.zip, .npz, .docx or PyTorch weights); unpack it",
    b"PK\5\6": "an empty ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"\x04\x22\x4d\x18": "LZ4 data; unpack it",
    b"ARROW1": "an Arrow file; write it as Parquet",
    b"FEA1": "a Feather file; write it as Parquet",
    b"Obj\1": "an Avro file; write it as Parquet",
    b"ORC": "an ORC file; write it as Parquet",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite database",
    b"GGUF": "a GGUF model",
    MEGATRON: "the index of a Megatron data set; write its ids as .npy",
    b"\x7fELF": "a program",
    b"%PDF-": "a PDF document; write its text as .txt",
    b"\x89PNG\r\n": "a PNG picture",
    b"GIF8": "a GIF picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"RIFF": "a RIFF file (.wav, .webp or .avi)",
}
_UNICODE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_CONTROLS = {*range(32), 127} - set(string.whitespace.encode())


def foreign(head: bytes) -> str:
    """Name and cure of a format that is not read here, by its magic bytes; else ""."""
    if head.startswith(LFS):
        return "a Git LFS pointer, not the file itself; run git lfs pull"
    if is_text(head):
        return ""  # some formats begin with letters that a text may begin with
    if name := next((name for magic, name in _OTHERS.items() if head.startswith(magic)), ""):
        return name
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if packed := compression(head):
        return f"{packed} data; unpack it"
    if head[:3] in (b"\x80\4\x95", b"\x80\5\x95"):
        return "a Python pickle"
    return ""


def is_text(head: bytes) -> bool:
    """True for UTF-8 without zeros; the last character of `head` may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def encoding(head: bytes) -> str:
    """Unicode encoding other than UTF-8 that a byte order mark tells; else ""."""
    return next((name for mark, name in _UNICODE.items() if head.startswith(mark)), "")


def is_parquet(head: bytes) -> bool:
    """True for the first bytes of a Parquet file."""
    return head.startswith(PARQUET) and not is_text(head)


def is_surely_text(head: bytes) -> bool:
    """True for bytes that are text and no ids: at least 16 of UTF-8 without control characters."""
    return len(head) >= 16 and not _CONTROLS.intersection(head) and is_text(head)


def looks_like(head: bytes) -> str:
    """Words on what a file is, for the message that refuses it."""
    start = head.removeprefix(BOM).lstrip()[:64].lower()
    if not head:
        return "an empty file"
    if is_parquet(head):
        return "a Parquet file"
    if head.startswith(NPY):
        return "a NumPy array"
    if name := foreign(head):
        return name
    if name := encoding(head):
        return f"{name} text; convert it to UTF-8"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps an error page that was saved in place of the file"
    if start.startswith((b"{", b"[")):
        return "JSON"
    if not is_text(head):
        return "binary data" if b"\0" in head else "binary data, or text that is not UTF-8"
    return f"text that begins {one_line(start.decode(errors='replace'), 24)!r}"


def refused(content: Content) -> str:
    """Message that refuses a file for what it holds; "" for one that may be text."""
    if name := foreign(content.head):
        return f"data.path: {content.name} is {name}"
    if name := encoding(content.head):
        return (
            f"data.path: {content.name} is {name} text, and UTF-8 is needed, as iconv -f {name} "
            "-t UTF-8 makes it"
        )
    return ""
