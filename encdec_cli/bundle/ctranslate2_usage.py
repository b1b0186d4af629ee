"""How to use a CTranslate2 folder without this package: a program and a page of text that lie in it."""

from __future__ import annotations

import re

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.beam import Beam
from encdec_cli.text.tokenizer import Tokenizer
from encdec_cli.text.units import Character

_PAGE = """\
A model for CTranslate2, exported by encdec. This folder is complete: encdec is not needed to use it.

    pip install ctranslate2{package}
    python translate.py < in.txt > out.txt

translate.py is short and meant to be read: it shows how to turn text into tokens, how to call
ctranslate2.Translator so that it searches as `encdec generate` does (beam {beam}), and how to turn tokens back
into text. translate_batch is fastest when it is given many lines at once.
{note}
export.json says what the model is; MANIFEST.json holds the SHA-256 of every file.
"""

_PROGRAM = '''\
"""Lines in, lines out: python translate.py < in.txt > out.txt"""

{imports}import sys
from pathlib import Path

import ctranslate2
{packages}
FOLDER = Path(__file__).resolve().parent
{processors}

def encode(line):
    """Return the tokens of a text; CTranslate2 adds the end of the source itself."""
    return {encode}


def decode(tokens):
    """Return the text of tokens."""
    return {decode}


def translate(translator, lines):
    """Return one output for each line, an empty one for an empty line."""
    results = iter(
        translator.translate_batch(
            [encode(line) for line in lines if line.strip()],
            beam_size={beam},
            length_penalty={penalty},
            max_input_length={longest},
            max_decoding_length={limit},
            return_end_token=True,  # then it counts in the length that the penalty takes
            disable_unk=True,
            suppress_sequences=[["<pad>"], ["<s>"]],
            max_batch_size=32,
        )
    )
    outputs = (next(results).hypotheses[0] if line.strip() else [] for line in lines)
    return [decode([token for token in output if token != "</s>"]) for output in outputs]


if __name__ == "__main__":
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    lines = [line.rstrip("\\r") for line in text.removesuffix("\\n").split("\\n")] if text else []
    for output in translate(ctranslate2.Translator(str(FOLDER)), lines):
        sys.stdout.buffer.write(output.encode() + b"\\n")
'''


def page(bundle: Bundle) -> str:
    """Return the text of README.txt."""
    package = " sentencepiece" if _processors(bundle) else ""
    return _PAGE.format(package=package, note=_note(bundle), beam=beam_of(bundle)[0])


def program(bundle: Bundle, limit: int) -> str:
    """Return the text of translate.py. limit: most tokens of an output, EOS left aside."""
    beam, penalty = beam_of(bundle)
    processors = _processors(bundle)
    return _PROGRAM.format(
        imports="import re\n" if isinstance(bundle.source, Character) else "",
        packages="import sentencepiece\n" if processors else "",
        processors=processors,
        encode=_encode(bundle.source),
        decode=_decode(bundle.target),
        beam=beam,
        penalty=penalty,
        longest=bundle.longest_source + 1,
        limit=limit,
    )


def beam_of(bundle: Bundle) -> tuple[int, float]:
    """Return the beam and the length penalty of the recipe, or the defaults if CTranslate2 knows no such search."""
    search = bundle.recipe.decoding.config
    search = search if type(search) is Beam and search.normalization == "power" else Beam()
    return search.beam, search.length_penalty


def _note(bundle: Bundle) -> str:
    """Say what the task makes of a line before the tokenizer sees it, if anything."""
    line = "one\ttwo"
    read = bundle.task.source(bundle.task.read(line))
    if read == line:
        return ""
    return f"\nWhere the line is {line!r}, this model reads {read!r}: prepare the lines in that way.\n"


def _processors(bundle: Bundle) -> str:
    """Return the lines that load SentencePiece models, if there are any."""
    sides = {"SOURCE": (bundle.source, "source"), "TARGET": (bundle.target, _target_file(bundle))}
    return "".join(
        f'{name} = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "{file}.tokenizer"))\n'
        for name, (tokenizer, file) in sides.items()
        if tokenizer.kind == "sentencepiece"
    )


def _target_file(bundle: Bundle) -> str:
    return "source" if bundle.target is bundle.source else "target"


def _encode(tokenizer: Tokenizer) -> str:
    if tokenizer.kind == "sentencepiece":
        return "SOURCE.encode(line, out_type=str)"
    if isinstance(tokenizer, Character):
        longest_first = sorted(tokenizer.symbols, key=len, reverse=True)
        return f"re.findall({'|'.join([*map(re.escape, longest_first), '.'])!r}, line, re.DOTALL)"
    # Text that spells `<s>` is not a beginning of a sentence.
    return '["<unk>" if word in ("<pad>", "<unk>", "<s>", "</s>") else word for word in line.split()]'


def _decode(tokenizer: Tokenizer) -> str:
    if tokenizer.kind == "sentencepiece":
        return "TARGET.decode(tokens)"
    return '"".join(tokens)' if isinstance(tokenizer, Character) else '" ".join(tokens)'
