"""`python -m denoise_batch.cli`, which is `denoise-batch` where that is not on the path."""

from denoise_batch.cli import main

if __name__ == "__main__":
    main()
