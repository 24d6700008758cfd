"""Read ``ice_text.model``, in its current state and in that of the first ChatGLM-6B checkpoints."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

WHERE_TO_GET_IT = (
    "take ice_text.model (2706249 bytes, 130344 pieces) from the current THUDM/chatglm-6b checkpoint and put it "
    "beside tokenizer_config.json"
)
# Far more than any vocabulary has; a sparse file can claim terabytes.
_MOST_BYTES = 64 * 2**20

# The first checkpoints' file ends with the text pieces; their code added these, in this order, to what it had read.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_BLANK_PIECES = ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
# Field 2 (trainer_spec) of a ModelProto, holding nothing but field 35, byte_fallback: true.
_BYTE_FALLBACK = b"\x12\x03\x98\x02\x01"
_TEXT_PIECES = 130000


class VocabularyError(ValueError):
    """ice_text.model is missing, damaged or that of another model."""


def read_vocabulary(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, bool]:
    """Read the vocabulary, and add the control, blank and byte pieces that the first checkpoints' file lacks.

    Returns:
        the vocabulary, and whether the file is that of the first checkpoints (2699926 bytes, 130000 pieces).

    Raises:
        VocabularyError: the file is missing, far too large or no sentencepiece model.
    """
    if not path.is_file():
        raise VocabularyError(f"{path} is not there; {WHERE_TO_GET_IT}.")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise VocabularyError(
            f"{path} has {size} bytes, but more than {_MOST_BYTES} are refused: it is not the vocabulary of "
            f"ChatGLM-6B; {WHERE_TO_GET_IT}."
        )
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise VocabularyError(
            f"{path} is a Git LFS pointer, not the vocabulary itself; run `git lfs pull` in its folder."
        )
    model = _parsed(content)
    if model is None:
        raise VocabularyError(
            f"{path} ({size} bytes) is not a readable sentencepiece model: truncated or damaged; {WHERE_TO_GET_IT}."
        )
    if not _is_first_file(model):
        return model, False
    completed = _parsed(content + b"".join(_missing_pieces()) + _BYTE_FALLBACK)
    return (model, False) if completed is None else (completed, True)


def _parsed(content: bytes) -> sentencepiece.SentencePieceProcessor | None:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError:
        return None
    return model


def _is_first_file(model: sentencepiece.SentencePieceProcessor) -> bool:
    if model.GetPieceSize() != _TEXT_PIECES:
        return False
    added = (*_CONTROL_PIECES, *_BLANK_PIECES, "<0x00>", "<0xFF>")
    return all(model.IsUnknown(index) for index in model.PieceToId(list(added)))


def _missing_pieces() -> Iterator[bytes]:
    """Yield the added pieces as protobuf writes them: appended to a serialized ModelProto, they are its last ones."""
    for kind, names in (
        (_CONTROL, _CONTROL_PIECES),
        (_USER_DEFINED, _BLANK_PIECES),
        (_BYTE, [f"<0x{byte:02X}>" for byte in range(256)]),
    ):
        for name in names:
            # Fields 1 (piece), 2 (score, 0) and 3 (type) of the message in field 1 (pieces).
            piece = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x15" + struct.pack("<f", 0) + bytes([0x18, kind])
            yield b"\x0a" + bytes([len(piece)]) + piece
