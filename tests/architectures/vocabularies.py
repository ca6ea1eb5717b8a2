"""Tokenizers of the tiny models, trained on the prompts of HumanEval."""

import io
from functools import cache

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from samq.data.datasets import packaged_rows

VOCABULARY = 512
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<pad>", "<bos>", "<eos>", "<|endoftext|>", "<|user|>", "<|assistant|>"),
    *("<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>", "<eop>", "<|system|>", "<|observation|>"),
]


@cache
def _texts() -> tuple[str, ...]:
    return tuple(row["prompt"] + row["canonical_solution"] for row in packaged_rows("humaneval"))


@cache
def sentencepiece_model() -> bytes:
    """The file tokenizer.model with Gemma's special pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in _texts() for line in text.splitlines()), model_writer=model,
        vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True, character_coverage=0.99, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
        hard_vocab_limit=True, user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    return model.getvalue()


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer.json of a model: of bytes, or of SentencePiece's pieces."""
    if kind == "pieces":
        return _pieces()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def _pieces() -> PreTrainedTokenizerFast:
    """Pieces and bytes as Gemma has them in its tokenizer.json."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *(chr(code) for code in range(33, 127))]
    pairs = [(one, other) for one in "etaoinsrhldcumfpgwyb" for other in "etaoinsr"][: VOCABULARY - len(pieces)]
    pieces += [one + other for one, other in pairs]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
