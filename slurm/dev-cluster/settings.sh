# shellcheck shell=bash
# Settings of the cluster, and functions that all scripts share. Every variable can be set in the environment.

LAB=${LAB:-/tmp/mixtera-slurm}               # all state; a short path, because names of sockets end at 108 characters
LAB_NODES=${LAB_NODES:-4}
LAB_CPUS=${LAB_CPUS:-8}                      # CPUs that each node claims; the real number does not matter
LAB_GPUS=${LAB_GPUS:-4}                      # GPUs that each node claims; 0 for none
LAB_GPU_TYPE=${LAB_GPU_TYPE:-gh200}
LAB_ACCT=${LAB_ACCT:-dbd}                    # dbd: sacct works; none: starts in 0.3 s, without accounting
LAB_MPI=${LAB_MPI:-pmi2}                     # default of srun --mpi; the mpich wheel needs pmi2
LAB_PORT=${LAB_PORT:-17000}                  # slurmctld +1, slurmdbd +2, mariadb +3, node N +100+N
LAB_SLURMD_TIMEOUT=${LAB_SLURMD_TIMEOUT:-10} # seconds without an answer until a node counts as down
LAB_REQUEUE_DELAY=${LAB_REQUEUE_DELAY:-5}    # seconds that a requeued job waits; below 5, Slurm silently uses 120
LAB_MAX_ARRAY_SIZE=${LAB_MAX_ARRAY_SIZE:-1001} # tasks of a job array, from 0 on
LAB_LINK_ETC=${LAB_LINK_ETC:-1}              # link the configuration into /etc/slurm, so that SLURM_CONF is not needed
LAB_HOSTS=${LAB_HOSTS:-1}                    # name the nodes in /etc/hosts (torch's MASTER_ADDR must resolve)
LAB_NETNS=${LAB_NETNS:-0}                    # 1: every node in namespaces of its own
LAB_NET=${LAB_NET:-10.77.0}                  # then node N is .N and the head .254
LAB_NAMESPACES=${LAB_NAMESPACES:-${LAB##*/}} # and the network namespaces are NAME-head, NAME-node1, …
HOSTS_MARK='# mixtera-slurm'

node_names() { seq -f 'node%g' "$LAB_NODES"; }

# Succeed if the daemon of a pid file runs. The id in a stale file may belong to another process by now.
alive() { # pid file
  local want pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  case ${1##*/} in
    slurmd-*) want=slurmd ;;
    node-*) want=unshare ;;
    mariadb.pid) want=mariadbd ;;
    *) want=$(basename "$1" .pid) ;;
  esac
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$want" ] && [ "$(ps -o stat= -p "$pid" | cut -c1)" != Z ]
}

# Commands run where slurmctld lives: here, or in the head's network namespace.
HEAD=()
HEAD_ADDRESS=127.0.0.1
if [ "$LAB_NETNS" = 1 ]; then
  HEAD=(nsenter --net="/run/netns/$LAB_NAMESPACES-head" --)
  HEAD_ADDRESS=$LAB_NET.254
fi
