"""denoise-batch: train a denoiser for 28×28 digit images and run it over Parquet sets of any size."""

__version__ = "0.1.0"
