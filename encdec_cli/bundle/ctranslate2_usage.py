"""The README.txt of a CTranslate2 folder: how to use it from Python, without this package."""

from __future__ import annotations

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.beam import Beam
from encdec_cli.text.tokenizer import Tokenizer
from encdec_cli.text.units import Character

_PAGE = """\
A model for CTranslate2, exported by encdec. export.json says from what; MANIFEST.json holds the checksums.

    pip install ctranslate2{package}

{note}The outputs are those of `encdec generate` with beam {beam}; the speed is in batches of many lines.
An empty line has no translation: leave it out.

{code}"""

_CODE = '''\
import sys
from pathlib import Path

import ctranslate2
{imports}
folder = str(Path(sys.argv[0]).resolve().parent)  # where this file lies, next to model.bin
translator = ctranslate2.Translator(folder)


{encode}


{decode}


lines = [line.rstrip("\\n") for line in sys.stdin if line.strip()]
results = translator.translate_batch(
    [encode(line) for line in lines],
    beam_size={beam},
    length_penalty={penalty},
    max_input_length={longest},
    max_decoding_length={limit},
    return_end_token=True,  # so that the end counts in the length, as in training
    disable_unk=True,
    suppress_sequences=[["<pad>"], ["<s>"]],
    max_batch_size=32,
)
for result in results:
    print(decode([token for token in result.hypotheses[0] if token != "</s>"]))
'''


def usage(bundle: Bundle, limit: int) -> str:
    """Return the text of README.txt; its indented part is a program that translates stdin.

    limit: most tokens of an output, EOS left aside.
    """
    search = bundle.recipe.decoding.config
    beam, penalty = (search.beam, search.length_penalty) if isinstance(search, Beam) else (5, 1.0)
    shared = bundle.source is bundle.target
    kinds = {bundle.source.kind, bundle.target.kind}
    imports = [name for name, kind in (("re", "character"), ("sentencepiece", "sentencepiece")) if kind in kinds]
    code = _CODE.format(
        imports="".join(f"import {name}\n" for name in imports),
        encode=_encode(bundle.source),
        decode=_decode(bundle.target, "source.tokenizer" if shared else "target.tokenizer"),
        beam=beam,
        penalty=penalty,
        longest=bundle.recipe.text.max_source,
        limit=limit,
    )
    package = " sentencepiece" if "sentencepiece" in kinds else ""
    indented = "".join(f"    {line}".rstrip() + "\n" for line in code.split("\n"))
    return _PAGE.format(package=package, note=_note(bundle), beam=beam, code=indented.rstrip() + "\n")


def _note(bundle: Bundle) -> str:
    """Say what the task makes of a line before the tokenizer sees it, if anything."""
    line = "one\ttwo"
    read = bundle.task.source(bundle.task.read(line))
    if read == line:
        return ""
    return f"Where the line is {line!r}, this model was trained to read {read!r}: prepare lines in that way.\n"


def _encode(tokenizer: Tokenizer) -> str:
    if tokenizer.kind == "sentencepiece":
        return (
            'source = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/source.tokenizer")\n\n\n'
            "def encode(line):\n    return source.encode(line, out_type=str)"
        )
    if isinstance(tokenizer, Character):
        pattern = tokenizer.pattern.pattern
        return f"def encode(line):\n    return re.findall({pattern!r}, line, re.DOTALL)"
    special = '("<pad>", "<unk>", "<s>", "</s>")'
    return f'def encode(line):\n    return ["<unk>" if word in {special} else word for word in line.split()]'


def _decode(tokenizer: Tokenizer, file: str) -> str:
    if tokenizer.kind == "sentencepiece":
        return (
            f'target = sentencepiece.SentencePieceProcessor(model_file=f"{{folder}}/{file}")\n\n\n'
            "def decode(tokens):\n    return target.decode(tokens)"
        )
    joint = "" if isinstance(tokenizer, Character) else " "
    return f"def decode(tokens):\n    return {joint!r}.join(tokens)"
