"""Student models: inference, labelling, exemplar memory, retraining, checkpoints. Home of torch."""
