#!/bin/bash
# A sweep as an array: each point one task with a GPU of its own. Six points:
#   sbatch --array=0-5 docs/launch/slurm_sweep.sh configs/nsa/n1_nsa.yaml --sweep 'seed=[0,1,2]' 'optimizer.learning_rate=[1e-3,3e-3]'
# `run.py train CONFIG --sweep ... --sweep-script` prints this for one sweep, with the number of its points.
# Afterwards, or meanwhile: the same words with --sweep-collect print the table and say which points are missing.
#SBATCH --job-name=jaxlab-sweep
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%x-%A_%a.log

set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: sbatch --array=0-N $0 CONFIG.yaml --sweep KEY=[A,B] ..." >&2
    exit 2
fi

# shellcheck source=/dev/null
[ -f .venv/bin/activate ] && . .venv/bin/activate

srun python run.py train "$@" --sweep-index auto
