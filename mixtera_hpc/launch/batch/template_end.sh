code=$?
# Ranks that saved exit with 0 and create this file, since --kill-on-bad-exit kills the others at any other code.
if [ "$code" -eq 0 ] && [ -e "$MIXTERA_SAVED_FILE" ]; then
  rm "$MIXTERA_SAVED_FILE"
  echo "The state is saved. Continue with: sbatch SCRIPT resume RUN" >&2
  code=75
fi
exit "$code"
