"""The loop, its loss, its optimizer and its exactness."""
