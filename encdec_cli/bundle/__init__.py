"""Model folders, checkpoints, and other programs' formats."""
