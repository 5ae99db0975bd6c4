#!/usr/bin/env bash
# Run a command on a cluster of its own, whose nodes have their own network and processes, and stop the cluster
# afterwards. It can run beside the cluster of slurm-up.sh, but only once at a time.
#
#   own-cluster.sh COMMAND [ARGUMENT ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAB=${LAB:-/tmp/mixtera-own} LAB_PORT=${LAB_PORT:-18000} LAB_LINK_ETC=0 LAB_HOSTS=0 LAB_NETNS=1
trap '"$here/slurm-down.sh" --wipe' EXIT
"$here/slurm-up.sh"
SLURM_CONF="$LAB/etc/slurm.conf" "$@"
