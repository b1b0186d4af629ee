"""Choosing again among the outputs of a search, on text: minimum Bayes risk, other models."""
