"""Environments as launchers make them, and broken ones."""

import pytest

from jaxlab.distributed.environment import Place, expand_nodes, find_place, tasks_per_node
from jaxlab.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
PORT = 61440 + 123456 % 4096
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
INDEXED = {
    "JOB_COMPLETION_INDEX": "2",
    "JAX_COORDINATOR_ADDRESS": "train-0.train:1234",
    "JAX_PROCESS_COUNT": "4",
}


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,host-b", ["n1", "host-b"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("a[1,3-4]-ib,b7", ["a1-ib", "a3-ib", "a4-ib", "b7"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_node_lists(nodes, hosts):
    assert list(expand_nodes(nodes)) == hosts


@pytest.mark.parametrize("nodes", ["", "a[1-2", "a]1[", "a[x-2]", "a[]", ",a", "a[²]"])
def test_no_node_lists(nodes):
    with pytest.raises(UserError, match="no list of nodes"):
        list(expand_nodes(nodes))


def test_tasks_per_node():
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    assert tasks_per_node("8") == [8]
    with pytest.raises(UserError, match="no list of tasks"):
        tasks_per_node("4(y2)")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, Place("SLURM", f"gpu08:{PORT}", 4, 3, (1,))),
        # Four GPUs and two processes: two for each. One GPU seen: srun has given each its own.
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Place("SLURM", f"gpu08:{PORT}", 4, 3, (2, 3)),
        ),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Place("SLURM", f"gpu08:{PORT}", 4, 3, None)),
        # One process a node has all GPUs.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_STEP_NODELIST": "a1,b[2-4]"},
            Place("SLURM", f"a1:{PORT}", 4, 3, None),
        ),
        # srun's own PMI says the same as SLURM.
        (
            SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"},
            Place("SLURM", f"gpu08:{PORT}", 4, 3, (1,)),
        ),
        (INDEXED, Place("Kubernetes", "train-0.train:1234", 4, 2, None)),
        (
            INDEXED | {"JAX_COORDINATOR_ADDRESS": "train-0"},
            Place("Kubernetes", "train-0:61440", 4, 2, None),
        ),
        (
            INDEXED | {"JOB_COMPLETION_INDEX": "1", "JOB_INDEX": "1", "PROCESSES_IN_JOB": "2"},
            Place("Kubernetes", "train-0.train:1234", 4, 3, None),
        ),
        (OMPI, Place("Open MPI", "127.0.0.1:61440", 2, 1, (1,))),
        # mpirun in an allocation of SLURM: what SLURM numbers are the daemons.
        (
            SLURM
            | OMPI
            | {
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_MCA_orte_hnp_uri": ";tcp://10.1.0.1,10.2.0.1:34911",
            },
            Place("Open MPI", "10.1.0.1:61440", 2, 1, None),
        ),
        (
            OMPI
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": ";tcp6://[fe80::1,fe80::2]:43"},
            Place("Open MPI", "[fe80::1]:61440", 2, 1, None),
        ),
        (
            OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_COORDINATOR_ADDRESS": "head:99"},
            Place("Open MPI", "head:99", 2, 1, None),
        ),
        (HYDRA, Place("PMI", "127.0.0.1:61440", 2, 1, (1,))),
        (SLURM | HYDRA, Place("PMI", "127.0.0.1:61440", 2, 1, (1,))),
    ],
)
def test_places(environment, place):
    found = find_place(environment)
    assert found._replace(coordinator="") == place._replace(coordinator="")
    ours, theirs = (x.coordinator.rpartition(":") for x in (found, place))
    assert ours[0] == theirs[0]
    if found.launcher in ("SLURM", "Kubernetes") or "JAX_COORDINATOR_ADDRESS" in environment:
        assert ours[2] == theirs[2]
    assert 61440 <= int(ours[2]) < 65536 or "JAX_COORDINATOR_ADDRESS" in environment


def test_a_port_that_is_asked_for():
    assert find_place(SLURM, 5000).coordinator == "gpu08:5000"
    assert find_place(HYDRA, 5000).coordinator == "127.0.0.1:5000"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "finds no step of SLURM"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, "start all of them by srun"),
        ({k: v for k, v in SLURM.items() if "NODELIST" not in k}, "SLURM_STEP_NODELIST or SLURM_JOB_NOD"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID should be a number, is 'x'"),
        (SLURM | {"SLURM_PROCID": "4"}, "process 4 of 4"),
        ({k: v for k, v in INDEXED.items() if "COUNT" not in k}, "needs the environment variable JAX_PROC"),
        ({k: v for k, v in INDEXED.items() if "ADDR" not in k}, "needs the environment variable JAX_COORD"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set the environment variable JAX_COORDINATOR_ADDRESS"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "set the environment variable JAX_COORDINATOR_ADDRESS"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "-2"}, "should be a number"),
    ],
)
def test_what_is_missing_is_one_line(environment, said):
    with pytest.raises(UserError, match=said):
        find_place(environment)
