import copy
import dataclasses
import re
import shlex
import shutil
import string
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from cvmatch import cli, config
from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import TrainConfig
from tests.helpers import documents, kustomize
from tests.helpers.documents import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
JOBS = sorted(path.name for path in (KUBERAY / "jobs").iterdir())
DIRECTORIES = ["cluster", *(f"jobs/{name}" for name in JOBS)]
SCHEMA = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text("utf-8"))
SETTINGS = {command.name: cli.settings_of(command) for command in cli.COMMANDS}

SHORT = {"demo", "import", "index", "locate", "search"}
"""Jobs of minutes, which a person sends to a cluster that is there."""


def rendered(directory: str, kind: str) -> dict:
    (one,) = [one for one in kustomize.render(KUBERAY / directory) if one["kind"] == kind]
    return one


def of_ray(directory: str) -> dict:
    return rendered(directory, "RayCluster" if directory == "cluster" else "RayJob")


@pytest.fixture(scope="module")
def cluster():
    return rendered("cluster", "RayCluster")


@pytest.fixture(scope="module")
def groups(cluster):
    """The node groups by their label, as the autoscaler of Ray reads them."""
    named = {**cluster, "metadata": {**cluster["metadata"], "namespace": "default"}}
    read = autoscaling_config._derive_autoscaling_config_from_ray_cr(named)
    return {group["labels"]["pool"]: group for group in read["available_node_types"].values()}


@pytest.fixture(scope="module")
def on_machines():
    """cluster.yaml."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))


def specs(cluster) -> dict[str, dict]:
    """The node groups by their label, as they are written."""
    spec = cluster["spec"]
    every = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return {group["labels"]["pool"]: group for group in every}


def container(group: dict) -> dict:
    (one,) = group["template"]["spec"]["containers"]
    return one


def words(name: str) -> list[str]:
    """Words of a job's command, as its shell splits them with the variables of its container."""
    variables = rendered(f"jobs/{name}", "ConfigMap")["data"]
    command = rendered(f"jobs/{name}", "RayJob")["spec"]["entrypoint"]
    return shlex.split(string.Template(command).substitute(variables))


def settings(name: str):
    program, command, *flags = words(name)
    assert program == "cvmatch"
    return config.parse(SETTINGS[command], flags)


def parts(one) -> list:
    """A dataclass and all that it consists of."""
    fields = [getattr(one, field.name) for field in dataclasses.fields(one)]
    return [one, *(part for f in fields if dataclasses.is_dataclass(f) for part in parts(f))]


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_objects_have_fields_that_the_operator_knows(directory):
    jsonschema.validate(of_ray(directory), SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backofLimit", 3),
        ("spec.ttlSecondsAfterFinished", "3600"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.label", {"pool": "head"}),
        ("metadata.name", "train_matcher"),
    ],
)
def test_objects_with_a_wrong_field_are_refused(path, value):
    job = copy.deepcopy(of_ray("jobs/train-matcher"))
    *parents, last = path.split(".")
    place = job
    for key in parents:
        place = place[key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", JOBS)
def test_jobs_can_be_suspended_and_tried_again_by_the_operators_rules(name):
    job = rendered(f"jobs/{name}", "RayJob")
    spec = job["spec"]
    assert job["metadata"]["name"] == name
    assert spec["suspend"] is False
    assert spec["shutdownAfterJobFinishes"] is True  # or it may be neither suspended nor removed
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_on_the_one_cluster_that_is_described(name, cluster):
    spec = rendered(f"jobs/{name}", "RayJob")["spec"]
    assert spec["rayClusterSpec"] == cluster["spec"]
    (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["image"] == container(cluster["spec"]["headGroupSpec"])["image"]


def test_groups_are_those_of_the_cluster_on_machines(cluster, groups, on_machines):
    types = on_machines["available_node_types"]
    for name, node in types.items():
        group, pool = groups[node["labels"]["pool"]], node["labels"]["pool"]
        read = {key: group["resources"].get(key, 0) for key in ("CPU", "GPU")}
        assert read == {"CPU": 0, "GPU": 0, **node["resources"]}, name
        assert group["labels"] == node["labels"]
        limits = ("min_workers", "max_workers")
        assert [group[key] for key in limits] == [node.get(key, 0) for key in limits], name
        assert specs(cluster)[pool].get("groupName", "head") == name
    assert len(groups) == len(types)
    idle = cluster["spec"]["autoscalerOptions"]["idleTimeoutSeconds"]
    assert idle == 60 * on_machines["idle_timeout_minutes"]


def test_images_are_made_from_those_of_the_cluster_on_machines(cluster, on_machines):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
    stages = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.M)}
    for name, node in on_machines["available_node_types"].items():
        image = container(specs(cluster)[node["labels"]["pool"]])["image"]
        version, target = image.removeprefix("cvmatch:").rsplit("-", 1)
        assert version == project["version"]
        bare = node.get("docker", {}).get("worker_image") or on_machines["docker"]["head_image"]
        assert stages[stages[target]] == bare, name
    assert (
        f"ray[default,data,train,tune]=={cluster['spec']['rayVersion']}" in project["dependencies"]
    )


