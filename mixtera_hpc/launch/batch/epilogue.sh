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
