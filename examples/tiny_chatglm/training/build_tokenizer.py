"""Train the tiny checkpoint's sentencepiece model and give it the layout of ChatGLM-6B's.

    python examples/tiny_chatglm/training/build_tokenizer.py

The layout: <unk> <s> </s> <pad> <n>, the trained pieces, eight control tokens from [MASK] on, the pieces that stand for
a tab and for runs of 2 to 80 blanks, and 256 byte pieces, which can write anything that the pieces lack.
One thread and a fixed seed: the same corpus gives the same file.
"""

import argparse
import io
import random
from pathlib import Path

import sentencepiece
from corpus import Corpus

TRAINED_PIECES = 1672
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
BLANKS = ("<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81)))
# Values of sentencepiece's ModelProto.SentencePiece.Type.
TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_BYTE = 3, 4, 6


def training_lines(corpus: Corpus, draws: int = 30_000) -> list[str]:
    """List every answer and wording once, and many drawn dialogues, so that pieces follow what the model will see."""
    rng = random.Random(0)
    lines = []
    for intent in corpus.intents.values():
        for language in ("en", "zh"):
            lines += [intent.answer[language], *intent.train[language]]
    for _ in range(draws):
        dialogue = corpus.draw(rng)
        lines.append(dialogue.query)
        if rng.random() < 0.3:
            lines.append(dialogue.answer)
        if dialogue.history and rng.random() < 0.05:
            lines += ["[Round 0]", "[Round 1]", "问:" + dialogue.query, "答:" + dialogue.answer]
    return [part for line in lines for part in line.split("\n") if part.strip()]


def varint(number: int) -> bytes:
    """Encode a whole number as protocol buffers do."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def piece(text: str, kind: int) -> bytes:
    """Encode an entry of ModelProto.pieces (field 1): the text (field 1), score 0 (field 2) and type (field 3)."""
    encoded = text.encode()
    body = b"\x0a" + varint(len(encoded)) + encoded + b"\x15\x00\x00\x00\x00" + b"\x18" + varint(kind)
    return b"\x0a" + varint(len(body)) + body


def build(output: Path) -> sentencepiece.SentencePieceProcessor:
    """Train, append the fixed pieces, write ``output``, and return the finished model."""
    trained = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines(Corpus())),
        model_writer=trained,
        vocab_size=TRAINED_PIECES,
        model_type="unigram",
        character_coverage=0.9995,
        max_sentencepiece_length=8,
        split_digits=True,
        byte_fallback=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols="<n>",
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=1,
    )
    # A serialised message may be continued by appending fields, so no protocol buffer library is needed: more pieces,
    # and TrainerSpec (field 2) with byte_fallback (field 35) set, which merges into the one that is there.
    spec = varint(35 << 3) + b"\x01"
    output.write_bytes(
        trained.getvalue()
        + b"".join(piece(text, TYPE_CONTROL) for text in CONTROL)
        + b"".join(piece(text, TYPE_USER_DEFINED) for text in BLANKS)
        + b"".join(piece(f"<0x{byte:02X}>", TYPE_BYTE) for byte in range(256))
        + b"\x12"
        + varint(len(spec))
        + spec
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(output))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "ice_text.model")
    model = build(parser.parse_args().output)
    print(
        f"{model.vocab_size()} pieces; [gMASK] is {model.piece_to_id('[gMASK]')}, <sop> is {model.piece_to_id('<sop>')}"
    )
