"""What a line means: translation, summarization, dialogue."""
