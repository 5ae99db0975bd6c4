#!/bin/bash

# Parameters
#SBATCH --account=project
#SBATCH --cpus-per-task=7
#SBATCH --gpus-per-node=8
#SBATCH --job-name=golden
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/runs/golden/20261123-161004-7f3a/attempts/001/logs/batch.out
#SBATCH --partition=standard-g
#SBATCH --signal=USR2@120
#SBATCH --time=01:00:00

# setup
# The attempt number and the run folder. A follow-up job gets both as arguments.
attempt=${1:-1}
folder=$2
if [ -z "$folder" ]; then folder=/runs/golden/20261123-161004-7f3a; fi
nodes=2 ranks=16 limit_s=3600
last_attempt=3
follow_up="afterany:$SLURM_JOB_ID"
# A job that Slurm requeued begins a new attempt: the files of its earlier attempt stay as they are.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  while [ -e "$folder/attempts/$(printf %03d "$attempt")/job.json" ]; do attempt=$((attempt + 1)); done
fi
here=$folder/attempts/$(printf %03d "$attempt")
logs=${here//%/%%}/logs # srun expands % in file names.
mkdir -p "$here/logs" "$folder/control"
rm -f "$here/saved" "$here/exit.json"

record_job() { # Arguments: the attempt's folder, the job id. `mixtera-hpc status` reads this file.
  printf '{"kind": "slurm", "job_id": "%s", "submitted": "%s", "nodes": %d, "ranks": %d, "limit_s": %d}\n' \
    "$2" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$nodes" "$ranks" "$limit_s" >"$1/job.json"
}
finish() { # Argument: the exit code.
  printf '{"exit_code": %d, "elapsed_s": %d}\n' "$1" "$SECONDS" >"$here/exit.json"
  exit "$1"
}
newest_checkpoint() { cat "$folder/checkpoints/LATEST" 2>/dev/null; }

[ -e "$here/job.json" ] || record_job "$here" "$SLURM_JOB_ID"
if [ -e "$folder/control/cancelled" ]; then
  echo "The run was cancelled before attempt $attempt began. Continue with: mixtera-hpc resume $folder"
  finish 75
fi
checkpoint_before=$(newest_checkpoint)
export MIXTERA_RUN_FOLDER="$folder" MIXTERA_ATTEMPT="$attempt" MIXTERA_SAVED_FILE="$here/saved"

# cluster lumi
export HDF5_USE_FILE_LOCKING=FALSE
export MPICH_GPU_SUPPORT_ENABLED=0
ulimit -c 0
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))
export MIOPEN_USER_DB_PATH="/tmp/$USER-miopen-$SLURM_JOB_ID"
export MIOPEN_CUSTOM_CACHE_DIR="$MIOPEN_USER_DB_PATH"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --kill-on-bad-exit=1 --output="$logs/rank_%05t.out" --error="$logs/rank_%05t.err" --cpus-per-task=7 --cpu-bind=mask_cpu:0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000 \
  bash -c 'export ROCR_VISIBLE_DEVICES=$SLURM_LOCALID; exec "$@"' rank /opt/venv/bin/python -u -m mixtera_hpc run --folder "$folder" --attempt "$attempt"


# teardown
code=$?
# Ranks that saved exit with 0 and create this file, since --kill-on-bad-exit kills the others at any other code.
if [ "$code" -eq 0 ] && [ -e "$MIXTERA_SAVED_FILE" ]; then code=75; fi
if [ "$code" -ne 75 ]; then
  [ -e "$here/failure.json" ] && echo "First failure: $(cat "$here/failure.json")"
  finish "$code"
fi

echo "Attempt $attempt saved its state ($(newest_checkpoint)) and stopped."
if [ -e "$folder/control/cancelled" ]; then
  echo "The run was cancelled, so no other attempt is submitted."
elif [ "$attempt" -ge "$last_attempt" ]; then
  echo "This was the last attempt that job.max_attempts allows."
elif [ "$(newest_checkpoint)" = "$checkpoint_before" ]; then
  echo "It made no new checkpoint, so another attempt would make no progress."
else
  next_attempt=$((attempt + 1))
  next=$folder/attempts/$(printf %03d "$next_attempt")
  mkdir -p "$next/logs"
  cp "$0" "$next/submit.sh"
  if job_id=$(sbatch --parsable --dependency="$follow_up" --output="${next//%/%%}/logs/batch.out" \
    "$next/submit.sh" "$next_attempt" "$folder"); then
    record_job "$next" "${job_id%%;*}"
    echo "Attempt $next_attempt is job ${job_id%%;*}."
    finish 75
  fi
  rm -r "$next"
  echo "sbatch failed on this node; the cluster may not allow jobs to submit jobs."
fi
echo "Continue with: mixtera-hpc resume $folder"
finish 75
