"""The pipeline: one module per DVC stage, with the stage's name."""
