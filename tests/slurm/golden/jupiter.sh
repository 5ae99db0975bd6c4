#!/bin/bash

# Parameters
#SBATCH --account=project
#SBATCH --cpus-per-task=72
#SBATCH --gres=gpu:4
#SBATCH --job-name=golden
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/runs/golden/20261123-161004-7f3a/attempts/001/logs/batch.out
#SBATCH --partition=booster
#SBATCH --signal=USR2@120
#SBATCH --time=01:00:00

# setup
# The attempt number and the run folder. A follow-up job gets both as arguments, and the job that it follows.
attempt=${1:-1} first_attempt=1 last_attempt=3
folder=$2 previous_job=$3
if [ -z "$folder" ]; then folder=/runs/golden/20261123-161004-7f3a; fi
nodes=2 ranks=8 limit_s=3600
# A task of an array is named ARRAY_TASK. Its follow-up job is not a task and must not inherit these variables.
job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job_id=${job_id:-$SLURM_JOB_ID}
unset "${!SLURM_ARRAY_@}"
follow_up="afternotok:$job_id"
umask o-w # Nobody else may write the files of a run. The rest of the user's umask stays.
attempt_folder() { printf '%s/attempts/%03d' "$folder" "$1"; }
exit_code_is() { grep -qs "\"exit_code\": $2," "$1/exit.json"; } # Arguments: the attempt's folder, a code.
record_job() { # Arguments: the attempt's folder, the job id. `mixtera-hpc status` reads this file.
  printf '{"kind": "slurm", "job_id": "%s", "submitted": "%s", "nodes": %d, "ranks": %d, "limit_s": %d}\n' \
    "$2" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$nodes" "$ranks" "$limit_s" >"$1/job.json"
}
finish() { # Argument: the exit code.
  printf '{"exit_code": %d, "elapsed_s": %d}\n' "$1" "$SECONDS" >"$here/exit.json"
  exit "$1"
}
is_request() { # Argument: a control file. It counts if it belongs to this user, or to the group that may write there.
  [ -e "$1" ] || return 1
  [ -O "$1" ] && return 0
  case "$(stat -c '%A %g' "$folder/control")" in
    ?????w??[!w]?" $(stat -c %g "$1")") return 0 ;;
  esac
  echo "$1 is ignored: it belongs to another user." >&2
  return 1
}
# A killed rank leaves shared memory of its MPI library behind. Remove files that no process of this user maps; not new
# ones, which the process that makes them is about to map.
remove_dead_memory() {
  local names used name
  names=$(find /dev/shm -maxdepth 1 -user "$(id -u)" ! -newermt '10 seconds ago' \( -name 'mpich_shm_*' \
    -o -name 'mixtera-*' -o -name 'vader_segment.*' -o -name 'sm_segment.*' \) 2>/dev/null)
  [ -n "$names" ] || return 0
  used=$(cat /proc/[0-9]*/maps 2>/dev/null | grep -o '/dev/shm/[^ ]*')
  for name in $names; do
    case $'\n'$used$'\n' in *$'\n'"$name"$'\n'*) ;; *) rm -f "$name" ;; esac
  done
}
clean_nodes() {
  if [ "$nodes" -eq 1 ]; then
    remove_dead_memory
  else
    timeout 60 srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=1 --mpi=none \
      bash -c "$(declare -f remove_dead_memory); remove_dead_memory" >/dev/null 2>&1
  fi
}
newest_checkpoint() { cat "$folder/checkpoints/LATEST" 2>/dev/null; }

