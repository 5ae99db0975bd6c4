code=$?
# Ranks that saved leave with 0 and this file, because --kill-on-bad-exit would kill those still on their way out.
if [ "$code" -eq 0 ] && [ -e "$MIXTERA_SAVED_FILE" ]; then code=75; fi
if [ "$code" -ne 75 ]; then
  [ -e "$here/failure.json" ] && echo "First failure: $(cat "$here/failure.json")"
  finish "$code"
fi

echo "Attempt $attempt saved its state ($(newest_checkpoint)) and left."
if [ -e "$folder/control/cancelled" ]; then
  echo "The run was cancelled: nothing follows."
elif [ "$attempt" -ge "$last_attempt" ]; then
  echo "It was the last that job.max_attempts allows."
elif [ "$(newest_checkpoint)" = "$checkpoint_before" ]; then
  echo "It made no new checkpoint: another attempt would not get further."
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
  echo "This node may not submit jobs."
fi
echo "Continue with: mixtera-hpc resume $folder"
finish 75
