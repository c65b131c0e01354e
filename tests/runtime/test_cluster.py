import copy
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture(scope="module")
def written():
    """The file as it is."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def filled(written):
    """The file with Ray's defaults for what it leaves out, as `ray up` sees it."""
    return prepare_config(copy.deepcopy(written))


@pytest.fixture(scope="module")
def ray_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (pin,) = [d for d in project["dependencies"] if d.startswith("ray[")]
    return re.fullmatch(r"(ray\[[a-z,]+\])==([\d.]+)", pin)


def starts(config):
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def labels_asked_for():
    """Values of the label `pool` in code, jobs, settings and the manual."""
    places = [
        *ROOT.glob("cvmatch/**/*.py"),
        *ROOT.glob("jobs/*"),
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("configs/**/*.yaml"),
    ]
    pattern = re.compile(r"label(?:: str(?: \| None)? = |=|\s|: )[\"'`]?((?:gpu|cpu)[a-z-]*)")
    return {
        (path.name, found)
        for path in places
        if path.is_file()
        for found in pattern.findall(path.read_text("utf-8"))
    }


def test_cluster_file_passes_rays_own_check(filled):
    validate_config(filled)


def test_cluster_file_with_an_unknown_key_fails_rays_own_check(written):
    node = {**written["available_node_types"]["cpu"], "lables": {}}
    types = {**written["available_node_types"], "cpu": node}
    with pytest.raises(jsonschema.ValidationError, match="lables"):
        validate_config(prepare_config({**copy.deepcopy(written), "available_node_types": types}))


@pytest.mark.parametrize("name", COMMANDS)
def test_cluster_commands_are_all_written_out(written, filled, name):
    assert isinstance(written[name], list)  # a missing list would be Ray's default
    with_shared = name in ("head_setup_commands", "worker_setup_commands")  # Ray prepends these
    shared = written["setup_commands"] if with_shared else []
    assert filled[name] == shared + written[name]


def test_cluster_commands_install_no_nightly_and_open_nothing(filled):
    commands = [command for name in COMMANDS for command in filled[name]]
    assert not [c for c in commands if "ray-wheels" in c or "0.0.0.0" in c]


def test_cluster_head_runs_no_work(filled):
    head = filled["available_node_types"][filled["head_node_type"]]
    assert head["resources"] == {"CPU": 0}


def test_cluster_dashboard_answers_the_head_alone(filled):
    (start,) = [c for c in starts(filled) if "--head" in c]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]
    assert "--autoscaling-config=" in start  # without it no worker would ever start


def test_cluster_every_start_demands_the_token(filled):
    assert len(starts(filled)) == 2
    assert all(re.search(r"\bRAY_AUTH_MODE=token ray start\b", c) for c in starts(filled))
    assert "~/.ray/auth_token" in filled["file_mounts"]
    assert any("RAY_AUTH_MODE=token" in option for option in filled["docker"]["run_options"])


def test_cluster_holds_no_secret(written):
    assert not re.search(r"AUTH_TOKEN\s*[=:]\s*\S", yaml.safe_dump(written))


def test_cluster_ray_is_the_pinned_one(filled, ray_pin):
    nodes = filled["available_node_types"].values()
    images = [filled["docker"]["image"], filled["docker"]["head_image"]]
    images += [node["docker"]["worker_image"] for node in nodes if "docker" in node]
    assert {re.findall(r":([\d.]+)-", image)[0] for image in images} == {ray_pin[2]}
    assert any(f'"{ray_pin[0]}"' in command for command in filled["setup_commands"])


def test_cluster_workers_have_room_to_grow(filled):
    nodes = filled["available_node_types"]
    workers = [node for name, node in nodes.items() if name != filled["head_node_type"]]
    assert all(0 <= node["min_workers"] <= node["max_workers"] for node in workers)
    assert all(node["max_workers"] > 0 for node in workers)
    assert filled["max_workers"] >= max(node["max_workers"] for node in workers)


def test_cluster_pools_offer_what_their_names_say(filled):
    pools = {node["labels"]["pool"]: node for node in filled["available_node_types"].values()}
    assert len(pools) == len(filled["available_node_types"])
    gpus = {name: node["resources"].get("GPU", 0) for name, node in pools.items()}
    assert gpus["gpu-train"] > 1  # DDP inside one node
    assert gpus["gpu-generate"] == 1
    assert gpus["cpu"] == 0


def test_cluster_offers_every_label_that_is_asked_for(filled):
    offered = {node["labels"]["pool"] for node in filled["available_node_types"].values()}
    asked = labels_asked_for()
    assert {found for _, found in asked} >= {"gpu-generate", "gpu-train"}  # the search finds some
    assert [(file, found) for file, found in asked if found not in offered] == []


def test_cluster_file_mounts_of_this_repository_exist(written):
    local = [path for path in written["file_mounts"].values() if not path.startswith("~")]
    assert local
    assert [path for path in local if not (ROOT / path).exists()] == []


def test_constraints_are_exact_versions_from_registries(ray_pin):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)
    ] == []
    assert f"ray=={ray_pin[2]}" in lines
