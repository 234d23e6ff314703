#!/bin/bash
# One training run over several nodes, one process a node with all its GPUs:
#   sbatch --nodes=4 docs/launch/slurm_train.sh configs/train/nsa_7b.yaml --mesh '{data: 4, fsdp: 8}'
# The checkout, the environment, the data and outputs/ are on a disk that all nodes share.
#SBATCH --job-name=jaxlab-train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the end all processes are asked to save and stop; the job starts again and goes on.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch --nodes=N $0 CONFIG.yaml [--field value ...]" >&2
    exit 2
fi

# shellcheck source=/dev/null
[ -f .venv/bin/activate ] && . .venv/bin/activate

# --kill-on-bad-exit: a process that ends by itself ends the others, should they not see it first.
status=0
srun --kill-on-bad-exit=1 python run.py train "$@" --distributed auto || status=$?

# 143: saved and stopped, by SLURM or by somebody; within the job's limit it goes on where it was.
if [ "$status" -eq 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
