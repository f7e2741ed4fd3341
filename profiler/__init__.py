"""Estimates what retraining and inference configurations cost and are worth. Runs no torch."""