# A run has one writer: the job that creates the file `claim` of the newest attempt. While it lives, it counts in the
# file `alive`. Another job compares two values of that counter, and no clocks.
claim() {
  mkdir -p "$here/logs" "$folder/control"
  (set -o noclobber && echo "$job_id ${SLURM_RESTART_COUNT:-0} $HOSTNAME" >"$here/claim") 2>/dev/null
}
is_running() { # Argument: the folder of an attempt. Succeed if another job works on it; a dead owner takes 12 s.
  [ -e "$1/claim" ] && [ ! -e "$1/exit.json" ] || return 1
  [ "$(cut -d' ' -f1 "$1/claim")" = "$job_id" ] && return 1 # Slurm requeued this job.
  local counter
  counter=$(cat "$1/alive" 2>/dev/null)
  for _ in {1..12}; do
    sleep 1
    [ -e "$1/exit.json" ] && return 1
    [ "$(cat "$1/alive" 2>/dev/null)" != "$counter" ] && return 0
  done
  return 1
}
wait_for() { # Argument: an attempt. End this job if another one works on it; a follow-up job waits two minutes first.
  local owned tries=0
  owned=$(attempt_folder "$1")
  while is_running "$owned"; do
    tries=$((tries + 1))
    if [ -z "$previous_job" ] || [ "$tries" -ge 40 ]; then
      echo "Attempt $1 of $folder is running as job $(cut -d' ' -f1 "$owned/claim"), and a run has one writer."
      echo "  See mixtera-hpc status $folder"
      exit 2
    fi
  done
}
cancelled_by_user() { # Argument: a job id. Succeed if Slurm says so.
  local state
  state=$(sacct --noheader --allocations --parsable2 --jobs="$1" --format=State 2>/dev/null) || state=
  [ -n "$state" ] || state=$(scontrol show job "$1" 2>/dev/null | grep -o 'JobState=[A-Z]*')
  case $state in *CANCELLED*) return 0 ;; esac
  return 1
}
made_progress() { # Argument: an attempt. Succeed if it made a checkpoint, or if it is older than this script's chain.
  local after
  [ "$1" -lt "$first_attempt" ] && return 0
  after=$(attempt_folder $(($1 + 1)))/checkpoint_before
  if [ -e "$after" ]; then after=$(cat "$after"); else after=$(newest_checkpoint); fi
  [ "$(cat "$(attempt_folder "$1")/checkpoint_before" 2>/dev/null)" != "$after" ]
}

# The newest attempt counts: a job must not repeat an earlier one.
while [ -e "$(attempt_folder $((attempt + 1)))/claim" ]; do attempt=$((attempt + 1)); done
here=$(attempt_folder "$attempt")
if [ -n "$previous_job" ] && cancelled_by_user "$previous_job"; then
  echo "Job $previous_job was cancelled, so no attempt follows. Continue with: mixtera-hpc resume $folder"
  clean_nodes
  exit 0
fi
wait_for $((attempt - 1))
while
  if [ -n "$previous_job" ] && ! made_progress $((attempt - 1)) && ! made_progress $((attempt - 2)); then
    echo "Two attempts in a row made no new checkpoint. Continue with: mixtera-hpc resume $folder"
    exit 0
  fi
  ! claim
do
  wait_for "$attempt"
  if exit_code_is "$here" 0; then
    echo "The run is complete (attempt $attempt of $folder), so this job has nothing to do."
    echo "  To train longer: mixtera-hpc resume $folder training.num_steps=..."
    exit 2
  fi
  attempt=$((attempt + 1))
  here=$(attempt_folder "$attempt")
