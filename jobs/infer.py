"""`denoise-batch infer` as a Ray job.

ray job submit --working-dir . -- python jobs/infer.py /shared/in /shared/out
"""

import sys

from denoise_batch import cluster
from denoise_batch.submission import job

if __name__ == "__main__":
    cluster.leave(job.run(["infer", *sys.argv[1:]]))
