#!/usr/bin/env bash
#SBATCH --job-name=espalier
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=espalier-%j.log
# An espalier command on all nodes of a Slurm job, on a Ray cluster that lives as long as it:
#
#     sbatch cluster/deploy/slurm.sh prune /shared/llama --output /shared/llama-50 --calibration /shared/text.txt
#     sbatch --nodes=4 --gpus-per-node=0 cluster/deploy/slurm.sh prune …          # on CPUs
#     sbatch cluster/deploy/slurm.sh resume /shared/llama-50                      # after the time limit, or a lost node
#
# Given from the checkout, which lies on storage that all nodes share, as models and outputs do; or else with
#     ESPALIER_HOME         the checkout
#     ESPALIER_VENV         the environment that espalier is installed in; .venv in the checkout if not given
#     RAY_AUTH_TOKEN_PATH   a token of your own; without, the job makes one for itself, which goes with it
# Two minutes before the time limit the run is told to stop, and says how to go on.
set -euo pipefail

home=${ESPALIER_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck disable=SC1091
source "${ESPALIER_VENV:-$home/.venv}/bin/activate"

if [ -z "${RAY_AUTH_TOKEN_PATH:-}" ]; then
    RAY_AUTH_TOKEN_PATH=$HOME/.ray/espalier-$SLURM_JOB_ID.token
    trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
    (
        umask 077
        mkdir -p "$HOME/.ray"
        head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
    )
fi
export RAY_AUTH_TOKEN_PATH

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One task a node, bound to no core: Ray and torch share out the node's cores among themselves.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --cpu-bind=none bash -c '
    export RAY_CPUS=$SLURM_CPUS_ON_NODE RAY_GPUS=${SLURM_GPUS_ON_NODE:-0}
    exec bash "$0" "$SLURM_NODEID" "$SLURM_NNODES" "$@"
' "$home/cluster/deploy/node.sh" "$head" "$@"
