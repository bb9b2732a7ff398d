#!/usr/bin/env bash
# One allocation with two GPUs; submitted again after a time limit, it completes the run: sbatch examples/slurm.sh
#SBATCH --job-name=mimrefiner
#SBATCH --gpus=2
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
set -euo pipefail
export MIMREFINER_CACHE="${MIMREFINER_CACHE:-$PWD/runs/cache}"
mimrefiner run --preset gpu --seeds 0,1,2 --gpus 0,1 --keep-going --resume --out runs/gpu
