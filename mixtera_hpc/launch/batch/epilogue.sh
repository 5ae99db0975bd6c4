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
