"""A SentencePiece `tokenizer.model`, rebuilt from the `tokenizer.json` that was made of it.

Transformers 5 does not save the former, and llama.cpp's converter reads nothing else. SentencePiece merges
the pair whose piece has the highest score; tokenizer.json lists its merges in that order, so a piece's
score is minus the rank of the first merge that makes it.
"""

import re
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""SentencePiece's types of pieces."""
BPE = 2
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json was made of a SentencePiece BPE model."""
    model = tokenizer["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def write_sentencepiece(tokenizer: dict[str, Any], path: Path) -> None:
    """Writes the tokenizer.model of a tokenizer.json's vocabulary and merges."""
    vocab = tokenizer["model"]["vocab"]
    unknown = tokenizer["model"].get("unk_token") or "<unk>"
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    added = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for text, _ in sorted(vocab.items(), key=lambda item: item[1]):
        piece = proto.pieces.add()
        piece.piece = text
        piece.score = -float(ranks.get(text, len(ranks)))
        if text == unknown:
            piece.type = UNKNOWN
        elif text in added:
            piece.type = CONTROL if added[text] else USER_DEFINED
        else:
            piece.type = BYTE if BYTE_PIECE.fullmatch(text) else NORMAL
    proto.trainer_spec.model_type = BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    path.write_bytes(proto.SerializeToString())
