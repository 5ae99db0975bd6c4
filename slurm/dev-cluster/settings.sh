# shellcheck shell=bash
# What the cluster looks like, and what all scripts share. Every variable can be set in the environment.

LAB=${LAB:-/tmp/mixtera-slurm}               # its whole state; short, because Slurm makes sockets below it (108 characters)
LAB_NODES=${LAB_NODES:-4}
LAB_CPUS=${LAB_CPUS:-8}                      # what each node claims; the real number does not matter
LAB_GPUS=${LAB_GPUS:-4}                      # GPUs each node claims; 0 for none
LAB_GPU_TYPE=${LAB_GPU_TYPE:-gh200}
LAB_ACCT=${LAB_ACCT:-dbd}                    # dbd: sacct works; none: up in a third of a second, no accounting
LAB_MPI=${LAB_MPI:-pmi2}                     # default of srun --mpi; pmi2 is what the mpich wheel speaks
LAB_PORT=${LAB_PORT:-17000}                  # slurmctld +1, slurmdbd +2, mariadb +3, node N +100+N
LAB_SLURMD_TIMEOUT=${LAB_SLURMD_TIMEOUT:-10} # seconds of silence until a node is down
LAB_REQUEUE_DELAY=${LAB_REQUEUE_DELAY:-5}    # seconds a requeued job waits; below 5 Slurm silently takes 120
LAB_LINK_ETC=${LAB_LINK_ETC:-1}              # link the configuration into /etc/slurm, so that nobody needs SLURM_CONF
LAB_HOSTS=${LAB_HOSTS:-1}                    # name the nodes in /etc/hosts (torch's MASTER_ADDR must resolve)
LAB_NETNS=${LAB_NETNS:-0}                    # 1: every node in namespaces of its own
LAB_NET=${LAB_NET:-10.77.0}                  # then node N is .N and the head .254
HOSTS_MARK='# mixtera-slurm'

node_names() { seq -f 'node%g' "$LAB_NODES"; }

# Whether the daemon of a pid file runs. A stale file may name a process that is somebody else's by now.
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
  HEAD=(nsenter --net=/run/netns/lab-head --)
  HEAD_ADDRESS=$LAB_NET.254
fi
