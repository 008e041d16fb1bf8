"""Pre-training: backbones without labels, landmark networks; each ends in a file of weights that the models take."""
