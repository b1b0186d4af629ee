"""Subword tokens by SentencePiece (https://arxiv.org/abs/1808.06226)."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import sentencepiece

from encdec_cli.errors import BundleError, DataError, UsageError
from encdec_cli.text.options import TokenizerOptions, evenly, without_surrogates
from encdec_cli.text.vocabulary import BOS, EOS, PAD, SPECIAL, UNK, Vocabulary

# The space must have a piece however rare it is: spelled in bytes it would come back as this character.
_SPACE = "\u2581"
# The sums of expectation-maximisation depend on how lines are dealt to threads, so the number is fixed.
_THREADS = 4
# SentencePiece leaves out lines over a number of bytes; ours are cut, at most 4 bytes a character.
_PIECE_OF_LINE = 4000
# The share of the characters that get a piece; the rest is spelled in bytes.
_COVERAGE = 0.9995
_FATAL_ONLY = 3


class SentencePiece:
    """Pieces of words learned from text; what has no piece is spelled in bytes, so nothing is ever UNK.

    Text is not normalised and spaces are kept: `decode(encode(text)) == text`, except that U+2581, which
    SentencePiece uses for the space, comes back as a space.
    """

    kind = "sentencepiece"

    def __init__(self, content: bytes) -> None:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise BundleError("tokenizer: not a SentencePiece model; the file is damaged.") from error
        found = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
        if found != (PAD, UNK, BOS, EOS):
            raise BundleError(f"tokenizer: the ids of pad, unk, bos, eos are {found}, expected {(PAD, UNK, BOS, EOS)}.")
        pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
        self._content = content
        self._processor = processor
        # A foreign model may call its special pieces otherwise; their ids are what counts.
        self.vocabulary = Vocabulary((*SPECIAL, *pieces[len(SPECIAL) :]))

    @classmethod
    def train(cls, lines: Iterable[str], options: TokenizerOptions) -> SentencePiece:
        """Learn pieces from lines. Raises UsageError if `options.size` is too small, DataError without text."""
        content = io.BytesIO()
        chosen = list(_training_text(lines))
        if not chosen:
            raise DataError("tokenizer: there is no text to train it on; check the training files.")
        train = partial(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=iter(chosen),
            model_writer=content,
            model_type=options.algorithm,
            vocab_size=options.size,
            character_coverage=_COVERAGE,
            split_digits=True,  # so that numbers can be copied digit by digit
            user_defined_symbols=list(options.symbols),
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            byte_fallback=True,
            required_chars=_SPACE,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=4 * _PIECE_OF_LINE + 1,
            num_threads=_THREADS,
            minloglevel=_FATAL_ONLY,
        )
        try:
            _interruptible(train)
        except RuntimeError as error:
            raise _explained(error, options) from error
        return cls(content.getvalue())

    @classmethod
    def from_bytes(cls, content: bytes) -> SentencePiece:
        """Return the tokenizer that `to_bytes` wrote. Raises BundleError if the bytes are damaged."""
        return cls(content)

    def to_bytes(self) -> bytes:
        """Return the SentencePiece model, as its own tools read and write it."""
        return self._content

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS."""
        ids: list[int] = self._processor.encode(without_surrogates(text))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; PAD, BOS and EOS are skipped, bytes that are no UTF-8 become U+FFFD."""
        text: str = self._processor.decode([int(id) for id in ids if id not in (PAD, BOS, EOS)])
        return text

    def scores(self) -> dict[int, float]:
        """Return what the model ranks pieces by: log-probabilities (unigram), or minus the order of merges (bpe).

        By id, only of pieces that stand for the characters they show: no bytes, no special tokens.
        """
        one = self._processor
        ids = [id for id in range(len(SPECIAL), len(self.vocabulary)) if not (one.is_byte(id) or one.is_unused(id))]
        return dict(zip(ids, one.get_score(ids), strict=True))


def _interruptible(work: Callable[[], object]) -> None:
    """Do work that takes long outside of Python in a thread of its own, so that a signal is heeded meanwhile."""
    raised: list[BaseException] = []

    def done() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    # A daemon, for which an interrupted process does not wait when it leaves.
    thread = threading.Thread(target=done, daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _training_text(lines: Iterable[str]) -> Iterator[str]:
    # SentencePiece leaves out lines with a tab or NUL; it need not see either, it has their bytes.
    for line in evenly(line for line in lines if line.strip()):
        clean = without_surrogates(line).replace("\t", " ").replace("\0", "")
        for start in range(0, len(clean), _PIECE_OF_LINE):
            yield clean[start : start + _PIECE_OF_LINE]


def _explained(error: RuntimeError, options: TokenizerOptions) -> UsageError:
    need = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if need:
        return UsageError(
            f"text.vocabulary: {options.size} is too small, the characters of this corpus, 256 bytes and the special "
            f"tokens need {need[1]}; use at least {int(need[1]) + 100}."
        )
    return UsageError(f"text.tokenizer: SentencePiece cannot be trained with these options: {error}")
