"""Building blocks of the papers: plain modules, no training."""
