"""fer: an honest experiment bench for facial expression recognition."""

__version__ = "0.1.0"
