#!/usr/bin/env bash
# Run the tests whose outcome can depend on the user, the folder or the Python: as an unprivileged user, with Debian's
# own python3, in a folder with a space in its name. root passes every permission check, so some faults show only here.
# These are the tests of files, folders, indexes, the command line and jobs, and the example of plain PyTorch. What is
# computed in memory (mixing, planning, losses, formats of bytes) does not depend on these; `make test` covers it.
# Needs root on Debian.
#
#   plain-user.sh [install|test]    by default, both
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
user=mixtera-ci
home=/home/$user
folder="$home/plain user/mixtera-hpc"

install() {
  if ! dpkg -s python3-venv >/dev/null 2>&1; then
    (
      flock 9 # A cluster that starts meanwhile may install packages, too.
      apt-get update -qq -o Acquire::Retries=3
      apt-get install -y -qq --no-install-recommends -o Acquire::Retries=3 python3-venv
    ) 9>/run/mixtera-apt.lock
  fi
  id "$user" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user"
  rm -rf "$home/plain user"
  mkdir -p "$folder"
  git -C "$repository" archive HEAD | tar -x -C "$folder"

  # The packages come from root's settings of pip: the user has none.
  /usr/bin/python3 -m venv "$folder/.venv"
  make --no-print-directory -C "$folder" setup
  chown -R "$user:" "$home/plain user"
}

run_pytest() {
  su -s /bin/bash -c 'ulimit -n 1024 && cd "$0" && exec .venv/bin/python -m pytest -q "$@"' -- "$user" "$folder" "$@"
}

run_tests() {
  cd "$folder"
  run_pytest -n 2 --dist loadfile tests/unit/test_{cli,config,index,launch}_*.py tests/unit/test_*_{folder,verb}.py \
    tests/unit/test_{control,missing_packages,odd_paths,plane_start,policies,training_checkpoint,workers}.py \
    tests/property/test_index_{kill,refresh_kill}.py
  # The other trainers need packages that `make integrations` installs.
  run_pytest -m "integrations and not full" -k two_jobs_with_a_checkpoint tests/integrations/test_torch.py
  rm -rf "$home/plain user"
}

case ${1:-both} in
  install) install ;;
  test) run_tests ;;
  both)
    install
    run_tests
    ;;
  *)
    echo "plain-user.sh [install|test], not '$1'" >&2
    exit 2
    ;;
esac
