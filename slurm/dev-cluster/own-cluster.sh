#!/usr/bin/env bash
# Run a command on a cluster of its own, whose nodes have their own network and processes, and stop the cluster
# afterwards. Several can run beside each other and beside the cluster of slurm-up.sh.
#
#   own-cluster.sh COMMAND [ARGUMENT ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB=${LAB:-$(mktemp -d /tmp/mixtera-own.XXXX)}
mkdir -p "$LAB" && chmod 755 "$LAB"
export LAB LAB_PORT=${LAB_PORT:-18000} LAB_LINK_ETC=0 LAB_HOSTS=0 LAB_NETNS=1
trap '"$here/slurm-down.sh" --wipe' EXIT
"$here/slurm-up.sh"
SLURM_CONF="$LAB/etc/slurm.conf" "$@"
