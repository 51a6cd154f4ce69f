"""What is seen of a model and of its matrices, as tables to print: structure, proofs, accuracy."""
