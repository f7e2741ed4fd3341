"""Plans each retraining window and drives the executors that carry the plan out."""
