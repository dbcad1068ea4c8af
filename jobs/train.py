"""`denoise-batch train` as a Ray job.

ray job submit --working-dir . -- python jobs/train.py --out /shared/model
"""

import sys

from denoise_batch import cluster
from denoise_batch.submission import job

if __name__ == "__main__":
    cluster.leave(job.run(["train", *sys.argv[1:]]))
