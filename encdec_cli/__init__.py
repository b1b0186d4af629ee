"""Train, decode, judge and export encoder-decoder models from the command line."""

__version__ = "0.1.0"
