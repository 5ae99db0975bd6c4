# shellcheck shell=bash
# Sourced by slurm-up.sh after settings.sh: the configuration files. README.md says what each unusual line is for.

write_config() {
  # A wiped cluster must not number its jobs from 1 again: job ids name files that may still lie about.
  [ -s "$LAB/etc/first-job-id" ] || echo $((($(date +%s) % 4000000) * 10 + 1)) >"$LAB/etc/first-job-id"
  slurm_conf >"$LAB/etc/slurm.conf.new"
  gres_conf >"$LAB/etc/gres.conf"
  task_prolog >"$LAB/etc/task-prolog.sh"
  chmod +x "$LAB/etc/task-prolog.sh"
  echo "CgroupPlugin=cgroup/v1" >"$LAB/etc/cgroup.conf" # Never used; without it every daemon warns.
  (umask 077 && slurmdbd_conf >"$LAB/etc/slurmdbd.conf")
  config_changed=0
  cmp -s "$LAB/etc/slurm.conf.new" "$LAB/etc/slurm.conf" || config_changed=1
  mv "$LAB/etc/slurm.conf.new" "$LAB/etc/slurm.conf"
  echo "export SLURM_CONF=$LAB/etc/slurm.conf" >"$LAB/env"
  if [ "$LAB_LINK_ETC" = 1 ]; then
    mkdir -p /etc/slurm
    for file in slurm.conf gres.conf cgroup.conf slurmdbd.conf; do ln -sfn "$LAB/etc/$file" "/etc/slurm/$file"; done
  fi
}

slurm_conf() {
  cat <<EOF
ClusterName=lab
SlurmctldHost=$(hostname -s)($HEAD_ADDRESS)
SlurmctldPort=$((LAB_PORT + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$LAB/run/munge.socket,cred_expire=$LAB_REQUEUE_DELAY
CredType=cred/munge
MpiDefault=$LAB_MPI
TaskProlog=$LAB/etc/task-prolog.sh
FirstJobId=$(cat "$LAB/etc/first-job-id")
MaxArraySize=$LAB_MAX_ARRAY_SIZE
MailProg=/bin/true

SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd-%n.pid
SlurmdSpoolDir=$LAB/spool/%n
TmpFS=$LAB/tmp/%n
StateSaveLocation=$LAB/state
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt

# No cgroups, and nodes that claim what they like.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1

# As quick as Slurm lets it be.
SlurmctldTimeout=30
SlurmdTimeout=$LAB_SLURMD_TIMEOUT
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
KillWait=2
WaitTime=0
UnkillableStepTimeout=30
MinJobAge=300
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PriorityType=priority/basic
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2

# Jobs in urgent preempt jobs in normal: the sbatch --signal, GraceTime seconds, then requeue.
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

$(accounting)
$(nodes)
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=15
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=debug Nodes=ALL MaxTime=00:30:00 State=UP PriorityTier=10
EOF
}

# Slurm's pmi2 plugin reads at most 1,024 bytes of a request. MPICH sends its addresses in compressed parts of a buffer
# that it has not cleared, and parts with old memory are too long: MPI_Init then aborts or hangs. Fewer transports make
# the addresses shorter, and the settings of glibc clear the memory.
task_prolog() {
  cat <<'EOF'
#!/bin/sh
echo "export UCX_TLS=tcp,self,sysv"
echo "export GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.perturb=255"
EOF
}

accounting() {
  if [ "$LAB_ACCT" != dbd ]; then
    echo "AccountingStorageType=accounting_storage/none"
    return
  fi
  cat <<EOF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$HEAD_ADDRESS
AccountingStoragePort=$((LAB_PORT + 2))
AccountingStoragePass=$LAB/run/munge.socket
EOF
}

nodes() {
  local memory gres='' number
  memory=$(($(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) - 512))
  [ "$LAB_GPUS" -gt 0 ] && gres=" Gres=gpu:$LAB_GPU_TYPE:$LAB_GPUS"
  echo "NodeName=DEFAULT CPUs=$LAB_CPUS RealMemory=$memory State=UNKNOWN$gres Feature=lab"
  for number in $(seq "$LAB_NODES"); do
    if [ "$LAB_NETNS" = 1 ]; then
      echo "NodeName=node$number NodeAddr=$LAB_NET.$number Port=$((LAB_PORT + 100))"
    else
      echo "NodeName=node$number NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((LAB_PORT + 100 + number))"
    fi
  done
}

# A GPU needs a file, and the file must be a character device, or CUDA_VISIBLE_DEVICES stays empty: copies of /dev/null.
gres_conf() {
  [ "$LAB_GPUS" -gt 0 ] || return 0
  local number
  for number in $(seq 0 $((LAB_GPUS - 1))); do
    [ -c "$LAB/dev/gpu$number" ] || mknod "$LAB/dev/gpu$number" c 1 3
  done
  echo "Name=gpu Type=$LAB_GPU_TYPE File=$LAB/dev/gpu[0-$((LAB_GPUS - 1))]"
}

slurmdbd_conf() {
  cat <<EOF
AuthType=auth/munge
AuthInfo=socket=$LAB/run/munge.socket
DbdHost=$(hostname -s)
DbdAddr=$HEAD_ADDRESS
DbdPort=$((LAB_PORT + 2))
SlurmUser=root
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((LAB_PORT + 3))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
EOF
}
