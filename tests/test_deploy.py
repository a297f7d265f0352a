"""deploy/ without a cluster: the SLURM script run with stand-ins for SLURM's commands, the JobSet held against its schema."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # Orbax brings it

from jzero.launch import PREEMPTED

DEPLOY = Path(__file__).parent.parent / "deploy"
SRUN = """#!/bin/bash
# Stand-in: two tasks with the variables that SLURM sets; passes signals on, and ends with the worst code, as srun does.
echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
pids=()
for task in 0 1; do SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do
  wait "$pid"; one=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done
  (( one > code )) && code=$one
done
exit $code
"""
SCRIPT = """
import os, signal, sys, time
assert os.environ["JZERO_STEP_TIMEOUT"] == "600" and os.environ["JAX_ENABLE_PREEMPTION_SERVICE"] == "1"
os.write(1, f"rank {os.environ['SLURM_PROCID']} {sys.argv[1:]}\\n".encode())  # whole, beside the other rank's
"""


@pytest.fixture
def slurm(tmp_path):
    """`run(script) -> (code, printed, calls of srun and scontrol)`, with the stand-ins first on the path."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "scontrol $*" >> "$CALLS"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "77"}

    def run(script):
        (tmp_path / "train.py").write_text(SCRIPT + script)
        command = ["bash", str(DEPLOY / "slurm.sh"), "train.py", "--out", "runs/a b"]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, (tmp_path / "calls").read_text().splitlines()

    return run


def test_slurm_starts_every_task_with_its_arguments(slurm):
    code, printed, calls = slurm("")
    assert code == 0, printed
    assert {f"rank {task} ['--out', 'runs/a b']" for task in (0, 1)} <= set(printed.splitlines())
    assert len(calls) == 1
    assert "--kill-on-bad-exit=1" in calls[0]


@pytest.mark.parametrize(("how", "code", "requeued"), [
    (f"sys.exit({PREEMPTED})", PREEMPTED, True),
    ("sys.exit(3)", 3, False),
    ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, False),
    ("sys.exit(124)", 124, False),
])  # fmt: skip
def test_slurm_requeues_what_was_preempted_and_nothing_else(slurm, how, code, requeued):
    found, printed, calls = slurm(how)
    assert found == code, printed
    assert ("scontrol requeue 77" in calls) == requeued


def test_slurm_directives_are_options_of_sbatch():
    text = (DEPLOY / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert directives.keys() == {"nodes", "ntasks-per-node", "gpus-per-node", "requeue", "open-mode", "signal"}
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert re.fullmatch(r"TERM@\d+", directives["signal"]), "to the job's steps, not to the batch shell (B:)"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(DEPLOY / "slurm.sh")], check=True)


# The fields of JobSet v1alpha2, batch/v1 Job and core/v1 Pod that the file may use, and their types.
STRING, NUMBER = str, int
POD = {
    "restartPolicy": STRING, "serviceAccountName": STRING, "terminationGracePeriodSeconds": NUMBER,
    "containers": [{
        "name": STRING, "image": STRING, "command": [STRING], "env": [{"name": STRING, "value": STRING}],
        "resources": {"limits": {"nvidia.com/gpu": NUMBER}}, "volumeMounts": [{"name": STRING, "mountPath": STRING}],
    }],
    "volumes": [{"name": STRING, "persistentVolumeClaim": {"claimName": STRING}}],
}  # fmt: skip
JOB = {
    "completionMode": STRING, "parallelism": NUMBER, "completions": NUMBER, "backoffLimit": NUMBER,
    "template": {"spec": POD},
}  # fmt: skip
JOB_SET = {
    "apiVersion": STRING, "kind": STRING, "metadata": {"name": STRING},
    "spec": {
        "failurePolicy": {"maxRestarts": NUMBER},
        "replicatedJobs": [{"name": STRING, "replicas": NUMBER, "template": {"spec": JOB}}],
    },
}  # fmt: skip


def wrong(found, schema, path=""):
    """Where a document leaves its schema: unknown fields and values of another type."""
    if isinstance(schema, dict):
        if not isinstance(found, dict):
            return [f"{path}: not a mapping"]
        unknown = [f"{path}/{key}: no such field" for key in found.keys() - schema.keys()]
        return unknown + [
            line for key in found.keys() & schema.keys() for line in wrong(found[key], schema[key], f"{path}/{key}")
        ]
    if isinstance(schema, list):
        if not isinstance(found, list) or not found:
            return [f"{path}: not a list"]
        return [line for index, one in enumerate(found) for line in wrong(one, schema[0], f"{path}/{index}")]
    return [] if type(found) is schema else [f"{path}: {found!r} is no {schema.__name__}"]


def test_the_job_set_fits_its_schema_and_itself():
    found = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    assert not wrong(found, JOB_SET)
    assert wrong({**found, "sepc": {}}, JOB_SET) == ["/sepc: no such field"]
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert spec["parallelism"] == spec["completions"], "all ranks at once"
    assert (spec["completionMode"], spec["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    (container,) = pod["containers"]
    assert {one["name"] for one in pod["volumes"]} == {one["name"] for one in container["volumeMounts"]}
    assert {"JZERO_STEP_TIMEOUT", "JAX_ENABLE_PREEMPTION_SERVICE"} <= {one["name"] for one in container["env"]}
