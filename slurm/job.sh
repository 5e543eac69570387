# Sourced by the job scripts: where the project is, the environment, and how processes are started on every node.
#   CAPTIONING_SETUP               file to source first: modules, the virtual environment, NCCL variables (.venv/bin/activate)
#   CAPTIONING_PROCESSES_PER_NODE  processes a node (as many as GPUs were given to the job on a node, else 1)
#   MASTER_ADDR, MASTER_PORT       where the processes meet (the first node as Slurm knows it; a port made of the job id)

stop() { echo "error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || stop "this is a job script: submit it with sbatch"
setup=${CAPTIONING_SETUP:-.venv/bin/activate}
if [ -f "$setup" ]; then
    source "$setup"
elif [ -n "${CAPTIONING_SETUP:-}" ]; then
    stop "CAPTIONING_SETUP=$CAPTIONING_SETUP: there is no such file"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
commands=$(python -c 'import launch; print(launch.__path__[0])') ||
    stop "python finds no package launch: activate the environment that has it, CAPTIONING_SETUP=FILE"

# on_every_node SCRIPT ARGUMENTS...: run a Python script in all processes of the job, their output labelled by node.
on_every_node() {
    local head
    export PROCESSES_PER_NODE=${CAPTIONING_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node -o "$head" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it over by itself
    fi
    # exec: whoever puts this in the background has srun's own process id.
    exec srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label bash slurm/node.sh "$@"
}
