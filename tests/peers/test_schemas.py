"""launch/kubernetes/ against the published schemas of JobSet and of Kubeflow Trainer."""

from typing import Any

import pytest
import yaml

from tests.procs import ROOT

models = pytest.importorskip("kubeflow_trainer_api.models")
pytestmark = pytest.mark.peers

KINDS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


@pytest.mark.parametrize("name", ["jobset", "trainjob"])
def test_every_field_is_one_of_the_schema(name: str) -> None:
    """A model refuses a wrong type, and leaves out a field that it does not know."""
    file = ROOT / "launch/kubernetes" / f"{name}.yaml"
    for document in yaml.safe_load_all(file.read_text()):
        read = KINDS[document["kind"]].from_dict(document)
        assert read is not None
        assert lost(document, read.to_dict()) == []


def test_an_unknown_field_is_found() -> None:
    (jobset,) = yaml.safe_load_all((ROOT / "launch/kubernetes/jobset.yaml").read_text())
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 3
    read = models.JobsetV1alpha2JobSet.from_dict(jobset)
    assert lost(jobset, read.to_dict()) == ["spec.replicatedJobs.0.template.spec.backofLimit"]


def lost(ours: Any, read: Any, where: str = "") -> list[str]:
    """The fields of ours that are not in what was read, or are otherwise there."""
    if isinstance(ours, dict):
        pairs = [(name, value, read.get(name)) for name, value in ours.items()]
    elif isinstance(ours, list):
        pairs = [(number, value, read[number]) for number, value in enumerate(ours)]
    else:
        return [] if ours == read else [where]
    found = []
    for name, value, theirs in pairs:
        path = f"{where}.{name}".lstrip(".")
        found += [path] if theirs is None else lost(value, theirs, path)
    return found
