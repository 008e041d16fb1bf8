"""From a photograph to an aligned crop of each face, the same for training data and for prediction."""
