"""Encoders and decoders; nothing here knows text or search."""
