"""Training with Ray Train: what a training does (`recipes`), the driver (`train`), the workers (`loop`)."""
