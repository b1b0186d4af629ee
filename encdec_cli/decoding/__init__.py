"""Search over next-token scores; nothing here knows models or text."""
