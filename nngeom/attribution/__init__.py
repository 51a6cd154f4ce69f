"""Which training examples an output of a trained model goes back to."""
