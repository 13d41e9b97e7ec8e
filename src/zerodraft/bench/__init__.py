"""Measuring: decoding methods side by side, the cost of their parts, and reports of what was found."""
