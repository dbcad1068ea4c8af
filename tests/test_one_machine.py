"""What Ray Train does without on a Ray that was started here, and that any other is left as it is."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("without_rays_arrow_types")


@pytest.fixture
def one_machine() -> Any:
    from denoise_batch.training import one_machine

    return one_machine


def test_only_a_fixed_number_of_workers_asks_nobody_for_room(one_machine: Any) -> None:
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

    policy = pickle.loads(pickle.dumps(one_machine._scaling_policy(ScalingConfig(num_workers=3))))
    assert isinstance(policy, one_machine.AskingNobody)
    policy.after_controller_start(None)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    assert isinstance(one_machine._scaling_policy(ScalingConfig(num_workers=(1, 3))), ElasticScalingPolicy)


def test_a_ray_train_without_these_parts_is_left_as_it_is(one_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts() -> list[object]:
        trainer = one_machine.trainer
        return [trainer.PlacementGroupCleanerCallback, trainer.DatasetsCallback, trainer.create_scaling_policy]

    before = parts()
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray._private.worker._global_node", None)
    with one_machine.only_what_is_used():
        assert parts() == before  # no Ray was started here
    monkeypatch.setattr("ray._private.worker._global_node", SimpleNamespace(is_head=lambda: True, webui_url=""))
    with one_machine.only_what_is_used():
        assert not set(parts()) & set(before)
        assert os.environ[name] == "0"
    assert parts() == before
    with monkeypatch.context() as other:
        other.setattr("ray.__version__", "2.61.0")
        with one_machine.only_what_is_used():
            assert parts() == before
    for head, dashboard, kept in ((True, "127.0.0.1:8265", 3), (False, "127.0.0.1:8265", 3), (False, "", 2)):
        node = SimpleNamespace(is_head=lambda head=head: head, webui_url=dashboard)
        monkeypatch.setattr("ray._private.worker._global_node", node)
        with one_machine.only_what_is_used():
            assert [part in before for part in parts()].count(True) == kept
