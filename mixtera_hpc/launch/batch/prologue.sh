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
