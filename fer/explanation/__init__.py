"""What a trained network looks at, and how it sees a data set: maps, embeddings and the papers' figures."""