done
logs=${here//%/%%}/logs # srun expands % in file names.
if [ "$attempt" -ne "$first_attempt" ]; then
  echo "This job is attempt $attempt of $folder; its log is $here/logs/batch.out"
  exec >>"$here/logs/batch.out" 2>&1
fi
rm -f "$here/saved" "$here/exit.json"
grep -qs "\"job_id\": \"$job_id\"" "$here/job.json" || record_job "$here" "$job_id"
newest_checkpoint >"$here/checkpoint_before"
[ "$attempt" -gt 1 ] && clean_nodes # The batch shell of the attempt before may have been killed as well.

if is_request "$folder/control/cancelled"; then
  echo "The run was cancelled before attempt $attempt began. Continue with: mixtera-hpc resume $folder"
  finish 75
fi
count_while_alive() {
  local counter=0
  while kill -0 $$ 2>/dev/null; do
    echo $((counter += 1)) >"$here/.alive" && mv "$here/.alive" "$here/alive"
    sleep 3
  done
}
count_while_alive >/dev/null 2>&1 &

# The next attempt waits in the queue while this one runs. It begins however this job ends, also with its node, unless
# this job ends with exit code 0. `status` and `cancel` read its id in the file `follow_up`.
queued_follow_up() { # Print the id of a job that Slurm accepted although sbatch reported an error.
  local id script
  squeue --noheader --user="$(id -un)" --format='%i|%o' 2>/dev/null | while IFS='|' read -r id script; do
    case $script in "$here/submit.sh"*) [ "$id" != "$job_id" ] && echo "$id" && break ;; esac
  done
}
submit_follow_up() { # Arguments: seconds to wait before each try.
  local delay id
  [ "$attempt" -lt "$last_attempt" ] || return 0
  for delay in "$@"; do
    sleep "$delay"
    if ! id=$(sbatch --parsable --dependency="$follow_up" --kill-on-invalid-dep=yes \
      --output="${here//%/%%}/logs/follow_up.out" "$here/submit.sh" $((attempt + 1)) "$folder" "$job_id"); then
      id=$(queued_follow_up)
    fi
    if [ -n "$id" ]; then
      echo "${id%%;*}" >"$here/follow_up"
      return 0
    fi
  done
  return 1
}
[ -e "$here/submit.sh" ] || cp "$0" "$here/submit.sh"
submit_follow_up 0 5 20 &
follow_up_pid=$!
export MIXTERA_RUN_FOLDER="$folder" MIXTERA_ATTEMPT="$attempt" MIXTERA_SAVED_FILE="$here/saved"

# cluster jupiter
export HDF5_USE_FILE_LOCKING=FALSE
ulimit -c 0
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if getent hosts "$MASTER_ADDR"i >/dev/null; then MASTER_ADDR="$MASTER_ADDR"i; fi
export MASTER_ADDR
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 1000))

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --kill-on-bad-exit=1 --output="$logs/rank_%05t.out" --error="$logs/rank_%05t.err" --cpus-per-task=72 \
  /opt/venv/bin/python -u -m mixtera_hpc run --folder "$folder" --attempt "$attempt"


# teardown
code=$?
# Ranks that saved exit with 0 and create this file, since --kill-on-bad-exit kills the others at any other code.
if [ "$code" -eq 0 ] && [ -e "$MIXTERA_SAVED_FILE" ]; then code=75; fi
[ "$code" -eq 75 ] && echo "Attempt $attempt saved its state ($(newest_checkpoint)) and stopped."
case $code in
  0 | 75) ;;
  *)
    [ -e "$here/failure.json" ] && echo "First failure: $(cat "$here/failure.json")"
    clean_nodes
    ;;
esac

end=
if [ "$code" -eq 0 ]; then
  end="The run is complete."
elif [ "$code" -eq 2 ]; then
  end="Another attempt would be refused in the same way."
elif is_request "$folder/control/cancelled"; then
  end="The run was cancelled, so no attempt follows."
elif [ "$attempt" -ge "$last_attempt" ]; then
  end="This was the last attempt that job.max_attempts allows."
elif ! made_progress "$attempt" && ! made_progress $((attempt - 1)); then
  end="Two attempts in a row made no new checkpoint, so another one would make no progress."
fi
if ! wait "$follow_up_pid" && [ -z "$end" ] && ! submit_follow_up 0 10 60; then
  end="sbatch failed on this node; the cluster may not allow jobs to submit jobs."
fi
next_job=$(cat "$here/follow_up" 2>/dev/null)
if [ -z "$end" ]; then
  echo "Attempt $((attempt + 1)) is job $next_job."
  finish "$code"
fi
if [ -n "$next_job" ]; then
  scancel --quiet "$next_job"
  rm -f "$here/follow_up"
fi
echo "$end"
[ "$code" -eq 0 ] || echo "Continue with: mixtera-hpc resume $folder"
finish "$code"