def test_pods_ask_kubernetes_for_the_gpus_that_ray_counts_and_leave_nodes_some_cpu(cluster, groups):
    for pool, group in specs(cluster).items():
        resources = container(group)["resources"]
        gpus = int(resources["limits"].get("nvidia.com/gpu", 0))
        assert gpus == groups[pool]["resources"].get("GPU", 0)
        counted = groups[pool]["resources"]["CPU"]
        assert not counted or int(resources["requests"]["cpu"]) < counted
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert {"num-cpus", "labels"}.isdisjoint(group["rayStartParams"])  # the operator refuses


def test_nodes_demand_a_token_and_files_hold_no_secret(cluster):
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    texts = [path.read_text("utf-8") for path in KUBERAY.rglob("*.yaml")]
    assert not [
        text for text in texts if re.search(r"kind: Secret|(?i:secret\w*key|token): \w{8}", text)
    ]


def test_every_job_that_takes_long_has_an_object():
    commands = {words(name)[1].replace("-", "_") for name in JOBS}
    assert commands == {path.stem for path in (ROOT / "jobs").glob("*.py")} - SHORT


@pytest.mark.parametrize("name", JOBS)
def test_commands_have_flags_that_the_jobs_take_and_go_on_when_given_again(name):
    command = rendered(f"jobs/{name}", "RayJob")["spec"]["entrypoint"]
    assert not set(command) & set(";&|<>()`'\"\\\n")  # the submitter's shell would act on them
    values = settings(name)
    fit = getattr(values, "fit", None)
    assert fit is None or fit.name
    assert name != "tune" or values.name
    assert values.output.startswith("s3://")


@pytest.mark.parametrize("name", JOBS)
def test_no_location_is_one_that_only_a_pod_sees(name):
    flat = config.flat(settings(name))
    local = {
        key: value
        for key, value in flat.items()
        if re.match(r"(data|models|runs|tuned)\b", str(value))
    }
    assert not local


@pytest.mark.parametrize("name", JOBS)
def test_labels_and_gpus_that_jobs_ask_for_are_offered(name, groups):
    asked: dict[str, float] = {}
    for part in parts(settings(name)):
        if isinstance(part, Pool) and part.label:
            asked[part.label] = asked.get(part.label, 0) + part.size * part.gpus
        if isinstance(part, TrainConfig):
            asked[part.label] = part.workers * part.gpus_per_worker
    for label, gpus in asked.items():
        group = groups[label]
        assert gpus <= group["max_workers"] * group["resources"].get("GPU", 0) + 1e-6
    assert asked or name in ("tune", "evaluate", "gallery", "pairs")


def test_commands_of_the_document_name_what_is_there():
    texts = documents.scripts(ROOT / "docs" / "kubernetes.md")
    script = "\n".join(texts)
    directories = re.findall(r"--kustomize (\S+)", script)
    assert directories
    assert [path for path in directories if not (ROOT / path / "kustomization.yaml").exists()] == []
    named = re.findall(r"\b(?:rayjob|job)/([\w-]+)", script)
    assert named
    assert set(named) <= set(JOBS)
    targets = re.findall(r"--target (\w+) --tag (\S+)", script)
    used = {
        container(group)["image"] for group in specs(rendered("cluster", "RayCluster")).values()
    }
    assert {f"REGISTRY/{image}" for image in used} == {tag for _, tag in targets}
    assert all(tag.endswith(f"-{target}") for target, tag in targets)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_kubectl_makes_the_same_objects(directory):
    told = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / directory)],
        check=True,
        capture_output=True,
        text=True,
    )
    ours = kustomize.render(KUBERAY / directory)
    theirs = list(yaml.safe_load_all(told.stdout))
    assert sorted(ours, key=lambda one: one["kind"]) == sorted(theirs, key=lambda one: one["kind"])
