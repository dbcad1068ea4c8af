"""All that a worker of `infer` imports, for workers that do so before they are given work (`lean_ray`)."""

from __future__ import annotations

import ray.data._internal.execution.operators.actor_pool_map_operator  # noqa: F401

import denoise_batch.bundle
import denoise_batch.denoiser
import denoise_batch.inference.unit_pool
import denoise_batch.models  # noqa: F401
