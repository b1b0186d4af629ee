"""Bytes to lines, lines to tokens: the one line reader, vocabularies and tokenizers."""
